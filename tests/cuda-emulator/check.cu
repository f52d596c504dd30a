// Kernels of the emulator's own tests.
#define KERNELS(T, name) \
extern "C" __global__ void __launch_bounds__(1024) scale_##name(T *__restrict__ y, const T *__restrict__ x, float a, int n) { \
    int i = blockIdx.x * blockDim.x + threadIdx.x; \
    if (i < n) y[i] = (T)(a * (float)x[i]); \
}
KERNELS(float, f32)
KERNELS(double, f64)

__device__ __forceinline__ float warp_sum(float v) {
    for (int d = 16; d > 0; d >>= 1) v += __shfl_down_sync(0xffffffffu, v, d);
    return v;
}

extern "C" __global__ void block_sum(const float *x, float *out, int n) {
    __shared__ float parts[32];
    float v = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += __ldg(x + i);
    v = warp_sum(v);
    if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = v;
    __syncthreads();
    if (threadIdx.x < 32) {
        v = threadIdx.x < (blockDim.x + 31) / 32 ? parts[threadIdx.x] : 0.0f;
        v = warp_sum(v);
        if (threadIdx.x == 0) out[blockIdx.x] = v;
    }
}

extern "C" {
__global__ void reverse(float *x) {
    extern __shared__ float tile[];
    tile[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
    __syncthreads();
    x[blockIdx.x * blockDim.x + threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

__global__ void add_one(float *x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] += 1.0f;
}

// The lower half of a warp sums alone before the whole warp does.
__global__ void halves(float *out) {
    float v = threadIdx.x;
    if (threadIdx.x < 16)
        for (int d = 8; d > 0; d >>= 1) v += __shfl_xor_sync(0x0000ffffu, v, d);
    out[threadIdx.x] = __shfl_sync(0xffffffffu, v, 31 - threadIdx.x);
}

__global__ void hang(float *out) {
    if (threadIdx.x == 0) __syncwarp(0x3);
    else __syncthreads();
    out[0] = 1.0f;
}

__global__ void write_at(float *x, int at) { x[at] = 1.0f; }
}
