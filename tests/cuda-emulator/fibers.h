// Cooperative threads for the threads of a block.
#pragma once
#include <cstddef>

struct Fiber {
    void* stack = nullptr;
    void* context = nullptr;  // saved stack pointer, or a ucontext_t
};
const size_t fiber_stack = 64 << 10;
void fiber_start(Fiber& fiber, void (*entry)(void*), void* argument);  // entry must never return
void fiber_switch(Fiber& from, Fiber& to);
