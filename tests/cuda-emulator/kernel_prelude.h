// Compiled in front of every CUDA source: CUDA C++'s built-ins in terms of the host compiler.
#pragma once
#include "kernel_abi.h"
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __shared__ static thread_local
#define __forceinline__ __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
#define __CUDA_ARCH__ 900
#define __CUDACC__ 1
#define __CUDACC_RTC__ 1

#ifndef INFINITY
#define INFINITY __builtin_inff()
#endif
#ifndef NAN
#define NAN __builtin_nanf("")
#endif

namespace sideways_emulator {
inline unsigned lane() { return sideways_emulator_block->linear_thread & 31; }
template <class T> inline unsigned long long to_bits(T value) {
    static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
    unsigned long long bits = 0;
    memcpy(&bits, &value, sizeof value);
    return bits;
}
template <class T> inline T from_bits(unsigned long long bits) {
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
template <class T> inline T shuffle(unsigned mask, T value, int from) {
    const unsigned long long* lanes = sideways_emulator_block->exchange(sideways_emulator_block, mask, to_bits(value));
    return from_bits<T>(lanes[from & 31]);
}
template <class A, class B> inline A bit_cast(B value) {
    static_assert(sizeof(A) == sizeof(B), "");
    A result;
    memcpy(&result, &value, sizeof result);
    return result;
}
template <class T> inline T atomic_update(T* at, T (*f)(T, T), T value) {
    T old = *(volatile T*)at, want;
    do want = f(old, value);
    while (!__atomic_compare_exchange(at, &old, &want, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}
}  // namespace sideways_emulator

#define threadIdx (sideways_emulator_block->thread)
#define blockIdx (sideways_emulator_block->block)
#define blockDim (sideways_emulator_block->block_size)
#define gridDim (sideways_emulator_block->grid_size)
static const int warpSize = 32;

// ---- Vector types ----
#define VECTOR_TYPES(T, name)                                                                                          \
    struct name##1 { T x; };                                                                                           \
    struct __attribute__((aligned(2 * sizeof(T)))) name##2 { T x, y; };                                                \
    struct name##3 { T x, y, z; };                                                                                     \
    struct __attribute__((aligned(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)))) name##4 { T x, y, z, w; };                \
    static inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                                  \
    static inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                          \
    static inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTOR_TYPES(char, char)
VECTOR_TYPES(unsigned char, uchar)
VECTOR_TYPES(short, short)
VECTOR_TYPES(unsigned short, ushort)
VECTOR_TYPES(int, int)
VECTOR_TYPES(unsigned, uint)
VECTOR_TYPES(long long, longlong)
VECTOR_TYPES(unsigned long long, ulonglong)
VECTOR_TYPES(float, float)
VECTOR_TYPES(double, double)
#undef VECTOR_TYPES
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- Synchronisation ----
static inline void __syncthreads() { sideways_emulator_block->barrier(sideways_emulator_block); }
static inline void __syncwarp(unsigned mask = 0xffffffffu) {
    sideways_emulator_block->exchange(sideways_emulator_block, mask, 0);
}
static inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline void __threadfence_block() {}
// In place of the register %globaltimer, in nanoseconds (and a macro of this name); kernels that wait leave the processor to
// others meanwhile.
static inline unsigned long long globaltimer() {
    timespec pause = {0, 50000}, now;
    nanosleep(&pause, nullptr);
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}
static inline void __threadfence_system() { __threadfence(); }
static inline int __syncthreads_count(int predicate) {
    static thread_local int total;  // set up and read between barriers
    __syncthreads();
    total = 0;
    __syncthreads();
    total += predicate != 0;
    __syncthreads();
    return total;
}
static inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) > 0; }
static inline int __syncthreads_and(int predicate) { return __syncthreads_count(!predicate) == 0; }

template <class T> static inline T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
    int lane = (int)sideways_emulator::lane(), start = lane / width * width;
    return sideways_emulator::shuffle(mask, value, start + (from & (width - 1)));
}
template <class T> static inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    int lane = (int)sideways_emulator::lane(), end = lane / width * width + width;
    int from = lane + (int)delta;
    return sideways_emulator::shuffle(mask, value, from < end ? from : lane);
}
template <class T> static inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    int lane = (int)sideways_emulator::lane(), start = lane / width * width;
    int from = lane - (int)delta;
    return sideways_emulator::shuffle(mask, value, from >= start ? from : lane);
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    int lane = (int)sideways_emulator::lane(), end = lane / width * width + width;
    int from = lane ^ bits;
    return sideways_emulator::shuffle(mask, value, from < end ? from : lane);
}
static inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const unsigned long long* lanes = sideways_emulator_block->exchange(sideways_emulator_block, mask, predicate != 0);
    unsigned bits = 0;
    for (int i = 0; i < 32; i++) bits |= (unsigned)(lanes[i] & 1) << i;
    return bits & mask;
}
static inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

