// Direct convolutions: everything is brought to float32 with channels innermost, the inner loops run over channels.
// Sums are float32 whatever the type of the tensors, as in cuDNN.
#include "convolution.h"
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#define FAST __attribute__((target_clones("arch=haswell", "default"), optimize("O3", "fast-math")))
#else
#define FAST
#endif

static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
static uint16_t to_bfloat16(float value) {  // to the nearest, ties to even
    uint32_t bits = to_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static float to_tf32(float value) {  // 10 bits of mantissa
    uint32_t bits = to_bits(value);
    if ((bits & 0x7f800000) == 0x7f800000) return value;
    return from_bits((bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu);
}
float load(const void* data, int type, int64_t index) {
    if (type == BFloat16) return from_bits((uint32_t)((const uint16_t*)data)[index] << 16);
    return ((const float*)data)[index];
}
void store(void* data, int type, int64_t index, float value) {
    if (type == BFloat16) ((uint16_t*)data)[index] = to_bfloat16(value);
    else ((float*)data)[index] = value;
}
// What is written where: alpha * value + beta * (what was there). With beta = 0 that is not read: it may be NaN.
static inline void blend(void* data, int type, int64_t index, float alpha, float value, float beta) {
    store(data, type, index, alpha * value + (beta ? beta * load(data, type, index) : 0.0f));
}

typedef uint32_t __attribute__((may_alias)) Bits;
// n values with a stride to floats, and back.
FAST static void load_row(float* __restrict__ to, const void* data, int type, int64_t from, int64_t stride, int n) {
    if (type == BFloat16) {
        auto* in = (const uint16_t*)data + from;
        auto* bits = (Bits*)to;
        if (stride == 1)
            for (int i = 0; i < n; i++) bits[i] = (uint32_t)in[i] << 16;
        else
            for (int i = 0; i < n; i++) bits[i] = (uint32_t)in[i * stride] << 16;
    } else {
        auto* in = (const float*)data + from;
        if (stride == 1) memcpy(to, in, sizeof(float) * (size_t)n);
        else
            for (int i = 0; i < n; i++) to[i] = in[i * stride];
    }
}
static void store_row(void* data, int type, int64_t to, int64_t stride, const float* in, int n, float alpha, float beta) {
    if (type == Float32 && stride == 1 && alpha == 1 && beta == 0) memcpy((float*)data + to, in, sizeof(float) * (size_t)n);
    else
        for (int i = 0; i < n; i++) blend(data, type, to + i * stride, alpha, in[i], beta);
}

// (n, c, h, w) with strides -> n, h, w, c packed
static std::vector<float> pack(const void* data, int type, int n, int c, int h, int w, const int64_t* stride, bool tf32) {
    std::vector<float> out((size_t)n * c * h * w);
    size_t at = 0;
    for (int i = 0; i < n; i++)
        for (int y = 0; y < h; y++)
            for (int x = 0; x < w; x++) {
                load_row(&out[at], data, type, i * stride[0] + y * stride[2] + x * stride[3], stride[1], c);
                at += (size_t)c;
            }
    if (tf32)
        for (float& value : out) value = to_tf32(value);
    return out;
}
static void unpack(const std::vector<float>& in, void* data, int type, int n, int c, int h, int w, const int64_t* stride,
                   float alpha, float beta) {
    size_t at = 0;
    for (int i = 0; i < n; i++)
        for (int y = 0; y < h; y++)
            for (int x = 0; x < w; x++) {
                store_row(data, type, i * stride[0] + y * stride[2] + x * stride[3], stride[1], &in[at], c, alpha, beta);
                at += (size_t)c;
            }
}

// to[0..n) += sum over i < m of factors[i * step] * from[i * row + (0..n)]
FAST static void accumulate(float* __restrict__ to, const float* __restrict__ from, int row, const float* factors,
                            int step, int m, int n) {
    int i = 0;
    for (; i + 4 <= m; i += 4) {
        const float a = factors[i * step], b = factors[(i + 1) * step], c = factors[(i + 2) * step],
                    d = factors[(i + 3) * step];
        const float *f0 = from + (int64_t)i * row, *f1 = f0 + row, *f2 = f1 + row, *f3 = f2 + row;
        for (int j = 0; j < n; j++) to[j] += a * f0[j] + b * f1[j] + c * f2[j] + d * f3[j];
    }
    for (; i < m; i++) {
        const float a = factors[i * step];
        const float* f = from + (int64_t)i * row;
        for (int j = 0; j < n; j++) to[j] += a * f[j];
    }
}

struct Filters {  // how a filter's channels are cut into groups
    int c, k;     // channels of one group
    explicit Filters(const Shape& s) : c(s.c / s.groups), k(s.k / s.groups) {}
};

// Filters as [group][r][s][c][k] (k innermost), or [group][r][s][k][c].
static std::vector<float> pack_filters(const Shape& s, const void* w, bool k_innermost) {
    Filters f(s);
    std::vector<float> out((size_t)s.k * f.c * s.r * s.s);
    for (int k = 0; k < s.k; k++)
        for (int c = 0; c < f.c; c++)
            for (int r = 0; r < s.r; r++)
                for (int t = 0; t < s.s; t++) {
                    int fr = s.flip ? s.r - 1 - r : r, ft = s.flip ? s.s - 1 - t : t;
                    float value = load(w, s.type, k * s.w_stride[0] + c * s.w_stride[1] + fr * s.w_stride[2] +
                                                      ft * s.w_stride[3]);
                    if (s.tf32) value = to_tf32(value);
                    size_t place = ((size_t)(k / f.k) * s.r + r) * s.s + t;
                    place = k_innermost ? (place * f.c + c) * f.k + k % f.k : (place * f.k + k % f.k) * f.c + c;
                    out[place] = value;
                }
    return out;
}

// Calls visit(y position, x position, tap r, tap s) for each output position and each tap that falls into the image.
template <class F> static void for_taps(const Shape& s, int p, F visit) {
    for (int r = 0; r < s.r; r++) {
        int h = p * s.stride_h - s.pad_h + r * s.dilation_h;
        if (h < 0 || h >= s.h) continue;
        for (int t = 0; t < s.s; t++)
            for (int q = 0; q < s.q; q++) {
                int w = q * s.stride_w - s.pad_w + t * s.dilation_w;
                if (w >= 0 && w < s.w) visit(q, h, w, r, t);
            }
    }
}

void convolution_forward(const Shape& s, float alpha, const void* x, const void* w, float beta, void* y,
                         const Epilogue* epilogue) {
    Filters f(s);
    std::vector<float> in = pack(x, s.type, s.n, s.c, s.h, s.w, s.x_stride, s.tf32);
    std::vector<float> filters = pack_filters(s, w, true);
    std::vector<float> out((size_t)s.n * s.p * s.q * s.k);
    for (int n = 0; n < s.n; n++)
        for (int p = 0; p < s.p; p++) {
            float* row = &out[((size_t)n * s.p + p) * s.q * s.k];
            for (int g = 0; g < s.groups; g++)
                for_taps(s, p, [&](int q, int h, int wx, int r, int t) {
                    accumulate(row + (size_t)q * s.k + g * f.k, &filters[(((size_t)g * s.r + r) * s.s + t) * f.c * f.k],
                               f.k, &in[(((size_t)n * s.h + h) * s.w + wx) * s.c + g * f.c], 1, f.c, f.k);
                });
        }
    if (epilogue) {
        size_t at = 0;
        for (int n = 0; n < s.n; n++)
            for (int p = 0; p < s.p; p++)
                for (int q = 0; q < s.q; q++)
                    for (int k = 0; k < s.k; k++, at++) {
                        const int64_t* z = epilogue->z_stride;
                        float value = alpha * out[at];
                        if (epilogue->alpha2)
                            value += epilogue->alpha2 *
                                     load(epilogue->z, s.type, n * z[0] + k * z[1] + p * z[2] + q * z[3]);
                        value += load(epilogue->bias, s.type, k);
                        out[at] = epilogue->relu && value < 0 ? 0.0f : value;
                    }
        alpha = 1;
        beta = 0;
    }
    unpack(out, y, s.type, s.n, s.k, s.p, s.q, s.y_stride, alpha, beta);
}

void convolution_backward_data(const Shape& s, float alpha, const void* w, const void* dy, float beta, void* dx) {
    Filters f(s);
    std::vector<float> in = pack(dy, s.type, s.n, s.k, s.p, s.q, s.y_stride, s.tf32);
    std::vector<float> filters = pack_filters(s, w, false);
    std::vector<float> out((size_t)s.n * s.h * s.w * s.c);
    for (int n = 0; n < s.n; n++)
        for (int p = 0; p < s.p; p++)
            for (int g = 0; g < s.groups; g++)
                for_taps(s, p, [&](int q, int h, int wx, int r, int t) {
                    accumulate(&out[(((size_t)n * s.h + h) * s.w + wx) * s.c + g * f.c],
                               &filters[(((size_t)g * s.r + r) * s.s + t) * f.c * f.k], f.c,
                               &in[(((size_t)n * s.p + p) * s.q + q) * s.k + g * f.k], 1, f.k, f.c);
                });
    unpack(out, dx, s.type, s.n, s.c, s.h, s.w, s.x_stride, alpha, beta);
}

void convolution_backward_filter(const Shape& s, float alpha, const void* x, const void* dy, float beta, void* dw) {
    Filters f(s);
    std::vector<float> in = pack(x, s.type, s.n, s.c, s.h, s.w, s.x_stride, s.tf32);
    std::vector<float> gradient = pack(dy, s.type, s.n, s.k, s.p, s.q, s.y_stride, s.tf32);
    std::vector<float> out((size_t)s.k * f.c * s.r * s.s);  // [group][r][s][c][k]
    for (int n = 0; n < s.n; n++)
        for (int p = 0; p < s.p; p++)
            for (int g = 0; g < s.groups; g++)
                for (int r = 0; r < s.r; r++) {
                    int h = p * s.stride_h - s.pad_h + r * s.dilation_h;
                    if (h < 0 || h >= s.h) continue;
                    for (int t = 0; t < s.s; t++) {
                        // The output columns whose tap falls into the image.
                        int offset = t * s.dilation_w - s.pad_w;
                        int first = offset < 0 ? (-offset + s.stride_w - 1) / s.stride_w : 0;
                        int last = std::min(s.q - 1, (int)std::floor((double)(s.w - 1 - offset) / s.stride_w));
                        if (first > last) continue;
                        const float* from = &gradient[(((size_t)n * s.p + p) * s.q + first) * s.k + g * f.k];
                        const float* factors =
                            &in[(((size_t)n * s.h + h) * s.w + first * s.stride_w + offset) * s.c + g * f.c];
                        float* to = &out[(((size_t)g * s.r + r) * s.s + t) * f.c * f.k];
                        for (int c = 0; c < f.c; c++)
                            accumulate(to + (size_t)c * f.k, from, s.k, factors + c, s.stride_w * s.c, last - first + 1,
                                       f.k);
                    }
                }
    for (int k = 0; k < s.k; k++)
        for (int c = 0; c < f.c; c++)
            for (int r = 0; r < s.r; r++)
                for (int t = 0; t < s.s; t++) {
                    int fr = s.flip ? s.r - 1 - r : r, ft = s.flip ? s.s - 1 - t : t;
                    blend(dw, s.type, k * s.w_stride[0] + c * s.w_stride[1] + fr * s.w_stride[2] + ft * s.w_stride[3],
                          alpha, out[((((size_t)(k / f.k) * s.r + r) * s.s + t) * f.c + c) * f.k + k % f.k], beta);
                }
}

void convolution_backward_bias(const Shape& s, float alpha, const void* dy, float beta, void* db) {
    std::vector<float> sums((size_t)s.k);
    for (int n = 0; n < s.n; n++)
        for (int p = 0; p < s.p; p++)
            for (int q = 0; q < s.q; q++)
                for (int k = 0; k < s.k; k++)
                    sums[(size_t)k] += load(dy, s.type, n * s.y_stride[0] + k * s.y_stride[1] + p * s.y_stride[2] +
                                                            q * s.y_stride[3]);
    for (int k = 0; k < s.k; k++) blend(db, s.type, k, alpha, sums[(size_t)k], beta);
}
