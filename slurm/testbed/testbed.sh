#!/usr/bin/env bash
# A Slurm cluster of several hosts on this one machine, for trying batch scripts and breaking things. Needs root, and
# Debian's packages slurmctld slurmd slurm-client munge iproute2 (and python3 for latency where the kernel has no netem).
#
#   testbed.sh up [NODES]        start NODES hosts (default 4) and a controller; does nothing if they are up
#   testbed.sh run CMD…          run CMD on the controller, where sbatch, srun, squeue and scancel work
#   testbed.sh status            what Slurm says of its nodes
#   testbed.sh shape DELAY RATE  make every host's link slow, e.g. `shape 10ms 100mbit`; `shape off` undoes it
#   testbed.sh kill-node N       host N dies with everything on it
#   testbed.sh cut-link N        host N lives, but nobody reaches it
#   testbed.sh heal N            a dead host comes back, a cut link is mended
#   testbed.sh down              end and remove everything
#
# Each host is a network namespace with a link to a switch (another one), and namespaces of its own for processes, mounts,
# host name and shared memory; it has its own /tmp and /dev/shm, and shares every other file. No address, process or file
# is left after `down`, and nothing listens outside these namespaces. State is in /run/sideways-testbed: there is one
# testbed a machine at a time.
set -euo pipefail

state=/run/sideways-testbed
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
subnet=10.231.77
switch=swbed-switch
control=swbed-ctl

die() { echo "testbed: $*" >&2; exit 2; }
host() { echo "swbed-n$1"; }
hosts() { ip netns list | awk '{print $1}' | grep -E '^swbed-n[0-9]+$' | sort -V || true; }

check() {
  [ "$(id -u)" -eq 0 ] || die "needs root: network namespaces and Slurm's daemons"
  for program in slurmctld slurmd sbatch munged ip tc unshare nsenter; do
    command -v "$program" >/dev/null || die "$program is missing: apt-get install slurmctld slurmd slurm-client munge iproute2"
  done
}

