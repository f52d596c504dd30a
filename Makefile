# `make demo` and `make test` set a fresh Debian 12 machine with Rust up and do the work.

PACKAGES := openmpi-bin libopenmpi-dev libhdf5-dev libclang-dev clang g++ libdnnl-dev pkg-config ffmpeg hdf5-tools
# A Slurm cluster on this one machine, for tests and for `make cluster-demo`; needs root.
SLURM_PACKAGES := slurmctld slurmd slurm-client munge iproute2 procps python3
CARGO ?= cargo
# One profile for the program, its tests and clippy, so that dependencies are built once.
PROFILE := --release --locked
# Open MPI on more ranks than cores, and as root (containers).
export OMPI_MCA_rmaps_base_oversubscribe := 1
export OMPI_MCA_mpi_yield_when_idle := 1
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1

.PHONY: help deps slurm-deps build demo cluster-demo cluster-recipes test test-cuda lint doc bench-pytorch test-torch bench-data gpu-bundle bench-gpu fuzz drills test-mpich clean

help: ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

deps: ## install the missing system packages (with apt where it may, else says which)
	@.ci/install-packages $(PACKAGES)

slurm-deps:
	@.ci/install-packages $(SLURM_PACKAGES) || echo "Without them nothing runs on a Slurm testbed here: its test is skipped, and fails with CI=true." >&2

build: deps ## the program, target/release/sideways
	$(CARGO) build $(PROFILE)

demo: build ## train on a motion dataset under mpirun, without skips, with them, and with stash, and compare
	datasets/motion/demo.sh

cluster-demo: build slurm-deps ## the same on a Slurm cluster of five hosts made of this machine (root)
	slurm/testbed/demo.sh

cluster-recipes: build slurm-deps ## Kinetics-600's and UCF101's guides with made-up videos on such a cluster: shards, pretraining, fine-tuning, a score (root)
	slurm/testbed/kinetics.sh

# A Python environment for the comparison alone. TORCH says what pip installs (a wheel for the CPU alone is enough: for
# instance TORCH="torch --index-url URL").
VENV := target/venv-pytorch
TORCH ?= torch
$(VENV)/ready:
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install -q $(TORCH) numpy
	touch $@

bench-pytorch: build $(VENV)/ready ## frames/s and memory beside PyTorch's back-propagation (some 15 minutes; docs/performance.md)
	$(VENV)/bin/python benches/pytorch/compare.py $(BENCH_ARGS)

VENV_TORCH := target/venv-torch
$(VENV_TORCH)/ready:
	python3 -m venv $(VENV_TORCH)
	$(VENV_TORCH)/bin/pip install -q $(TORCH) torchvision
	$(VENV_TORCH)/bin/pip install -q safetensors h5py numpy pillow
	touch $@

test-torch: build $(VENV_TORCH)/ready ## exported networks in PyTorch beside eval and predict, and torchvision's weights here (a minute; docs/torch.md)
	$(VENV_TORCH)/bin/python tests/reference/torch_export.py $(TORCH_ARGS)

VENV_DATA := target/venv-data
$(VENV_DATA)/ready:
	python3 -m venv $(VENV_DATA)
	$(VENV_DATA)/bin/pip install -q h5py pillow numpy
	touch $@

bench-data: build $(VENV_DATA)/ready ## frames/s from shards beside h5py with Pillow, and ffmpeg (a minute; docs/performance.md)
	$(VENV_DATA)/bin/python benches/data/compare.py $(BENCH_ARGS)

gpu-bundle: deps ## target/gpu/bundle.tar.xz: all that the next two need on a machine with a GPU, without CUDA's libraries
	CARGO="$(CARGO)" benches/gpu/bundle.sh

test-gpu: gpu-bundle ## the tests of the GPU path on the GPU here (SIDEWAYS_GPU=emulator: rehearsed without one); one table
	benches/gpu/run.sh test

bench-gpu: gpu-bundle ## its benchmarks, and PyTorch on the same GPU where it is installed; one table (docs/performance.md)
	benches/gpu/run.sh bench

lint: deps ## formatting and clippy, without CUDA and with it
	$(CARGO) fmt --check
	$(CARGO) clippy $(PROFILE) --all-targets -- -D warnings
	$(CARGO) clippy $(PROFILE) --all-targets --features cuda -- -D warnings

doc: deps ## the library's documentation, target/doc
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc $(PROFILE) --no-deps

# All programs of tests but the cluster's, which waits most of its minutes for hosts' time-outs, and CUDA's.
TESTS := $(filter-out cluster cuda,$(patsubst tests/%.rs,%,$(wildcard tests/*.rs)) $(patsubst tests/%/main.rs,%,$(wildcard tests/*/main.rs)))

# Its hosts keep this copy while CUDA's tests are built.
CLUSTER_PROGRAM := $(CURDIR)/target/cluster-program

test: build slurm-deps lint doc ## everything that continuous integration checks
	$(CARGO) test $(PROFILE) --no-run
	cp target/release/sideways $(CLUSTER_PROGRAM)
	SIDEWAYS_TEST_PROGRAM=$(CLUSTER_PROGRAM) $(CARGO) test $(PROFILE) --test cluster & beside=$$!; \
	$(CARGO) test $(PROFILE) --lib --bins $(TESTS:%=--test %) -- --test-threads=2 && $(CARGO) test $(PROFILE) --doc && $(MAKE) test-cuda; others=$$?; \
	wait $$beside && exit $$others

fuzz: build ## ten minutes of each kind of mutated input (tests/fuzz; seconds of each are part of `make test`)
	SIDEWAYS_FUZZ_SECONDS=600 $(CARGO) test $(PROFILE) --test fuzz -- --test-threads=1 --nocapture

# CUDA's libraries as an emulator for the CPU; needs a C++ compiler alone.
EMULATOR := $(CURDIR)/target/cuda-emulator

test-cuda: deps ## modules on GPUs, on an emulator of CUDA's libraries (tests/cuda-emulator)
	tests/cuda-emulator/build.sh $(EMULATOR)
	LD_LIBRARY_PATH=$(EMULATOR):$$LD_LIBRARY_PATH $(CARGO) test $(PROFILE) --features cuda --test cuda --test cuda_emulator -- --test-threads=2

# Debian's MPICH lies beside Open MPI; the build is one of its own.
MPICH := MPICC=mpicc.mpich SIDEWAYS_MPIRUN=mpiexec.mpich CARGO_TARGET_DIR=target/mpich

test-mpich: deps ## the tests on ranks with MPICH in place of Open MPI (a build of its own)
	@.ci/install-packages mpich libmpich-dev
	$(MPICH) $(CARGO) test $(PROFILE) --test transport -- --test-threads=2
	$(MPICH) $(CARGO) test $(PROFILE) --test trainer -- --test-threads=2 ranks::

# Whether a program of tests has such tests: cargo takes a name that none has for success.
drill = $(CARGO) test $(PROFILE) --test $(1) -- --list $(2) | grep ': test$$'

drills: build slurm-deps ## the long drills: 50 kills of a rank, 50 while checkpoints are written, time limits (some 15 minutes; docs/slurm.md)
	$(call drill,trainer,faults::a_kill) && FAULTS=50 $(CARGO) test $(PROFILE) --test trainer faults::a_kill -- --nocapture --test-threads=1
	$(call drill,cluster,--ignored) && $(CARGO) test $(PROFILE) --test cluster -- --nocapture --ignored

clean: ## remove what was built and made here
	$(CARGO) clean
	rm -rf data runs studies
