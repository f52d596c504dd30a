// Convolutions of the emulated cuDNN on the CPU.
#pragma once
#include <cstdint>

enum DataType { Float32 = 0, BFloat16 = 9 };

// One 2-d convolution. Tensors are (n, c, h, w) with any strides, in elements; filters (k, c / groups, r, s).
struct Shape {
    int n, c, h, w, k, r, s, p, q;  // input, filters, output (p x q)
    int groups, pad_h, pad_w, stride_h, stride_w, dilation_h, dilation_w;
    bool flip;  // a true convolution instead of a cross-correlation
    bool tf32;  // float32 inputs rounded to TF32
    int type;
    int64_t x_stride[4], y_stride[4], w_stride[4];
};

struct Epilogue {  // of the fused forward product: y = activation(alpha * conv + alpha2 * z + bias)
    const void* z = nullptr;
    int64_t z_stride[4] = {};
    float alpha2 = 0;
    const void* bias = nullptr;
    bool relu = false;
};

void convolution_forward(const Shape& shape, float alpha, const void* x, const void* w, float beta, void* y,
                         const Epilogue* epilogue);
void convolution_backward_data(const Shape& shape, float alpha, const void* w, const void* dy, float beta, void* dx);
void convolution_backward_filter(const Shape& shape, float alpha, const void* x, const void* dy, float beta, void* dw);
void convolution_backward_bias(const Shape& shape, float alpha, const void* dy, float beta, void* db);

float load(const void* data, int type, int64_t index);
void store(void* data, int type, int64_t index, float value);
