// Between the emulated driver and the objects that the emulated NVRTC compiles. Included by both.
#pragma once

namespace sideways_emulator {

struct Index {
    unsigned x, y, z;
};

// One block as its threads see it. There is one for each stream thread; the driver switches the threads of a block.
struct Block {
    Index thread, block, block_size, grid_size;
    unsigned linear_thread;  // within the block
    char* dynamic_shared;
    // The calling thread waits for all threads of the block.
    void (*barrier)(Block*);
    // The calling thread waits for the threads of its warp in `mask`. Each hands in `value` and gets the values of all
    // 32 lanes (0 for those not in the mask), valid until its next exchange.
    const unsigned long long* (*exchange)(Block*, unsigned mask, unsigned long long value);
};

// Runs threads of the block, one after the other, until none is left: `next` moves on to the next thread.
struct Runner {
    Block* block;
    bool (*next)(Runner*);
};

struct KernelEntry {
    const char* name;
    void (*run)(Runner*, void** arguments);
    const unsigned* argument_sizes;  // ends with 0
    unsigned arguments;
    unsigned max_threads;  // __launch_bounds__, or 0
};

}  // namespace sideways_emulator

// The block that this OS thread runs, in libcuda's static thread-local space. (Objects of kernels cannot have such a
// variable themselves: then their shared memory, which is thread-local too, would have to find static space as well.)
extern "C" __attribute__((visibility("default"))) __thread sideways_emulator::Block* sideways_emulator_block
    __attribute__((tls_model("initial-exec")));
