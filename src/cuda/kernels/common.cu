// Activations are `real`; sums are taken in float. bfloat16 is converted by hand, so that no header is needed.
typedef unsigned short ushort_t;
#ifdef BF16
typedef ushort_t real;
static __device__ __forceinline__ float load(real v) { return __uint_as_float((unsigned)v << 16); }
static __device__ __forceinline__ real store(float v) {
    unsigned bits = __float_as_uint(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (real)((bits >> 16) | 64);
    return (real)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
#else
typedef float real;
static __device__ __forceinline__ float load(real v) { return v; }
static __device__ __forceinline__ real store(float v) { return v; }
#endif
typedef unsigned long long count;
#define INDEX ((count)blockIdx.x * blockDim.x + threadIdx.x)
