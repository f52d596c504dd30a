// Norms as in norm.cu, in one launch, where a block's share of the rows fits into its registers: a block takes `lanes` packs
// of channels, which hold whole groups, of one sample, and reads each element once.
#define KEPT 8

// Each thread's rows: number, `row` and whether there is one.
#define ROWS for (int j = 0; j < KEPT; j++)
#define ROW (threadIdx.x / lanes + j * (BLOCK / lanes))

// A place in `s` [2][PACK][BLOCK] for channel `j` of the block, after `fold`.
static __device__ __forceinline__ unsigned place(unsigned j) { return j % PACK * BLOCK + j / PACK; }

extern "C" __global__ void norm_small(const real *x, const float *weight, const float *bias, real *y, float *statistics,
                                      float *running_mean, float *running_variance, unsigned rows, unsigned c, int lanes,
                                      unsigned of_group, float epsilon, float momentum, int relu) {
    __shared__ float s[2 * PACK * BLOCK];
    __shared__ float found[2 * 32 * PACK];
    unsigned first = blockIdx.x * lanes * PACK, mine = threadIdx.x % lanes * PACK, ch = first + mine;
    unsigned width = lanes * PACK < c - first ? lanes * PACK : c - first, groups = c / of_group;
    count sample = (count)blockIdx.y * rows * c;
    pack kept[KEPT];
    float plain[PACK], squares[PACK], centre[PACK];
    for (int k = 0; k < PACK; k++) plain[k] = squares[k] = 0.0f;
    if (ch < c) {
        for (int k = 0; k < PACK; k++) centre[k] = load(x[sample + (ch + k) / of_group * of_group]);
        ROWS if (ROW < rows) kept[j] = *(const pack *)(x + sample + (count)ROW * c + ch);
        ROWS if (ROW < rows) {
            for (int k = 0; k < PACK; k++) {
                float d = load(kept[j].v[k]) - centre[k];
                plain[k] += d;
                squares[k] += d * d;
            }
        }
    }
    for (int k = 0; k < PACK; k++) {
        s[k * BLOCK + threadIdx.x] = plain[k];
        s[(PACK + k) * BLOCK + threadIdx.x] = squares[k];
    }
    fold(s, lanes, 2 * PACK);
    if (threadIdx.x * of_group < width) {
        float sum = 0.0f, square = 0.0f;
        for (unsigned j = threadIdx.x * of_group; j < (threadIdx.x + 1) * of_group; j++) {
            sum += s[place(j)];
            square += s[PACK * BLOCK + place(j)];
        }
        unsigned group = first / of_group + threadIdx.x;
        float n = (float)rows * (float)of_group;
        float shift = sum / n, variance = square / n - shift * shift, mean = load(x[sample + group * of_group]) + shift;
        variance = variance < 0.0f ? 0.0f : variance;
        float inverse = 1.0f / sqrtf(variance + epsilon);
        found[2 * threadIdx.x] = mean;
        found[2 * threadIdx.x + 1] = inverse;
        float *to = statistics + ((count)blockIdx.y * groups + group) * 2;
        to[0] = mean;
        to[1] = inverse;
        if (running_mean) {
            running_mean[group] = (1.0f - momentum) * running_mean[group] + momentum * mean;
            running_variance[group] = (1.0f - momentum) * running_variance[group] + momentum * (n / (n - 1.0f)) * variance;
        }
    }
    __syncthreads();
    if (ch >= c) return;
    float scale[PACK], shift[PACK], v[PACK];
    for (int k = 0; k < PACK; k++) {
        const float *of = found + (mine + k) / of_group * 2;
        scale[k] = weight[ch + k] * of[1];
        shift[k] = bias[ch + k] - of[0] * scale[k];
    }
    ROWS if (ROW < rows) {
        for (int k = 0; k < PACK; k++) {
            v[k] = load(kept[j].v[k]) * scale[k] + shift[k];
            if (relu && v[k] < 0.0f) v[k] = 0.0f;
        }
        put(y + sample + (count)ROW * c + ch, PACK, v);
    }
}

