# Settings of your site, sourced by every script in this folder. Edit here, nowhere else.

# The program; relative to the folder that you submit from.
SIDEWAYS=${SIDEWAYS:-target/release/sideways}

# Or an image that holds it (a .sif, or the folder of `apptainer build --sandbox`), run by apptainer on every rank; see container/.
# With GPUs: APPTAINER_OPTIONS=--nv
SIDEWAYS_CONTAINER=${SIDEWAYS_CONTAINER:-}
APPTAINER_OPTIONS=${APPTAINER_OPTIONS:-}

# What a batch job needs before the program runs: modules to load, libraries to find. For example
#   module load openmpi hdf5
site_setup() { :; }

# How srun offers MPI to its tasks (see `srun --mpi=list`).
MPI=${MPI:-pmix}

# How often one job may put itself back into the queue after it was stopped with a checkpoint.
MAX_REQUEUES=${MAX_REQUEUES:-100}

# How long to wait, after ranks failed, for Slurm to notice that a node is lost (its SlurmdTimeout and some seconds). Where
# one is, the job goes back into the queue; where none is, the failure is the program's own and the job ends.
NODE_WAIT=${NODE_WAIT:-330}

# More options for every srun, for instance --cpu-bind=cores.
SRUN_OPTIONS=${SRUN_OPTIONS:-}
