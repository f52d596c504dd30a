// What the source files of the emulated cuDNN share: statuses, handles and descriptors.
#pragma once
#include "abi.h"
#include "convolution.h"
#include <string>

enum Status : int {
    SUCCESS = 0,
    NOT_INITIALIZED = 1001,
    BAD_PARAM = 2000,
    BAD_PARAM_NULL_POINTER = 2002,
    NOT_SUPPORTED = 3000,
    INTERNAL_ERROR = 4000,
    EXECUTION_FAILED = 5000,
    EXECUTION_FAILED_CUDA_DRIVER = 5001,
};
#define API EXPORT Status
enum { NCHW = 0, NHWC = 1 };
enum { CONVOLUTION = 0, CROSS_CORRELATION = 1 };
enum { DEFAULT_MATH = 0, TENSOR_OP_MATH = 1, TENSOR_OP_ALLOW_CONVERSION = 2, FMA_MATH = 3 };
enum { ACTIVATION_RELU = 1, ACTIVATION_IDENTITY = 5 };

struct Handle {
    CUstream stream = nullptr;
};
struct Tensor {
    int type = -1, rank = 4;
    int dims[8] = {}, strides[8] = {};
};
struct Filter {
    int type = -1, format = 0;
    int dims[4] = {};  // k, c / groups, r, s
};
struct ConvolutionDescriptor {
    int pad[2] = {}, stride[2] = {}, dilation[2] = {}, mode = 0, compute = -1, groups = 1, math = 0, reorder = 0;
};
struct Activation {
    int mode = 0, propagate_nan = 0;
    double coefficient = 0;
};

// Says why on standard error and to cudnnGetLastErrorString.
Status refuse(Status status, const std::string& why);
size_t extent(const Tensor& tensor);  // in bytes, from the first to the last element
size_t extent(const Filter& filter);
// The convolution that these descriptors describe, if they fit together.
Status shape_of(const Tensor* x, const Filter* w, const ConvolutionDescriptor* c, const Tensor* y, Shape* shape);
