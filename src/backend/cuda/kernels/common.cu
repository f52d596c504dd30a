// Activations are `real`; sums are taken in float. bfloat16 is converted by hand, so that no header is needed.
//
// A thread takes `w` neighbouring elements: PACK (16 bytes of activations) where it can, fewer at an array's end, 1 where
// the channels are no multiple of PACK. Loops over them have constant bounds, so that they stay in registers.
typedef unsigned short ushort_t;
#ifdef BF16
typedef ushort_t real;
#define PACK 8
static __device__ __forceinline__ float load(real v) { return __uint_as_float((unsigned)v << 16); }
static __device__ __forceinline__ real store(float v) {
    unsigned bits = __float_as_uint(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (real)((bits >> 16) | 64);
    return (real)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
#else
typedef float real;
#define PACK 4
static __device__ __forceinline__ float load(real v) { return v; }
static __device__ __forceinline__ real store(float v) { return v; }
#endif
typedef unsigned long long count;
#define BLOCK 256
#define INDEX ((count)blockIdx.x * blockDim.x + threadIdx.x)
// Loops over a thread's rows, from `row` to below `end` in steps of a block's: four are fetched together, so that
// reads overlap, before any is used.
#define STEP_OF_ROWS (BLOCK / lanes)
#define BATCHES for (row += threadIdx.x / lanes; row < end; row += 4 * STEP_OF_ROWS)
#define BATCH for (int j = 0; j < 4; j++) if (row + j * STEP_OF_ROWS < end)
#define ROW_OF_BATCH (row + j * STEP_OF_ROWS)
#define LANES for (int k = 0; k < PACK; k++) if (k < w)

struct alignas(16) pack { real v[PACK]; };
struct alignas(16) quad { float v[4]; };
struct alignas(PACK) bytes { unsigned char v[PACK]; };

static __device__ __forceinline__ pack fetch(const real *x, int w) {
    pack p;
    if (w == PACK) {
        p = *(const pack *)x;
    } else {
        for (int k = 0; k < PACK; k++) p.v[k] = k < w ? x[k] : store(0.0f);
    }
    return p;
}

static __device__ __forceinline__ void take(const real *x, int w, float *v) {
    pack p = fetch(x, w);
    for (int k = 0; k < PACK; k++) v[k] = load(p.v[k]);
}

static __device__ __forceinline__ void put(real *y, int w, const float *v) {
    if (w == PACK) {
        pack p;
        for (int k = 0; k < PACK; k++) p.v[k] = store(v[k]);
        *(pack *)y = p;
    } else {
        LANES y[k] = store(v[k]);
    }
}

// As `take`, of floats.
static __device__ __forceinline__ void take_floats(const float *x, int w, float *v) {
    if (w == PACK) {
        for (int q = 0; q < PACK / 4; q++) {
            quad p = ((const quad *)x)[q];
            for (int k = 0; k < 4; k++) v[4 * q + k] = p.v[k];
        }
    } else {
        for (int k = 0; k < PACK; k++) v[k] = k < w ? x[k] : 0.0f;
    }
}

static __device__ __forceinline__ void put_floats(float *y, int w, const float *v) {
    if (w == PACK) {
        for (int q = 0; q < PACK / 4; q++) {
            quad p;
            for (int k = 0; k < 4; k++) p.v[k] = v[4 * q + k];
            ((quad *)y)[q] = p;
        }
    } else {
        LANES y[k] = v[k];
    }
}

static __device__ __forceinline__ bool is_finite(float v) { return (__float_as_uint(v) & 0x7f800000u) != 0x7f800000u; }

// Sums each of `v` over the block's threads that are equal modulo `lanes` (a power of 2, at most 32), in a fixed order: number
// k over threads equal to `lane` is in s[k * BLOCK + lane] afterwards, for all threads to read. Called by every thread.
template <int N> static __device__ __forceinline__ void fold(const float (&v)[N], float *s, int lanes) {
    float sum[N];
    for (int k = 0; k < N; k++) sum[k] = v[k];
    for (int half = 16; half >= lanes; half /= 2) {
        for (int k = 0; k < N; k++) sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], half);
    }
    // Whoever read `s` before is through.
    __syncthreads();
    if ((int)threadIdx.x % 32 < lanes) {
        for (int k = 0; k < N; k++) s[k * BLOCK + threadIdx.x / 32 * lanes + threadIdx.x % 32] = sum[k];
    }
    __syncthreads();
    // The warps' sums; each place is one thread's.
    for (int t = threadIdx.x; t < N * lanes; t += BLOCK) {
        float *first = s + t / lanes * BLOCK + t % lanes, all = first[0];
        for (int warp = 1; warp < BLOCK / 32; warp++) all += first[warp * lanes];
        first[0] = all;
    }
    __syncthreads();
}

// The sum of `v` over a block's threads, for all of them.
static __device__ __forceinline__ float block_sum(float v, float *s) {
    float all[1] = {v};
    fold(all, s, 1);
    return s[0];
}