// ---- Memory ----
template <class T> static inline T __ldg(const T* at) { return *at; }
template <class T> static inline T __ldcs(const T* at) { return *at; }
template <class T> static inline T __ldcg(const T* at) { return *at; }
template <class T> static inline void __stcs(T* at, T value) { *at = value; }
template <class T> static inline void __stcg(T* at, T value) { *at = value; }

#define ATOMIC_INTEGERS(T)                                                                                             \
    static inline T atomicAdd(T* at, T value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }              \
    static inline T atomicExch(T* at, T value) { return __atomic_exchange_n(at, value, __ATOMIC_RELAXED); }            \
    static inline T atomicMax(T* at, T value) {                                                                        \
        return sideways_emulator::atomic_update<T>(at, [](T a, T b) { return a > b ? a : b; }, value);                 \
    }                                                                                                                  \
    static inline T atomicMin(T* at, T value) {                                                                        \
        return sideways_emulator::atomic_update<T>(at, [](T a, T b) { return a < b ? a : b; }, value);                 \
    }                                                                                                                  \
    static inline T atomicOr(T* at, T value) { return __atomic_fetch_or(at, value, __ATOMIC_RELAXED); }                \
    static inline T atomicAnd(T* at, T value) { return __atomic_fetch_and(at, value, __ATOMIC_RELAXED); }              \
    static inline T atomicCAS(T* at, T expected, T value) {                                                            \
        __atomic_compare_exchange_n(at, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);                  \
        return expected;                                                                                               \
    }
ATOMIC_INTEGERS(int)
ATOMIC_INTEGERS(unsigned)
ATOMIC_INTEGERS(unsigned long long)
#undef ATOMIC_INTEGERS
static inline int atomicSub(int* at, int value) { return __atomic_fetch_sub(at, value, __ATOMIC_RELAXED); }
static inline float atomicAdd(float* at, float value) {
    return sideways_emulator::atomic_update<float>(at, [](float a, float b) { return a + b; }, value);
}
static inline double atomicAdd(double* at, double value) {
    return sideways_emulator::atomic_update<double>(at, [](double a, double b) { return a + b; }, value);
}

// ---- Arithmetic ----
template <class A, class B> static inline std::common_type_t<A, B> min(A a, B b) {
    if constexpr (std::is_floating_point_v<std::common_type_t<A, B>>) return fmin(a, b);
    else return (std::common_type_t<A, B>)a < (std::common_type_t<A, B>)b ? a : b;
}
template <class A, class B> static inline std::common_type_t<A, B> max(A a, B b) {
    if constexpr (std::is_floating_point_v<std::common_type_t<A, B>>) return fmax(a, b);
    else return (std::common_type_t<A, B>)a > (std::common_type_t<A, B>)b ? a : b;
}
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline double rsqrt(double x) { return 1.0 / sqrt(x); }
static inline float rsqrt(float x) { return rsqrtf(x); }
#define __expf expf  // the C library reserves these names
#define __logf logf
#define __log2f log2f
#define __powf powf
#define __sinf sinf
#define __cosf cosf
#define __tanhf tanhf
static inline float __fdividef(float x, float y) { return x / y; }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
static inline float __fadd_rn(float x, float y) { return x + y; }
static inline float __fsub_rn(float x, float y) { return x - y; }
static inline float __fmul_rn(float x, float y) { return x * y; }
static inline float __fdiv_rn(float x, float y) { return x / y; }
static inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
static inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
static inline float fdividef(float x, float y) { return x / y; }
static inline float normcdff(float x) { return 0.5f * erfcf(-x * 0.70710678118654752f); }
static inline unsigned __float_as_uint(float x) { return sideways_emulator::bit_cast<unsigned>(x); }
static inline int __float_as_int(float x) { return sideways_emulator::bit_cast<int>(x); }
static inline float __uint_as_float(unsigned x) { return sideways_emulator::bit_cast<float>(x); }
static inline float __int_as_float(int x) { return sideways_emulator::bit_cast<float>(x); }
static inline float __int2float_rn(int x) { return (float)x; }
static inline float __uint2float_rn(unsigned x) { return (float)x; }
static inline int __float2int_rn(float x) { return (int)rintf(x); }
static inline int __float2int_rd(float x) { return (int)floorf(x); }
static inline int __float2int_rz(float x) { return (int)x; }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline int __ffs(int x) { return __builtin_ffs(x); }

// ---- How the driver runs a kernel ----
namespace sideways_emulator {
template <auto F> struct Kernel;
template <class... A, void (*F)(A...)> struct Kernel<F> {
    static constexpr unsigned sizes[] = {(unsigned)sizeof(A)..., 0};
    static constexpr bool pointers[] = {std::is_pointer_v<A>..., false};
    template <size_t... I> static void loop(Block* block, void** arguments, std::index_sequence<I...>) {
        while (next_thread(block)) F(*(std::remove_cv_t<A>*)arguments[I]...);
    }
    static void run(Block* block, void** arguments) { loop(block, arguments, std::index_sequence_for<A...>{}); }
    static constexpr KernelEntry entry(const char* name, unsigned max_threads) {
        return {name, run, sizes, pointers, (unsigned)sizeof...(A), max_threads};
    }
};
}  // namespace sideways_emulator
