// Group norm of [samples, rows, c]; batch norm is the case of one sample and a group a channel. Sums are per sample, part
// of the rows and channel; a second kernel adds them up and turns them into coefficients of channels, a third applies these.

// Per (sample, part): sums over rows of x - centre, then of its square, [2][c]. The centre is a group's first value, which
// is near enough to the mean to lose nothing where the difference of two large sums would.
extern "C" __global__ void norm_sums(const real *x, float *parts, unsigned rows, unsigned c, int w, int lanes,
                                     unsigned rows_of_part, unsigned of_group) {
    __shared__ float s[2 * PACK * BLOCK];
    unsigned ch = (blockIdx.x * lanes + threadIdx.x % lanes) * w;
    unsigned row = blockIdx.y * rows_of_part, end = row + rows_of_part < rows ? row + rows_of_part : rows;
    const real *sample = x + (count)blockIdx.z * rows * c;
    float sums[2 * PACK], centre[PACK];
    for (int k = 0; k < PACK; k++) sums[k] = sums[PACK + k] = centre[k] = 0.0f;
    if (ch < c) {
        LANES centre[k] = load(sample[(ch + k) / of_group * of_group]);
        BATCHES {
            pack p[4];
            BATCH p[j] = fetch(sample + (count)ROW_OF_BATCH * c + ch, w);
            BATCH for (int k = 0; k < PACK; k++) {
                float d = load(p[j].v[k]) - centre[k];
                sums[k] += d;
                sums[PACK + k] += d * d;
            }
        }
    }
    fold(sums, s, lanes);
    if ((int)threadIdx.x < lanes && ch < c) {
        float *to = parts + ((count)blockIdx.z * gridDim.y + blockIdx.y) * 2 * c + ch;
        LANES {
            to[k] = s[k * BLOCK + threadIdx.x];
            to[c + k] = s[(PACK + k) * BLOCK + threadIdx.x];
        }
    }
}

// Statistics (mean, inverse deviation) of groups, coefficients (scale, shift) of channels [samples][2][c], and, where
// there are any, running statistics. A block takes one group of a sample, or several that have 32 channels together.
extern "C" __global__ void norm_statistics(const real *x, const float *parts, int number, const float *weight,
                                           const float *bias, float *statistics, float *coefficients, float *running_mean,
                                           float *running_variance, unsigned rows, unsigned c, unsigned of_group,
                                           float epsilon, float momentum) {
    __shared__ float s[2 * BLOCK];
    __shared__ float found[64];
    unsigned tx = threadIdx.x % 32, groups = c / of_group, at_once = of_group < 32 ? 32 / of_group : 1;
    unsigned group = blockIdx.x * at_once, first = group * of_group;
    unsigned width = at_once * of_group < c - first ? at_once * of_group : c - first;
    const float *from = parts + (count)blockIdx.y * number * 2 * c + first;
    float plain = 0.0f, squares = 0.0f;
    for (unsigned j = tx; j < width; j += 32) {
        for (int p = threadIdx.x / 32; p < number; p += BLOCK / 32) {
            plain += from[(count)p * 2 * c + j];
            squares += from[((count)p * 2 + 1) * c + j];
        }
    }
    float sums[2] = {plain, squares};
    fold(sums, s, 32);
    unsigned mine = group + threadIdx.x;
    if (threadIdx.x < at_once && mine < groups) {
        unsigned columns = of_group < 32 ? of_group : 32;
        plain = squares = 0.0f;
        for (unsigned j = threadIdx.x * columns; j < (threadIdx.x + 1) * columns; j++) {
            plain += s[j];
            squares += s[BLOCK + j];
        }
        float n = (float)rows * (float)of_group;
        float shift = plain / n, variance = squares / n - shift * shift;
        float mean = load(x[(count)blockIdx.y * rows * c + mine * of_group]) + shift;
        variance = variance < 0.0f ? 0.0f : variance;
        float inverse = 1.0f / sqrtf(variance + epsilon);
        found[2 * threadIdx.x] = mean;
        found[2 * threadIdx.x + 1] = inverse;
        float *to = statistics + ((count)blockIdx.y * groups + mine) * 2;
        to[0] = mean;
        to[1] = inverse;
        if (running_mean) {
            running_mean[mine] = (1.0f - momentum) * running_mean[mine] + momentum * mean;
            running_variance[mine] = (1.0f - momentum) * running_variance[mine] + momentum * (n / (n - 1.0f)) * variance;
        }
    }
    __syncthreads();
    float *to = coefficients + (count)blockIdx.y * 2 * c + first;
    for (unsigned j = threadIdx.x; j < width; j += BLOCK) {
        float scale = weight[first + j] * found[j / of_group * 2 + 1];
        to[j] = scale;
        to[c + j] = bias[first + j] - found[j / of_group * 2] * scale;
    }
}

