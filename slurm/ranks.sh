# Sourced by the batch scripts here, after site.sh.

# How a rank starts the program: as it is, or from an image.
PROGRAM=("$SIDEWAYS")
if [ -n "${SIDEWAYS_CONTAINER:-}" ]; then
  [ -e "$SIDEWAYS_CONTAINER" ] || { echo "SIDEWAYS_CONTAINER=$SIDEWAYS_CONTAINER: no such image" >&2; return 2; }
  PROGRAM=(apptainer exec --bind "$PWD" ${APPTAINER_OPTIONS:-} "$SIDEWAYS_CONTAINER" sideways)
fi

# Whether apptainer here mounts an image by itself, setuid root; else every rank has a user namespace of its own, and a process
# of the user's (squashfuse) mounts an image file.
apptainer_is_setuid() {
  [ "$(id -u)" -eq 0 ] || [ -u "$(apptainer buildcfg 2>/dev/null | sed -n 's/^LIBEXECDIR=//p')/apptainer/bin/starter-suid" ]
}

prepare_image() {
  [ -n "${SIDEWAYS_CONTAINER:-}" ] && ! apptainer_is_setuid || return 0
  # Open MPI could not read between such namespaces, and would say so on every rank.
  export OMPI_MCA_btl_vader_single_copy_mechanism=${OMPI_MCA_btl_vader_single_copy_mechanism:-none}
  [ -d "$SIDEWAYS_CONTAINER" ] || echo "SIDEWAYS_CONTAINER=$SIDEWAYS_CONTAINER: apptainer is not setuid root here, and signals of Slurm \
(a time limit ahead, preemption) end the process that mounts an image file: the program dies without a checkpoint. Unpack it, \
and name the folder: apptainer build --sandbox FOLDER $SIDEWAYS_CONTAINER" >&2
}

# start_ranks [SRUN OPTIONS] PROGRAM…: one srun of the job's tasks; returns its exit code. Ranks that die of a signal in their
# first ten seconds are started again, twice: Open MPI's MPI_Init was seen to crash now and then under srun (its TCP
# transport meets a message before it is ready; open-mpi/ompi issue 12495 tells of the like).
start_ranks() {
  local attempt begun code
  prepare_image
  # Slurm 22.05 and newer do not pass a job's --cpus-per-task on to its steps by themselves.
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
  for attempt in 1 2 3; do
    begun=$SECONDS
    srun --mpi="$MPI" --kill-on-bad-exit=1 $SRUN_OPTIONS "$@"
    code=$?
    # 255 is apptainer's or srun's own failure.
    [ "$code" -gt 128 ] && [ "$code" -lt 255 ] && [ $((SECONDS - begun)) -lt 10 ] || break
    echo "== $(date -Is) ranks died of a signal as they started (exit code $code, attempt $attempt of 3)" >&2
    sleep 1
  done
  return "$code"
}
