//! Moving messages between modules: one contract, in-process and MPI behind it.