// The same from running statistics, of one sample with a group a channel.
extern "C" __global__ void norm_running(const float *mean, const float *variance, const float *weight, const float *bias,
                                        float *statistics, float *coefficients, unsigned c, float epsilon) {
    unsigned ch = INDEX;
    if (ch >= c) return;
    float inverse = 1.0f / sqrtf(variance[ch] + epsilon), scale = weight[ch] * inverse;
    statistics[2 * ch] = mean[ch];
    statistics[2 * ch + 1] = inverse;
    coefficients[ch] = scale;
    coefficients[c + ch] = bias[ch] - mean[ch] * scale;
}

extern "C" __global__ void norm_apply(const real *x, const float *coefficients, real *y, unsigned n, unsigned sample,
                                      unsigned c, int w, int relu) {
    unsigned i = INDEX * w;
    if (i >= n) return;
    const float *scale = coefficients + (count)(i / sample) * 2 * c + i % c;
    float v[PACK], a[PACK], b[PACK];
    take(x + i, w, v);
    take_floats(scale, w, a);
    take_floats(scale + c, w, b);
    for (int k = 0; k < PACK; k++) {
        v[k] = v[k] * a[k] + b[k];
        if (relu && v[k] < 0.0f) v[k] = 0.0f;
    }
    put(y + i, w, v);
}

// Per (sample, part): sums over rows of g, then of g (x - mean), [2][c]; g is gy, carried through the relu if there is one.
extern "C" __global__ void __launch_bounds__(BLOCK, 2)
norm_vjp_sums(const real *x, const real *gy, const float *weight, const float *bias, const float *statistics, float *parts,
              unsigned rows, unsigned c, int w, int lanes, unsigned rows_of_part, unsigned of_group, int relu) {
    __shared__ float s[2 * PACK * BLOCK];
    unsigned ch = (blockIdx.x * lanes + threadIdx.x % lanes) * w;
    unsigned row = blockIdx.y * rows_of_part, end = row + rows_of_part < rows ? row + rows_of_part : rows;
    count sample = (count)blockIdx.z * rows * c;
    float sums[2 * PACK], mean[PACK], scale[PACK], shift[PACK];
    for (int k = 0; k < PACK; k++) sums[k] = sums[PACK + k] = mean[k] = scale[k] = shift[k] = 0.0f;
    if (ch < c) {
        const float *of_sample = statistics + (count)blockIdx.z * (c / of_group) * 2;
        LANES {
            const float *found = of_sample + (ch + k) / of_group * 2;
            mean[k] = found[0];
            scale[k] = weight[ch + k] * found[1];
            shift[k] = bias[ch + k] - found[0] * scale[k];
        }
        BATCHES {
            pack p[4], q[4];
            BATCH {
                p[j] = fetch(x + sample + (count)ROW_OF_BATCH * c + ch, w);
                q[j] = fetch(gy + sample + (count)ROW_OF_BATCH * c + ch, w);
            }
            BATCH for (int k = 0; k < PACK; k++) {
                float v = load(p[j].v[k]), g = load(q[j].v[k]);
                if (relu && !(v * scale[k] + shift[k] > 0.0f)) g = 0.0f;
                sums[k] += g;
                sums[PACK + k] += g * (v - mean[k]);
            }
        }
    }
    fold(sums, s, lanes);
    if ((int)threadIdx.x < lanes && ch < c) {
        float *to = parts + ((count)blockIdx.z * gridDim.y + blockIdx.y) * 2 * c + ch;
        LANES {
            to[k] = s[k * BLOCK + threadIdx.x];
            to[c + k] = s[(PACK + k) * BLOCK + threadIdx.x];
        }
    }
}