// sums[sample][2][c] as norm_vjp_coefficients has them, for the parameters' gradients, and the input's cotangent where wanted.
extern "C" __global__ void __launch_bounds__(BLOCK, 2)
norm_vjp_small(const real *x, const real *gy, const float *weight, const float *bias, const float *statistics, float *sums,
               real *gx, unsigned rows, unsigned c, int lanes, unsigned of_group, int relu, int constant) {
    __shared__ float s[2 * PACK * BLOCK];
    __shared__ float found[2 * 32 * PACK];
    unsigned first = blockIdx.x * lanes * PACK, mine = threadIdx.x % lanes * PACK, ch = first + mine;
    unsigned width = lanes * PACK < c - first ? lanes * PACK : c - first;
    count sample = (count)blockIdx.y * rows * c;
    const float *of_sample = statistics + (count)blockIdx.y * (c / of_group) * 2;
    pack kept[KEPT], cotangent[KEPT];
    float plain[PACK], times[PACK], mean[PACK], scale[PACK], shift[PACK];
    for (int k = 0; k < PACK; k++) plain[k] = times[k] = 0.0f;
    if (ch < c) {
        ROWS if (ROW < rows) {
            kept[j] = *(const pack *)(x + sample + (count)ROW * c + ch);
            cotangent[j] = *(const pack *)(gy + sample + (count)ROW * c + ch);
        }
        for (int k = 0; k < PACK; k++) {
            const float *of = of_sample + (ch + k) / of_group * 2;
            mean[k] = of[0];
            scale[k] = weight[ch + k] * of[1];
            shift[k] = bias[ch + k] - of[0] * scale[k];
        }
        ROWS if (ROW < rows) {
            for (int k = 0; k < PACK; k++) {
                float v = load(kept[j].v[k]);
                if (relu && !(v * scale[k] + shift[k] > 0.0f)) cotangent[j].v[k] = store(0.0f);
                float g = load(cotangent[j].v[k]);
                plain[k] += g;
                times[k] += g * (v - mean[k]);
            }
        }
    }
    for (int k = 0; k < PACK; k++) {
        s[k * BLOCK + threadIdx.x] = plain[k];
        s[(PACK + k) * BLOCK + threadIdx.x] = times[k];
    }
    fold(s, lanes, 2 * PACK);
    if (threadIdx.x < width) {
        float *to = sums + (count)blockIdx.y * 2 * c + first + threadIdx.x;
        to[0] = s[place(threadIdx.x)];
        to[c] = s[PACK * BLOCK + place(threadIdx.x)] * of_sample[(first + threadIdx.x) / of_group * 2 + 1];
    }
    if (!gx) return;
    if (threadIdx.x * of_group < width) {
        float m1 = 0.0f, m2 = 0.0f;
        for (unsigned j = threadIdx.x * of_group; j < (threadIdx.x + 1) * of_group; j++) {
            m1 += weight[first + j] * s[place(j)];
            m2 += weight[first + j] * s[PACK * BLOCK + place(j)];
        }
        float n = (float)rows * (float)of_group;
        found[2 * threadIdx.x] = constant ? 0.0f : m1 / n;
        found[2 * threadIdx.x + 1] = constant ? 0.0f : m2 / n * of_sample[(first / of_group + threadIdx.x) * 2 + 1];
    }
    __syncthreads();
    if (ch >= c) return;
    float of_x[PACK], rest[PACK], v[PACK];
    for (int k = 0; k < PACK; k++) {
        // Read again: between the barriers there are no registers to spare.
        const float *of = found + (mine + k) / of_group * 2, *stat = of_sample + (ch + k) / of_group * 2;
        scale[k] = weight[ch + k] * stat[1];
        of_x[k] = -stat[1] * stat[1] * of[1];
        rest[k] = stat[1] * (stat[1] * of[1] * stat[0] - of[0]);
    }
    ROWS if (ROW < rows) {
        for (int k = 0; k < PACK; k++) v[k] = scale[k] * load(cotangent[j].v[k]) + of_x[k] * load(kept[j].v[k]) + rest[k];
        put(gx + sample + (count)ROW * c + ch, PACK, v);
    }
}
