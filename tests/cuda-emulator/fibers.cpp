// Switching between cooperative threads: by hand on x86-64, with ucontext elsewhere.
#include "fibers.h"
#include "emulator.h"
#include <cstring>
#include <sys/mman.h>

static void ensure_stack(Fiber& fiber) {
    if (fiber.stack) return;
    fiber.stack = mmap(nullptr, fiber_stack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fiber.stack == MAP_FAILED) die("no memory for the stack of a kernel's thread");
}

#if defined(__x86_64__)

extern "C" void sideways_switch_stack(void** save, void* to);
asm(R"(
.text
.globl sideways_switch_stack
.hidden sideways_switch_stack
.type sideways_switch_stack,@function
sideways_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.globl sideways_fiber_entry
.hidden sideways_fiber_entry
.type sideways_fiber_entry,@function
sideways_fiber_entry:
    movq %r12, %rdi
    callq *%rbx
    ud2
.section .note.GNU-stack,"",@progbits
.text
)");
extern "C" void sideways_fiber_entry();

void fiber_start(Fiber& fiber, void (*entry)(void*), void* argument) {
    ensure_stack(fiber);
    auto* top = (void**)((char*)fiber.stack + fiber_stack);
    *--top = nullptr;  // keeps the stack aligned as after a call
    *--top = nullptr;
    *--top = (void*)sideways_fiber_entry;
    *--top = nullptr;        // rbp
    *--top = (void*)entry;   // rbx
    *--top = argument;       // r12
    *--top = nullptr;
    *--top = nullptr;
    *--top = nullptr;
    fiber.context = top;
}
void fiber_switch(Fiber& from, Fiber& to) { sideways_switch_stack(&from.context, to.context); }

#else
#include <ucontext.h>

static void trampoline(unsigned a, unsigned b, unsigned c, unsigned d) {
    auto entry = (void (*)(void*))((uint64_t)a << 32 | b);
    entry((void*)((uint64_t)c << 32 | d));
}
static ucontext_t* context_of(Fiber& fiber) {
    if (!fiber.context) fiber.context = new ucontext_t;
    return (ucontext_t*)fiber.context;
}
void fiber_start(Fiber& fiber, void (*entry)(void*), void* argument) {
    ensure_stack(fiber);
    ucontext_t* context = context_of(fiber);
    getcontext(context);
    context->uc_stack.ss_sp = fiber.stack;
    context->uc_stack.ss_size = fiber_stack;
    context->uc_link = nullptr;
    auto e = (uint64_t)entry, a = (uint64_t)argument;
    makecontext(context, (void (*)())trampoline, 4, (unsigned)(e >> 32), (unsigned)e, (unsigned)(a >> 32), (unsigned)a);
}
void fiber_switch(Fiber& from, Fiber& to) { swapcontext(context_of(from), context_of(to)); }
#endif