// The parts added up: sums[samples][2][c] for the gradients of bias and weight, and coefficients[samples][4][c]: the input's
// cotangent is the first times g, plus the second times x, plus the third; the first and the fourth are the forward pass's
// scale and shift. Blocks as in `norm_statistics`. `constant`: no cotangent flows through the statistics.
extern "C" __global__ void norm_vjp_coefficients(const float *parts, int number, const float *weight, const float *bias,
                                                 const float *statistics, float *sums, float *coefficients, unsigned rows,
                                                 unsigned c, unsigned of_group, int constant) {
    __shared__ float s[2 * BLOCK];
    __shared__ float found[64];
    unsigned tx = threadIdx.x % 32, groups = c / of_group, at_once = of_group < 32 ? 32 / of_group : 1;
    unsigned group = blockIdx.x * at_once, first = group * of_group;
    unsigned width = at_once * of_group < c - first ? at_once * of_group : c - first;
    const float *from = parts + (count)blockIdx.y * number * 2 * c + first;
    const float *of_sample = statistics + (count)blockIdx.y * groups * 2;
    float *to = sums + (count)blockIdx.y * 2 * c + first;
    // Of the first 32 threads: weighted sums over their channels.
    float m1 = 0.0f, m2 = 0.0f;
    for (unsigned start = 0; start < width; start += 32) {
        unsigned j = start + tx;
        float plain = 0.0f, times = 0.0f;
        if (j < width) {
            for (int p = threadIdx.x / 32; p < number; p += BLOCK / 32) {
                plain += from[(count)p * 2 * c + j];
                times += from[((count)p * 2 + 1) * c + j];
            }
        }
        float both[2] = {plain, times};
        fold(both, s, 32);
        if (threadIdx.x < 32 && j < width) {
            plain = s[tx];
            times = s[BLOCK + tx] * of_sample[(first + j) / of_group * 2 + 1];
            to[j] = plain;
            to[c + j] = times;
            m1 += weight[first + j] * plain;
            m2 += weight[first + j] * times;
        }
        __syncthreads();
    }
    if (threadIdx.x < 32) {
        s[tx] = m1;
        s[BLOCK + tx] = m2;
    }
    __syncthreads();
    if (threadIdx.x < at_once && group + threadIdx.x < groups) {
        unsigned columns = of_group < 32 ? of_group : 32;
        m1 = m2 = 0.0f;
        for (unsigned j = threadIdx.x * columns; j < (threadIdx.x + 1) * columns; j++) {
            m1 += s[j];
            m2 += s[BLOCK + j];
        }
        float n = (float)rows * (float)of_group;
        found[2 * threadIdx.x] = constant ? 0.0f : m1 / n;
        found[2 * threadIdx.x + 1] = constant ? 0.0f : m2 / n;
    }
    __syncthreads();
    float *k = coefficients + (count)blockIdx.y * 4 * c + first;
    for (unsigned j = threadIdx.x; j < width; j += BLOCK) {
        const float *stat = of_sample + (first + j) / of_group * 2;
        float mean = stat[0], inverse = stat[1], scale = weight[first + j] * inverse;
        float of_plain = found[j / of_group * 2], of_times = found[j / of_group * 2 + 1];
        k[j] = scale;
        k[c + j] = -inverse * inverse * of_times;
        k[2 * c + j] = inverse * (inverse * of_times * mean - of_plain);
        k[3 * c + j] = bias[first + j] - mean * scale;
    }
}

// The input's cotangent by the first `apply` blocks, the parameters' gradients by those behind them.
extern "C" __global__ void norm_vjp_apply(const real *x, const real *gy, const float *coefficients, const float *sums,
                                          real *gx, float *gweight, float *gbias, unsigned n, unsigned sample, unsigned c,
                                          int w, int relu, unsigned apply, int samples) {
    if (blockIdx.x >= apply) {
        unsigned ch = (blockIdx.x - apply) * BLOCK + threadIdx.x;
        if (ch >= c) return;
        float plain = 0.0f, times = 0.0f;
        for (int b = 0; b < samples; b++) {
            plain += sums[(count)b * 2 * c + ch];
            times += sums[((count)b * 2 + 1) * c + ch];
        }
        gweight[ch] += times;
        gbias[ch] += plain;
        return;
    }
    unsigned i = INDEX * w;
    if (i >= n) return;
    const float *k0 = coefficients + (count)(i / sample) * 4 * c + i % c;
    float v[PACK], g[PACK], a[PACK], b[PACK], d[PACK], shift[PACK];
    take(x + i, w, v);
    take(gy + i, w, g);
    take_floats(k0, w, a);
    take_floats(k0 + c, w, b);
    take_floats(k0 + 2 * c, w, d);
    take_floats(k0 + 3 * c, w, shift);
    for (int k = 0; k < PACK; k++) {
        if (relu && !(v[k] * a[k] + shift[k] > 0.0f)) g[k] = 0.0f;
        g[k] = a[k] * g[k] + b[k] * v[k] + d[k];
    }
    put(gx + i, w, g);
}
