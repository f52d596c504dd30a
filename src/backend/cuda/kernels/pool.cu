// Pools, up-sampling, and changes to any size. A thread takes `w` channels of one pixel; n counts elements of what is written.

#define PIXEL(height, width)                                                     \
    unsigned i = INDEX * lanes;                                                  \
    if (i >= n) return;                                                          \
    int w = lanes;                                                               \
    unsigned ch = i % c, pixel = i / c;                                          \
    int px = pixel % width, py = pixel / width % height;                         \
    count sample = pixel / ((unsigned)width * (unsigned)height)

// The windows along one axis that hold place `at`: from `lo` to below `hi`.
static __device__ __forceinline__ void windows(int at, int padding, int kernel, int stride, int outputs, int *lo, int *hi) {
    int behind = at + padding - kernel;
    *lo = behind < 0 ? 0 : behind / stride + 1;
    int last = (at + padding) / stride + 1;
    *hi = last < outputs ? last : outputs;
}

extern "C" __global__ void max_pool(const real *x, real *y, unsigned char *winners, unsigned n, unsigned c, int lanes,
                                    int ih, int iw, int oh, int ow, int kh, int kw, int sh, int sw, int ph, int pw) {
    PIXEL(oh, ow);
    float best[PACK], v[PACK];
    int tap[PACK];
    bool first = true;
    for (int k = 0; k < PACK; k++) best[k] = 0.0f, tap[k] = 0;
    for (int ky = 0; ky < kh; ky++) {
        int iy = py * sh + ky - ph;
        if (iy < 0 || iy >= ih) continue;
        for (int kx = 0; kx < kw; kx++) {
            int ix = px * sw + kx - pw;
            if (ix < 0 || ix >= iw) continue;
            take(x + ((sample * ih + iy) * iw + ix) * c + ch, w, v);
            for (int k = 0; k < PACK; k++) {
                bool wins = first || v[k] > best[k] || v[k] != v[k];
                best[k] = wins ? v[k] : best[k];
                tap[k] = wins ? ky * kw + kx : tap[k];
            }
            first = false;
        }
    }
    put(y + i, w, best);
    if (w == PACK) {
        bytes b;
        for (int k = 0; k < PACK; k++) b.v[k] = (unsigned char)tap[k];
        *(bytes *)(winners + i) = b;
    } else {
        LANES winners[i + k] = (unsigned char)tap[k];
    }
}

extern "C" __global__ void max_pool_vjp(const unsigned char *winners, const real *gy, real *gx, unsigned n, unsigned c,
                                        int lanes, int ih, int iw, int oh, int ow, int kh, int kw, int sh, int sw, int ph,
                                        int pw) {
    PIXEL(ih, iw);
    int oy, oy_end, ox_start, ox_end;
    windows(py, ph, kh, sh, oh, &oy, &oy_end);
    windows(px, pw, kw, sw, ow, &ox_start, &ox_end);
    float sum[PACK], g[PACK];
    for (int k = 0; k < PACK; k++) sum[k] = 0.0f;
    for (; oy < oy_end; oy++) {
        for (int ox = ox_start; ox < ox_end; ox++) {
            int tap = (py + ph - oy * sh) * kw + px + pw - ox * sw;
            count at = ((sample * oh + oy) * ow + ox) * c + ch;
            take(gy + at, w, g);
            if (w == PACK) {
                bytes b = *(const bytes *)(winners + at);
                for (int k = 0; k < PACK; k++) sum[k] += b.v[k] == tap ? g[k] : 0.0f;
            } else {
                LANES sum[k] += winners[at + k] == tap ? g[k] : 0.0f;
            }
        }
    }
    put(gx + i, w, sum);
}

// The same where windows cover the input once and leave nothing: a thread takes a window.
extern "C" __global__ void max_pool_vjp_tiles(const unsigned char *winners, const real *gy, real *gx, unsigned n, unsigned c,
                                              int lanes, int ih, int iw, int oh, int ow, int kh, int kw, int sh, int sw,
                                              int ph, int pw) {
    PIXEL(oh, ow);
    float g[PACK], v[PACK];
    int tap[PACK];
    take(gy + i, w, g);
    if (w == PACK) {
        bytes b = *(const bytes *)(winners + i);
        for (int k = 0; k < PACK; k++) tap[k] = b.v[k];
    } else {
        for (int k = 0; k < PACK; k++) tap[k] = k < w ? winners[i + k] : 0;
    }
    real *to = gx + ((sample * ih + py * kh) * iw + px * kw) * c + ch;
    for (int ky = 0; ky < kh; ky++) {
        for (int kx = 0; kx < kw; kx++) {
            for (int k = 0; k < PACK; k++) v[k] = tap[k] == ky * kw + kx ? g[k] : 0.0f;
            put(to + ((count)ky * iw + kx) * c, w, v);
        }
    }
}