# enter NAMESPACE HOSTNAME CMD…: runs CMD as process 1 of a host. The checkout stays visible even if it is under /tmp.
enter() {
  local namespace=$1 name=$2; shift 2
  nsenter --net="/run/netns/$namespace" unshare -m -u -i -p --fork --kill-child --mount-proc --propagation private \
    env NAME="$name" STATE="$state" HOME_DIR="$home" bash -c '
      hostname "$NAME"
      mount -t tmpfs tmpfs /mnt && mkdir /mnt/home && mount --bind "$HOME_DIR" /mnt/home
      mount -t tmpfs tmpfs /tmp && mount -t tmpfs tmpfs /dev/shm && chmod 1777 /tmp /dev/shm
      case $HOME_DIR in /tmp/*) mkdir -p "$HOME_DIR" && mount --bind /mnt/home "$HOME_DIR";; esac
      mount --bind "$STATE/hosts" /etc/hosts
      export SLURM_CONF="$STATE/slurm.conf"
      exec "$@"' enter "$@"
}

# daemon NAME CMD…: starts CMD in a session of its own; its output goes to a log.
daemon() {
  local name=$1; shift
  setsid -f "$0" _exec "$name" "$@" </dev/null >"$state/log/$name.out" 2>&1
}

start_host() {
  daemon "n$1" "$(host "$1")" "n$1" slurmd -D -N "n$1"
}

link() { # NAMESPACE LAST-BYTE
  ip link add "swbed$2" type veth peer name "swbed$2p"
  ip link set "swbed$2" netns "$1"
  ip -n "$1" link set "swbed$2" name eth0
  ip -n "$1" addr add "$subnet.$2/24" dev eth0
  ip -n "$1" link set lo up
  ip -n "$1" link set eth0 up
  ip link set "swbed$2p" netns "$switch"
  ip -n "$switch" link set "swbed$2p" name "port$2"
  ip -n "$switch" link set "port$2" master bridge up
}

configure() { # NODES
  local nodes=$1 cores last=$(( $1 - 1 ))
  cores=$(nproc); [ "$cores" -ge 8 ] || cores=8
  { echo "127.0.0.1 localhost"; echo "$subnet.1 ctl"
    for n in $(seq 0 "$last"); do echo "$subnet.$((10 + n)) n$n"; done; } >"$state/hosts"
  dd if=/dev/urandom of="$state/munge.key" bs=128 count=1 status=none; chmod 400 "$state/munge.key"
  cat >"$state/slurm.conf" <<EOF
ClusterName=sideways
SlurmctldHost=ctl($subnet.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$state/munge.socket,cred_expire=5
MpiDefault=pmix
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SwitchType=switch/none
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
InactiveLimit=0
KillWait=5
UnkillableStepTimeout=20
MinJobAge=600
SchedulerParameters=requeue_delay=1,sched_interval=2
JobRequeue=1
StateSaveLocation=$state/ctl
SlurmdSpoolDir=$state/%n
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/%n.pid
SlurmctldLogFile=$state/log/slurmctld.log
SlurmdLogFile=$state/log/%n.log
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
EOF
  for n in $(seq 0 "$last"); do
    echo "NodeName=n$n NodeAddr=$subnet.$((10 + n)) CPUs=$cores RealMemory=2000 State=UNKNOWN" >>"$state/slurm.conf"
  done
  echo "PartitionName=all Nodes=n[0-$last] Default=YES MaxTime=INFINITE State=UP" >>"$state/slurm.conf"
}

up() {
  local nodes=${1:-4}
  check
  if [ -e "$state/owner" ]; then
    [ "$(cat "$state/owner")" = "$home" ] || die "the testbed of $(cat "$state/owner") is up; take that one down first"
    if [ -e "$state/ready" ] && [ "$(hosts | wc -l)" -eq "$nodes" ] && controller sinfo -h >/dev/null 2>&1; then return; fi
    down
  fi
  mkdir -p "$state/log" "$state/ctl"
  echo "$home" >"$state/owner"
  configure "$nodes"
  ip netns add "$switch"
  ip -n "$switch" link add bridge type bridge
  ip -n "$switch" link set bridge up
  ip netns add "$control" && link "$control" 1
  for n in $(seq 0 $((nodes - 1))); do ip netns add "$(host "$n")" && link "$(host "$n")" $((10 + n)); done
  munged --force --key-file="$state/munge.key" --socket="$state/munge.socket" --pid-file="$state/munged.pid" \
    --log-file="$state/log/munged.log" --seed-file="$state/munged.seed" >"$state/log/munged.out" 2>&1
  daemon slurmctld "$control" ctl slurmctld -D -c
  for n in $(seq 0 $((nodes - 1))); do start_host "$n"; done
  for _ in $(seq 100); do
    if [ "$(controller sinfo -h -N -t idle -o %N 2>/dev/null | wc -l)" -eq "$nodes" ]; then touch "$state/ready"; return; fi
    sleep 0.3
  done
  tail -n 3 "$state"/log/* >&2 || true
  die "the nodes did not come up; the logs are in $state/log"
}

# controller CMD…: runs a command in the controller's namespaces (its process 1 holds them).
controller() {
  local first
  first=$(pgrep -xf "slurmctld -D -c" | head -1)
  [ -n "$first" ] || die "the testbed is not up"
  nsenter -t "$first" -n -u -m env --chdir="$PWD" SLURM_CONF="$state/slurm.conf" "$@"
}

# Ends all processes of a namespace.
end() {
  local processes
  processes=$(ip netns pids "$1" 2>/dev/null || true)
  [ -z "$processes" ] || kill -9 $processes 2>/dev/null || true
}

down() {
  [ "$(id -u)" -eq 0 ] || die "needs root"
  local all; all=$(ip netns list 2>/dev/null | awk '{print $1}' | grep -E '^swbed-' || true)
  for namespace in $all; do end "$namespace"; done
  [ ! -e "$state/munged.pid" ] || kill "$(cat "$state/munged.pid")" 2>/dev/null || true
  pkill -f "munged --force --key-file=$state/" 2>/dev/null || true
  for namespace in $all; do
    for _ in $(seq 50); do [ -z "$(ip netns pids "$namespace" 2>/dev/null)" ] && break; end "$namespace"; sleep 0.1; done
    ip netns del "$namespace" 2>/dev/null || true
  done
  # A link that was made but not yet moved into its namespace, when `up` was killed.
  for l in $(ip -o link 2>/dev/null | grep -oE 'swbed[0-9]+p?' || true); do ip link del "$l" 2>/dev/null || true; done
  rm -rf "$state"
}

# The kernel's netem delays; where it is missing, delay.py does, and where that cannot, the rate alone is shaped (tbf).
shape() {
  local namespace number ports=()
  fast
  [ "$1" != off ] || return 0
  for namespace in $control $(hosts); do
    tc -n "$namespace" qdisc add dev eth0 root netem delay "$1" ${2:+rate "$2"} 2>/dev/null || break
    ports+=("$namespace")
  done
  [ ${#ports[@]} -eq 0 ] || return 0
  ports=(port1)
  for namespace in $(hosts); do number=${namespace#swbed-n}; ports+=("port$((10 + number))"); done
  if [ -e /dev/net/tun ] && command -v python3 >/dev/null; then
    for namespace in $control $(hosts); do ip netns exec "$namespace" python3 "$home/slurm/testbed/delay.py" plain eth0; done
    setsid -f ip netns exec "$switch" python3 "$home/slurm/testbed/delay.py" wires "$(seconds "$1")" "$(bits "${2:-0}")" \
      "${ports[@]}" </dev/null >"$state/log/delay.out" 2>&1
    for _ in $(seq 50); do grep -q ready "$state/log/delay.out" && return; sleep 0.1; done
    cat "$state/log/delay.out" >&2
    die "the links did not become slow"
  fi
  echo "testbed: this kernel has no netem (CONFIG_NET_SCH_NETEM), and there is no python3 or /dev/net/tun: no latency, only the rate" >&2
  [ -n "${2:-}" ] || return 0
  for namespace in $control $(hosts); do tc -n "$namespace" qdisc add dev eth0 root tbf rate "$2" burst 32kb latency 200ms; done
}

# Links as they were made.
fast() {
  local namespace port
  for namespace in $control $(hosts); do tc -n "$namespace" qdisc del dev eth0 root 2>/dev/null || true; done
  pkill -f "delay.py wires" 2>/dev/null || true
  for port in $(ip -n "$switch" -o link | grep -oE 'port[0-9]+' | sort -u); do
    ip -n "$switch" link set "$port" promisc off master bridge
  done
}

# 10ms, 2us or 0.1s in seconds; 100mbit, 1gbit or 56kbit in bits a second: as tc writes them.
seconds() { echo "$1" | sed -E 's/^([0-9.]+)ms$/\1e-3/; s/^([0-9.]+)us$/\1e-6/; s/^([0-9.]+)s$/\1/'; }
bits() { echo "$1" | sed -E 's/^([0-9.]+)kbit$/\1e3/; s/^([0-9.]+)mbit$/\1e6/; s/^([0-9.]+)gbit$/\1e9/; s/bit$//'; }

case ${1:-} in
  up) up "${2:-4}" ;;
  down) down ;;
  run) shift; controller "$@" ;;
  status) controller sinfo -N -l ;;
  shape) [ $# -ge 2 ] || die "shape DELAY [RATE], or shape off"; shape "$2" "${3:-}" ;;
  kill-node) end "$(host "$2")" ;;
  cut-link) ip -n "$switch" link set "port$((10 + $2))" down ;;
  heal)
    ip -n "$switch" link set "port$((10 + $2))" up
    [ -n "$(ip netns pids "$(host "$2")")" ] || start_host "$2"
    controller scontrol update "nodename=n$2" state=resume 2>/dev/null || true ;;
  _exec) shift 2; enter "$@" ;;
  *) sed -n '2,/^$/p' "$0" | sed -n 's/^# \{0,1\}//p' >&2; exit 2 ;;
esac
