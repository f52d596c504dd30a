// Threads take PACK neighbours each; the last one what is left.
#define SOME(n)                \
    count i = INDEX * PACK;    \
    if (i >= n) return;        \
    int w = n - i < PACK ? (int)(n - i) : PACK; \
    float v[PACK]

extern "C" __global__ void relu(const real *x, real *y, count n) {
    SOME(n);
    take(x + i, w, v);
    for (int k = 0; k < PACK; k++) v[k] = v[k] < 0.0f ? 0.0f : v[k];
    put(y + i, w, v);
}

extern "C" __global__ void relu_vjp(const real *y, const real *gy, real *gx, count n) {
    SOME(n);
    float g[PACK];
    take(y + i, w, v);
    take(gy + i, w, g);
    for (int k = 0; k < PACK; k++) g[k] = v[k] > 0.0f ? g[k] : 0.0f;
    put(gx + i, w, g);
}

extern "C" __global__ void add(const real *a, const real *b, real *y, count n, int relu) {
    SOME(n);
    float u[PACK];
    take(a + i, w, v);
    take(b + i, w, u);
    for (int k = 0; k < PACK; k++) {
        v[k] += u[k];
        if (relu && v[k] < 0.0f) v[k] = 0.0f;
    }
    put(y + i, w, v);
}

// sum = (a + b + ...) * scale of the first `terms` arrays, in that order beginning with 0; `sum` may be one of them. A thread takes one
// element: parts of gradients begin anywhere.
extern "C" __global__ void sum_in_order(float *sum, const float *a, const float *b, const float *c, const float *d, const float *e,
                                        const float *f, const float *g, int terms, float scale, count n) {
    count i = INDEX;
    if (i >= n) return;
    const float *all[7] = {a, b, c, d, e, f, g};
    float s = 0.0f;
    for (int k = 0; k < 7; k++) if (k < terms) s += all[k][i];
    sum[i] = s * scale;
}

// Clips of `clip` values each: the weight is a clip's own part, the rest is its partner's.
extern "C" __global__ void mix_clips(const float *x, const int *partners, real *y, count clip, count n, float weight) {
    SOME(n);
    for (int k = 0; k < PACK; k++) {
        count at = k < w ? i + k : i;
        count own = at / clip;
        v[k] = weight * x[at] + (1.0f - weight) * x[at - own * clip + partners[own] * clip];
    }
    put(y + i, w, v);
}

static __device__ __forceinline__ float normal_cdf(float v) { return 0.5f * (1.0f + erff(v * 0.70710678118654752f)); }

extern "C" __global__ void gelu(const real *x, real *y, count n) {
    SOME(n);
    take(x + i, w, v);
    for (int k = 0; k < PACK; k++) v[k] = v[k] * normal_cdf(v[k]);
    put(y + i, w, v);
}

extern "C" __global__ void gelu_vjp(const real *x, const real *gy, real *gx, count n) {
    SOME(n);
    float g[PACK];
    take(x + i, w, v);
    take(gy + i, w, g);
    for (int k = 0; k < PACK; k++) {
        g[k] *= normal_cdf(v[k]) + v[k] * 0.39894228040143268f * expf(-0.5f * v[k] * v[k]);
    }
    put(gx + i, w, g);
}

// SplitMix64 at place `i` of the sequence that starts at `key`, as in kernels/activation.rs.
static __device__ __forceinline__ count mix(count key, count i) {
    count z = key + (i + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

extern "C" __global__ void dropout(const real *x, real *y, count n, const count *key, count threshold, float scale) {
    SOME(n);
    count start = *key;
    take(x + i, w, v);
    for (int k = 0; k < PACK; k++) v[k] = (mix(start, i + k) >> 11) >= threshold ? v[k] * scale : 0.0f;
    put(y + i, w, v);
}

extern "C" __global__ void set_words(count *words, int n, count a, count b, count c, count d) {
    if (INDEX > 0) return;
    count all[4] = {a, b, c, d};
    for (int k = 0; k < 4; k++) {
        if (k < n) words[k] = all[k];
    }
}

extern "C" __global__ void widen(const real *x, float *y, count n) {
    SOME(n);
    take(x + i, w, v);
    put_floats(y + i, w, v);
}

extern "C" __global__ void narrow(const float *x, real *y, count n) {
    SOME(n);
    take_floats(x + i, w, v);
    put(y + i, w, v);
}

extern "C" __global__ void fill(real *x, count n, float value) {
    SOME(n);
    for (int k = 0; k < PACK; k++) v[k] = value;
    put(x + i, w, v);
}

// found[block]: 1 if this block met what is not a finite number, else 0.
extern "C" __global__ void guard_look(const real *x, count n, float *found) {
    __shared__ float s[BLOCK];
    float bad = 0.0f, v[PACK];
    for (count i = INDEX * PACK; i < n; i += (count)gridDim.x * BLOCK * PACK) {
        int w = n - i < PACK ? (int)(n - i) : PACK;
        take(x + i, w, v);
        for (int k = 0; k < PACK; k++) bad = is_finite(v[k]) ? bad : 1.0f;
    }
    bad = block_sum(bad, s);
    if (threadIdx.x == 0) found[blockIdx.x] = bad > 0.0f ? 1.0f : 0.0f;
}

// One block, or with `clear` as many as looked.
extern "C" __global__ void guard_act(real *x, count n, const float *found, int looked, float *flag, int clear) {
    __shared__ float s[BLOCK];
    float bad = 0.0f, zero[PACK];
    for (int j = threadIdx.x; j < looked; j += BLOCK) bad += found[j];
    if (block_sum(bad, s) == 0.0f) return;
    if (blockIdx.x == 0 && threadIdx.x == 0) flag[0] += 1.0f;
    if (!clear) return;
    for (int k = 0; k < PACK; k++) zero[k] = 0.0f;
    for (count i = INDEX * PACK; i < n; i += (count)gridDim.x * BLOCK * PACK) {
        put(x + i, n - i < PACK ? (int)(n - i) : PACK, zero);
    }
}