extern "C" __global__ void average_pool(const real *x, real *y, unsigned n, unsigned c, int lanes, int ih, int iw, int oh,
                                        int ow, int kh, int kw, int sh, int sw, int ph, int pw, float scale) {
    PIXEL(oh, ow);
    float sum[PACK], v[PACK];
    for (int k = 0; k < PACK; k++) sum[k] = 0.0f;
    for (int ky = 0; ky < kh; ky++) {
        int iy = py * sh + ky - ph;
        if (iy < 0 || iy >= ih) continue;
        for (int kx = 0; kx < kw; kx++) {
            int ix = px * sw + kx - pw;
            if (ix < 0 || ix >= iw) continue;
            take(x + ((sample * ih + iy) * iw + ix) * c + ch, w, v);
            for (int k = 0; k < PACK; k++) sum[k] += v[k];
        }
    }
    for (int k = 0; k < PACK; k++) sum[k] *= scale;
    put(y + i, w, sum);
}

extern "C" __global__ void average_pool_vjp(const real *gy, real *gx, unsigned n, unsigned c, int lanes, int ih, int iw,
                                            int oh, int ow, int kh, int kw, int sh, int sw, int ph, int pw, float scale) {
    PIXEL(ih, iw);
    int oy, oy_end, ox_start, ox_end;
    windows(py, ph, kh, sh, oh, &oy, &oy_end);
    windows(px, pw, kw, sw, ow, &ox_start, &ox_end);
    float sum[PACK], g[PACK];
    for (int k = 0; k < PACK; k++) sum[k] = 0.0f;
    for (; oy < oy_end; oy++) {
        for (int ox = ox_start; ox < ox_end; ox++) {
            take(gy + ((sample * oh + oy) * ow + ox) * c + ch, w, g);
            for (int k = 0; k < PACK; k++) sum[k] += g[k];
        }
    }
    for (int k = 0; k < PACK; k++) sum[k] *= scale;
    put(gx + i, w, sum);
}

// The mean of each sample's rows: a block takes `lanes` threads' channels of one sample.
extern "C" __global__ void global_average(const real *x, real *y, unsigned rows, unsigned c, int w, int lanes, float scale) {
    __shared__ float s[PACK * BLOCK];
    unsigned ch = (blockIdx.x * lanes + threadIdx.x % lanes) * w;
    const real *sample = x + (count)blockIdx.y * rows * c + ch;
    float sum[PACK], v[PACK];
    for (int k = 0; k < PACK; k++) sum[k] = 0.0f;
    if (ch < c) {
        unsigned row = 0, end = rows;
        BATCHES {
            pack p[4];
            BATCH p[j] = fetch(sample + (count)ROW_OF_BATCH * c, w);
            BATCH for (int k = 0; k < PACK; k++) sum[k] += load(p[j].v[k]);
        }
    }
    fold(sum, s, lanes);
    if ((int)threadIdx.x < lanes && ch < c) {
        LANES v[k] = s[k * BLOCK + threadIdx.x] * scale;
        put(y + (count)blockIdx.y * c + ch, w, v);
    }
}

extern "C" __global__ void global_average_vjp(const real *gy, real *gx, unsigned n, unsigned sample, unsigned c, int w,
                                              float scale) {
    unsigned i = INDEX * w;
    if (i >= n) return;
    float g[PACK];
    take(gy + (count)(i / sample) * c + i % c, w, g);
    for (int k = 0; k < PACK; k++) g[k] *= scale;
    put(gx + i, w, g);
}

extern "C" __global__ void upsample(const real *x, real *y, unsigned n, unsigned c, int lanes, int oh, int ow, int factor) {
    PIXEL(oh, ow);
    float v[PACK];
    take(x + ((sample * (oh / factor) + py / factor) * (ow / factor) + px / factor) * c + ch, w, v);
    put(y + i, w, v);
}

