// Between the emulated driver and the objects that the emulated NVRTC compiles. Included by both.
#pragma once

namespace sideways_emulator {

struct Index {
    unsigned x, y, z;
};

// One block as its threads see it. There is one for each stream thread; the driver switches the threads of a block.
struct Block {
    Index thread, block, block_size, grid_size;
    unsigned linear_thread;     // within the block
    Index upcoming;             // the thread to start next
    unsigned started, threads;  // of the block
    char* dynamic_shared;
    // The calling thread waits for all threads of the block.
    void (*barrier)(Block*);
    // The calling thread waits for the threads of its warp in `mask`. Each hands in `value` and gets the values of the
    // lanes in the mask, to be read before it waits again.
    const unsigned long long* (*exchange)(Block*, unsigned mask, unsigned long long value);
};

// Makes the next thread of the block that has not started the current one; false if there is none.
inline bool next_thread(Block* block) {
    if (block->started == block->threads) return false;
    block->linear_thread = block->started++;
    Index& next = block->upcoming;
    block->thread = next;
    if (++next.x == block->block_size.x) {
        next.x = 0;
        if (++next.y == block->block_size.y) next.y = 0, next.z++;
    }
    return true;
}

struct KernelEntry {
    const char* name;
    void (*run)(Block*, void** arguments);  // runs threads, one after the other, until none is left to start
    const unsigned* argument_sizes;
    const bool* argument_is_pointer;
    unsigned arguments;
    unsigned max_threads;  // __launch_bounds__, or 0
};

}  // namespace sideways_emulator

// The block that this OS thread runs, in libcuda's static thread-local space. (Objects of kernels cannot have such a
// variable themselves: then their shared memory, which is thread-local too, would have to find static space as well.)
extern "C" __attribute__((visibility("default"))) __thread sideways_emulator::Block* sideways_emulator_block
    __attribute__((tls_model("initial-exec")));
