# Sourced by the batch scripts here, after site.sh.

# How a rank starts the program: as it is, or from an image.
PROGRAM=("$SIDEWAYS")
if [ -n "${SIDEWAYS_CONTAINER:-}" ]; then
  [ -e "$SIDEWAYS_CONTAINER" ] || { echo "SIDEWAYS_CONTAINER=$SIDEWAYS_CONTAINER: no such image" >&2; return 2; }
  PROGRAM=(apptainer exec --bind "$PWD" ${APPTAINER_OPTIONS:-} "$SIDEWAYS_CONTAINER" sideways)
fi

# start_ranks [SRUN OPTIONS] PROGRAM…: one srun of the job's tasks; returns its exit code. Ranks that die of a signal in their
# first ten seconds are started again, twice: Open MPI's MPI_Init was seen to crash now and then under srun (its TCP
# transport meets a message before it is ready; open-mpi/ompi issue 12495 tells of the like).
start_ranks() {
  local attempt begun code
  # Slurm 22.05 and newer do not pass a job's --cpus-per-task on to its steps by themselves.
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
  for attempt in 1 2 3; do
    begun=$SECONDS
    srun --mpi="$MPI" --kill-on-bad-exit=1 $SRUN_OPTIONS "$@"
    code=$?
    [ "$code" -gt 128 ] && [ $((SECONDS - begun)) -lt 10 ] || break
    echo "== $(date -Is) ranks died of a signal as they started (exit code $code, attempt $attempt of 3)" >&2
    sleep 1
  done
  return "$code"
}