extern "C" __global__ void upsample_vjp(const real *gy, real *gx, unsigned n, unsigned c, int lanes, int ih, int iw,
                                        int factor) {
    PIXEL(ih, iw);
    float sum[PACK], g[PACK];
    for (int k = 0; k < PACK; k++) sum[k] = 0.0f;
    for (int y = py * factor; y < (py + 1) * factor; y++) {
        for (int x = px * factor; x < (px + 1) * factor; x++) {
            take(gy + ((sample * ih * factor + y) * iw * factor + x) * c + ch, w, g);
            for (int k = 0; k < PACK; k++) sum[k] += g[k];
        }
    }
    put(gx + i, w, sum);
}

// The first and, behind the last, the next of the rows of `from` that row `r` of `to` averages; with the sizes exchanged, of the rows
// of `to` that average row `r` of `from`.
#define AVERAGED_FROM(r, from, to) ((int)((long long)(r) * (from) / (to)))
#define AVERAGED_TO(r, from, to) ((int)(((long long)((r) + 1) * (from) + (to) - 1) / (to)))
#define AVERAGED(r, from, to) (AVERAGED_TO(r, from, to) - AVERAGED_FROM(r, from, to))

extern "C" __global__ void adaptive_average(const real *x, real *y, unsigned n, unsigned c, int lanes, int ih, int iw, int oh,
                                            int ow) {
    PIXEL(oh, ow);
    int iy = AVERAGED_FROM(py, ih, oh), iy_end = AVERAGED_TO(py, ih, oh);
    int ix_start = AVERAGED_FROM(px, iw, ow), ix_end = AVERAGED_TO(px, iw, ow);
    float scale = 1.0f / (float)((iy_end - iy) * (ix_end - ix_start));
    float sum[PACK], v[PACK];
    for (int k = 0; k < PACK; k++) sum[k] = 0.0f;
    for (; iy < iy_end; iy++) {
        for (int ix = ix_start; ix < ix_end; ix++) {
            take(x + ((sample * ih + iy) * iw + ix) * c + ch, w, v);
            for (int k = 0; k < PACK; k++) sum[k] += v[k];
        }
    }
    for (int k = 0; k < PACK; k++) sum[k] *= scale;
    put(y + i, w, sum);
}

extern "C" __global__ void adaptive_average_vjp(const real *gy, real *gx, unsigned n, unsigned c, int lanes, int ih, int iw,
                                                int oh, int ow) {
    PIXEL(ih, iw);
    int oy = AVERAGED_FROM(py, oh, ih), oy_end = AVERAGED_TO(py, oh, ih);
    int ox_start = AVERAGED_FROM(px, ow, iw), ox_end = AVERAGED_TO(px, ow, iw);
    float sum[PACK], g[PACK];
    for (int k = 0; k < PACK; k++) sum[k] = 0.0f;
    for (; oy < oy_end; oy++) {
        for (int ox = ox_start; ox < ox_end; ox++) {
            float scale = 1.0f / (float)(AVERAGED(oy, ih, oh) * AVERAGED(ox, iw, ow));
            take(gy + ((sample * oh + oy) * ow + ox) * c + ch, w, g);
            for (int k = 0; k < PACK; k++) sum[k] += g[k] * scale;
        }
    }
    put(gx + i, w, sum);
}

extern "C" __global__ void spread(const real *x, real *y, unsigned n, unsigned c, int lanes, int ih, int iw, int oh, int ow) {
    PIXEL(oh, ow);
    int iy = (int)((long long)py * ih / oh), ix = (int)((long long)px * iw / ow);
    float v[PACK];
    take(x + ((sample * ih + iy) * iw + ix) * c + ch, w, v);
    put(y + i, w, v);
}

// The first of the rows of `to` that take row `r` of `from`, or a later one.
#define TAKING_FROM(r, from, to) ((int)(((long long)(r) * (to) + (from) - 1) / (from)))

extern "C" __global__ void spread_vjp(const real *gy, real *gx, unsigned n, unsigned c, int lanes, int ih, int iw, int oh,
                                      int ow) {
    PIXEL(ih, iw);
    int oy = TAKING_FROM(py, ih, oh), oy_end = TAKING_FROM(py + 1, ih, oh);
    int ox_start = TAKING_FROM(px, iw, ow), ox_end = TAKING_FROM(px + 1, iw, ow);
    float sum[PACK], g[PACK];
    for (int k = 0; k < PACK; k++) sum[k] = 0.0f;
    for (; oy < oy_end; oy++) {
        for (int ox = ox_start; ox < ox_end; ox++) {
            take(gy + ((sample * oh + oy) * ow + ox) * c + ch, w, g);
            for (int k = 0; k < PACK; k++) sum[k] += g[k];
        }
    }
    put(gx + i, w, sum);
}
