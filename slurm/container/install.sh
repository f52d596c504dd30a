#!/bin/sh
# install.sh build|run|cuda: what a stage of the image installs, for the Dockerfile and for sideways.def.
set -eu
export DEBIAN_FRONTEND=noninteractive

packages() {
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "$@"
  apt-get clean
  rm -rf /var/lib/apt/lists/*
}

case ${1:-} in
  build) packages libopenmpi-dev libhdf5-dev libclang-dev clang g++ libdnnl-dev make pkg-config ;;
  # MPI must fit the hosts': Debian 12's Open MPI 4.1 with PMIx here, for `srun --mpi=pmix`.
  run) packages openmpi-bin libhdf5-103-1 libdnnl2 libgomp1 ffmpeg ;;
  # NVRTC and cuDNN into /opt/cuda, with cuBLAS, which cuDNN loads; the driver is the host's.
  cuda)
    packages python3-pip
    pip install -q --no-cache-dir --no-compile --target /opt/cuda 'nvidia-cuda-nvrtc==13.*' 'nvidia-cudnn-cu13==9.*'
    rm -rf /opt/cuda/nvidia/*/include
    ;;
  *)
    echo "usage: install.sh build|run|cuda" >&2
    exit 2
    ;;
esac
