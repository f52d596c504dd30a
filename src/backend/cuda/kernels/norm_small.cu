// Norms as in norm.cu, in one launch, where a block's share of the rows fits into its registers: a block takes `lanes` packs
// of channels, which hold whole groups, of one sample, and reads each element once.
#define KEPT 8

// Each thread's rows: number, `row` and whether there is one.
#define ROWS for (int j = 0; j < KEPT; j++)
#define ROW (threadIdx.x / lanes + j * (BLOCK / lanes))

// A place in `s` [2][PACK][BLOCK] for channel `j` of the block, after `fold`.
static __device__ __forceinline__ unsigned place(unsigned j) { return j % PACK * BLOCK + j / PACK; }

extern "C" __global__ void __launch_bounds__(BLOCK, 3)
norm_small(const real *x, const float *weight, const float *bias, real *y, float *statistics,
                                      float *running_mean, float *running_variance, unsigned rows, unsigned c, int lanes,
                                      unsigned of_group, float epsilon, float momentum, int relu) {
    __shared__ float s[2 * PACK * BLOCK];
    __shared__ float found[2 * 32 * PACK];
    unsigned first = blockIdx.x * lanes * PACK, mine = threadIdx.x % lanes * PACK, ch = first + mine;
    unsigned width = lanes * PACK < c - first ? lanes * PACK : c - first, groups = c / of_group;
    count sample = (count)blockIdx.y * rows * c;
    pack kept[KEPT];
    float sums[2 * PACK], centre[PACK], scale[PACK], shift[PACK], before[2] = {0.0f, 0.0f};
    for (int k = 0; k < PACK; k++) sums[k] = sums[PACK + k] = 0.0f;
    // Everything that is read is asked for before anything is waited for.
    unsigned group = first / of_group + threadIdx.x;
    bool leads = threadIdx.x * of_group < width;
    if (leads && running_mean) {
        before[0] = running_mean[group];
        before[1] = running_variance[group];
    }
    if (ch < c) {
        for (int k = 0; k < PACK; k++) centre[k] = load(x[sample + (ch + k) / of_group * of_group]);
        ROWS if (ROW < rows) kept[j] = *(const pack *)(x + sample + (count)ROW * c + ch);
        for (int k = 0; k < PACK; k++) {
            scale[k] = weight[ch + k];
            shift[k] = bias[ch + k];
        }
        ROWS if (ROW < rows) {
            for (int k = 0; k < PACK; k++) {
                float d = load(kept[j].v[k]) - centre[k];
                sums[k] += d;
                sums[PACK + k] += d * d;
            }
        }
    }
    fold(sums, s, lanes);
    if (leads) {
        float sum = 0.0f, square = 0.0f;
        for (unsigned j = threadIdx.x * of_group; j < (threadIdx.x + 1) * of_group; j++) {
            sum += s[place(j)];
            square += s[PACK * BLOCK + place(j)];
        }
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
            running_mean[group] = (1.0f - momentum) * before[0] + momentum * mean;
            running_variance[group] = (1.0f - momentum) * before[1] + momentum * (n / (n - 1.0f)) * variance;
        }
    }
    __syncthreads();
    if (ch >= c) return;
    float v[PACK];
    for (int k = 0; k < PACK; k++) {
        const float *of = found + (mine + k) / of_group * 2;
        scale[k] *= of[1];
        shift[k] -= of[0] * scale[k];
    }
    ROWS if (ROW < rows) {
        for (int k = 0; k < PACK; k++) {
            v[k] = load(kept[j].v[k]) * scale[k] + shift[k];
            if (relu && v[k] < 0.0f) v[k] = 0.0f;
        }
        put(y + sample + (count)ROW * c + ch, PACK, v);
    }
}

// The input's cotangent where wanted; the parameters' gradients where there is one sample, else sums[sample][2][c] for them, as
// norm_vjp_coefficients has them.
extern "C" __global__ void __launch_bounds__(BLOCK, 2)
norm_vjp_small(const real *x, const real *gy, const float *weight, const float *bias, const float *statistics, float *sums,
               float *gweight, float *gbias, real *gx, unsigned rows, unsigned c, int lanes, unsigned of_group, int relu,
               int constant) {
    __shared__ float s[2 * PACK * BLOCK];
    __shared__ float found[2 * 32 * PACK];
    unsigned first = blockIdx.x * lanes * PACK, mine = threadIdx.x % lanes * PACK, ch = first + mine;
    unsigned width = lanes * PACK < c - first ? lanes * PACK : c - first;
    count sample = (count)blockIdx.y * rows * c;
    const float *of_sample = statistics + (count)blockIdx.y * (c / of_group) * 2;
    pack kept[KEPT], cotangent[KEPT];
    float both[2 * PACK], mean[PACK], scale[PACK], shift[PACK];
    for (int k = 0; k < PACK; k++) both[k] = both[PACK + k] = 0.0f;
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
                both[k] += g;
                both[PACK + k] += g * (v - mean[k]);
            }
        }
    }
    fold(both, s, lanes);
    if (threadIdx.x < width) {
        unsigned own = first + threadIdx.x;
        float plain = s[place(threadIdx.x)];
        float times = s[PACK * BLOCK + place(threadIdx.x)] * of_sample[own / of_group * 2 + 1];
        if (gridDim.y == 1) {
            gweight[own] += times;
            gbias[own] += plain;
        } else {
            float *to = sums + (count)blockIdx.y * 2 * c + own;
            to[0] = plain;
            to[c] = times;
        }
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
