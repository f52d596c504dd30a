// cuDNN: version, handles, descriptors and the legacy convolution API, queued on the handle's stream.
#include "abi.h"
#include "convolution.h"
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>

// From libcuda.
extern "C" int sideways_emulator_issue(CUstream, const char*, int (*)(void*), void*, void (*)(void*));
extern "C" int sideways_emulator_synchronize_for_search(CUstream);
extern "C" int sideways_emulator_device_range(CUdeviceptr, size_t);
extern "C" void sideways_emulator_add(const char*, unsigned long long);
extern "C" [[noreturn]] void sideways_emulator_die(const char*);

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

static thread_local std::string last_error;
static Status refuse(Status status, const std::string& why) {
    last_error = why;
    fprintf(stderr, "sideways CUDA emulator: cuDNN: %s\n", why.c_str());
    return status;
}

// ---- Library ----
EXPORT size_t cudnnGetVersion(void) { return 91200; }
EXPORT size_t cudnnGetCudartVersion(void) { return 13000; }
EXPORT size_t cudnnGetMaxDeviceVersion(void) { return 900; }
API cudnnGetProperty(int which, int* value) {
    static const int parts[] = {9, 12, 0};
    if (which < 0 || which > 2) return BAD_PARAM;
    *value = parts[which];
    return SUCCESS;
}
API cudnnOpsVersionCheck(void) { return SUCCESS; }
API cudnnCnnVersionCheck(void) { return SUCCESS; }
API cudnnAdvVersionCheck(void) { return SUCCESS; }
API cudnnGraphVersionCheck(void) { return SUCCESS; }
EXPORT const char* cudnnGetErrorString(int status) {
    switch (status) {
    case SUCCESS: return "CUDNN_STATUS_SUCCESS";
    case NOT_INITIALIZED: return "CUDNN_STATUS_NOT_INITIALIZED";
    case BAD_PARAM: return "CUDNN_STATUS_BAD_PARAM";
    case BAD_PARAM_NULL_POINTER: return "CUDNN_STATUS_BAD_PARAM_NULL_POINTER";
    case NOT_SUPPORTED: return "CUDNN_STATUS_NOT_SUPPORTED";
    case INTERNAL_ERROR: return "CUDNN_STATUS_INTERNAL_ERROR";
    case EXECUTION_FAILED: return "CUDNN_STATUS_EXECUTION_FAILED";
    case EXECUTION_FAILED_CUDA_DRIVER: return "CUDNN_STATUS_EXECUTION_FAILED_CUDA_DRIVER";
    default: return "CUDNN_UNKNOWN_STATUS";
    }
}
EXPORT void cudnnGetLastErrorString(char* text, size_t size) {
    if (!text || !size) return;
    snprintf(text, size, "%s", last_error.c_str());
    last_error.clear();
}
API cudnnCreate(Handle** handle) {
    if (!handle) return BAD_PARAM_NULL_POINTER;
    *handle = new Handle;
    return SUCCESS;
}
API cudnnDestroy(Handle* handle) {
    delete handle;
    return SUCCESS;
}
API cudnnSetStream(Handle* handle, CUstream stream) {
    if (!handle) return BAD_PARAM_NULL_POINTER;
    handle->stream = stream;
    return SUCCESS;
}
API cudnnGetStream(Handle* handle, CUstream* stream) {
    if (!handle || !stream) return BAD_PARAM_NULL_POINTER;
    *stream = handle->stream;
    return SUCCESS;
}

// ---- Descriptors ----
template <class T> static Status create(T** out) {
    if (!out) return BAD_PARAM_NULL_POINTER;
    *out = new T;
    return SUCCESS;
}
template <class T> static Status destroy(T* descriptor) {
    delete descriptor;
    return SUCCESS;
}
API cudnnCreateTensorDescriptor(Tensor** out) { return create(out); }
API cudnnDestroyTensorDescriptor(Tensor* d) { return destroy(d); }
API cudnnCreateFilterDescriptor(Filter** out) { return create(out); }
API cudnnDestroyFilterDescriptor(Filter* d) { return destroy(d); }
API cudnnCreateConvolutionDescriptor(ConvolutionDescriptor** out) { return create(out); }
API cudnnDestroyConvolutionDescriptor(ConvolutionDescriptor* d) { return destroy(d); }
API cudnnCreateActivationDescriptor(Activation** out) { return create(out); }
API cudnnDestroyActivationDescriptor(Activation* d) { return destroy(d); }

static Status check_type(int type) {
    return type == Float32 || type == BFloat16 ? SUCCESS : refuse(NOT_SUPPORTED, "only float32 and bfloat16 tensors");
}
API cudnnSetTensorNdDescriptor(Tensor* d, int type, int rank, const int* dims, const int* strides) {
    if (!d || !dims || !strides) return BAD_PARAM_NULL_POINTER;
    if (rank < 4 || rank > 8) return refuse(NOT_SUPPORTED, "a tensor descriptor has 4 to 8 dimensions");
    if (Status s = check_type(type)) return s;
    for (int i = 0; i < rank; i++)
        if (dims[i] < 1 || strides[i] < 1) return refuse(BAD_PARAM, "a tensor descriptor with a size or stride below 1");
    d->type = type;
    d->rank = rank;
    memcpy(d->dims, dims, sizeof(int) * (size_t)rank);
    memcpy(d->strides, strides, sizeof(int) * (size_t)rank);
    return SUCCESS;
}
API cudnnSetTensor4dDescriptorEx(Tensor* d, int type, int n, int c, int h, int w, int sn, int sc, int sh, int sw) {
    int dims[] = {n, c, h, w}, strides[] = {sn, sc, sh, sw};
    return cudnnSetTensorNdDescriptor(d, type, 4, dims, strides);
}
API cudnnSetTensor4dDescriptor(Tensor* d, int format, int type, int n, int c, int h, int w) {
    if (format == NCHW) return cudnnSetTensor4dDescriptorEx(d, type, n, c, h, w, c * h * w, h * w, w, 1);
    if (format == NHWC) return cudnnSetTensor4dDescriptorEx(d, type, n, c, h, w, c * h * w, 1, w * c, c);
    return refuse(NOT_SUPPORTED, "only NCHW and NHWC tensors");
}
API cudnnSetTensorNdDescriptorEx(Tensor* d, int format, int type, int rank, const int* dims) {
    if (rank != 4) return refuse(NOT_SUPPORTED, "only tensors of 4 dimensions");
    return cudnnSetTensor4dDescriptor(d, format, type, dims[0], dims[1], dims[2], dims[3]);
}
API cudnnGetTensor4dDescriptor(Tensor* d, int* type, int* n, int* c, int* h, int* w, int* sn, int* sc, int* sh, int* sw) {
    if (!d) return BAD_PARAM_NULL_POINTER;
    *type = d->type;
    int *dims[] = {n, c, h, w}, *strides[] = {sn, sc, sh, sw};
    for (int i = 0; i < 4; i++) {
        *dims[i] = d->dims[i];
        *strides[i] = d->strides[i];
    }
    return SUCCESS;
}
static size_t element(int type) { return type == BFloat16 ? 2 : 4; }
static size_t extent(const Tensor& t) {  // in bytes, from the first to the last element
    size_t last = 0;
    for (int i = 0; i < t.rank; i++) last += (size_t)(t.dims[i] - 1) * (size_t)t.strides[i];
    return (last + 1) * element(t.type);
}
static size_t extent(const Filter& f) {
    return (size_t)f.dims[0] * (size_t)f.dims[1] * (size_t)f.dims[2] * (size_t)f.dims[3] * element(f.type);
}
API cudnnGetTensorSizeInBytes(Tensor* d, size_t* bytes) {
    if (!d || !bytes) return BAD_PARAM_NULL_POINTER;
    *bytes = extent(*d);
    return SUCCESS;
}
API cudnnSetFilterNdDescriptor(Filter* d, int type, int format, int rank, const int* dims) {
    if (!d || !dims) return BAD_PARAM_NULL_POINTER;
    if (rank != 4) return refuse(NOT_SUPPORTED, "only filters of 4 dimensions");
    if (Status s = check_type(type)) return s;
    if (format != NCHW && format != NHWC) return refuse(NOT_SUPPORTED, "only NCHW and NHWC filters");
    for (int i = 0; i < 4; i++)
        if (dims[i] < 1) return refuse(BAD_PARAM, "a filter descriptor with a size below 1");
    d->type = type;
    d->format = format;
    memcpy(d->dims, dims, sizeof d->dims);
    return SUCCESS;
}
API cudnnSetFilter4dDescriptor(Filter* d, int type, int format, int k, int c, int h, int w) {
    int dims[] = {k, c, h, w};
    return cudnnSetFilterNdDescriptor(d, type, format, 4, dims);
}
API cudnnGetFilter4dDescriptor(Filter* d, int* type, int* format, int* k, int* c, int* h, int* w) {
    if (!d) return BAD_PARAM_NULL_POINTER;
    *type = d->type;
    *format = d->format;
    *k = d->dims[0];
    *c = d->dims[1];
    *h = d->dims[2];
    *w = d->dims[3];
    return SUCCESS;
}
API cudnnGetFilterSizeInBytes(Filter* d, size_t* bytes) {
    if (!d || !bytes) return BAD_PARAM_NULL_POINTER;
    *bytes = extent(*d);
    return SUCCESS;
}
API cudnnSetConvolutionNdDescriptor(ConvolutionDescriptor* d, int rank, const int* pad, const int* stride,
                                    const int* dilation, int mode, int compute) {
    if (!d || !pad || !stride || !dilation) return BAD_PARAM_NULL_POINTER;
    if (rank != 2) return refuse(NOT_SUPPORTED, "only convolutions of 2 spatial dimensions");
    if (mode != CONVOLUTION && mode != CROSS_CORRELATION) return BAD_PARAM;
    if (compute != Float32) return refuse(NOT_SUPPORTED, "only float32 as the type of a convolution's sums");
    for (int i = 0; i < 2; i++) {
        if (pad[i] < 0 || stride[i] < 1 || dilation[i] < 1)
            return refuse(BAD_PARAM, "a convolution with padding below 0, or stride or dilation below 1");
        d->pad[i] = pad[i];
        d->stride[i] = stride[i];
        d->dilation[i] = dilation[i];
    }
    d->mode = mode;
    d->compute = compute;
    return SUCCESS;
}
API cudnnSetConvolution2dDescriptor(ConvolutionDescriptor* d, int pad_h, int pad_w, int u, int v, int dilation_h,
                                    int dilation_w, int mode, int compute) {
    int pad[] = {pad_h, pad_w}, stride[] = {u, v}, dilation[] = {dilation_h, dilation_w};
    return cudnnSetConvolutionNdDescriptor(d, 2, pad, stride, dilation, mode, compute);
}
API cudnnSetConvolutionGroupCount(ConvolutionDescriptor* d, int groups) {
    if (!d) return BAD_PARAM_NULL_POINTER;
    if (groups < 1) return BAD_PARAM;
    d->groups = groups;
    return SUCCESS;
}
API cudnnGetConvolutionGroupCount(ConvolutionDescriptor* d, int* groups) {
    if (!d || !groups) return BAD_PARAM_NULL_POINTER;
    *groups = d->groups;
    return SUCCESS;
}
API cudnnSetConvolutionMathType(ConvolutionDescriptor* d, int math) {
    if (!d) return BAD_PARAM_NULL_POINTER;
    if (math < 0 || math > 3) return BAD_PARAM;
    d->math = math;
    return SUCCESS;
}
API cudnnGetConvolutionMathType(ConvolutionDescriptor* d, int* math) {
    if (!d || !math) return BAD_PARAM_NULL_POINTER;
    *math = d->math;
    return SUCCESS;
}
API cudnnSetConvolutionReorderType(ConvolutionDescriptor* d, int reorder) {
    if (!d) return BAD_PARAM_NULL_POINTER;
    d->reorder = reorder;
    return SUCCESS;
}
API cudnnGetConvolutionReorderType(ConvolutionDescriptor* d, int* reorder) {
    if (!d || !reorder) return BAD_PARAM_NULL_POINTER;
    *reorder = d->reorder;
    return SUCCESS;
}
API cudnnSetActivationDescriptor(Activation* d, int mode, int propagate_nan, double coefficient) {
    if (!d) return BAD_PARAM_NULL_POINTER;
    if (mode < 0 || mode > 6) return BAD_PARAM;
    *d = {mode, propagate_nan, coefficient};
    return SUCCESS;
}

// ---- Shapes ----
static int output_size(int in, int filter, int pad, int stride, int dilation) {
    return 1 + (in + 2 * pad - (dilation * (filter - 1) + 1)) / stride;
}
API cudnnGetConvolution2dForwardOutputDim(ConvolutionDescriptor* c, Tensor* x, Filter* w, int* n, int* k, int* p, int* q) {
    if (!c || !x || !w) return BAD_PARAM_NULL_POINTER;
    if (x->dims[1] != w->dims[1] * c->groups)
        return refuse(BAD_PARAM, "the input has " + std::to_string(x->dims[1]) + " channels, the filters take " +
                                     std::to_string(w->dims[1]) + " x " + std::to_string(c->groups) + " groups");
    if (w->dims[0] % c->groups) return refuse(BAD_PARAM, "the number of filters is no multiple of the groups");
    *n = x->dims[0];
    *k = w->dims[0];
    *p = output_size(x->dims[2], w->dims[2], c->pad[0], c->stride[0], c->dilation[0]);
    *q = output_size(x->dims[3], w->dims[3], c->pad[1], c->stride[1], c->dilation[1]);
    if (*p < 1 || *q < 1) return refuse(BAD_PARAM, "a convolution whose output is empty");
    return SUCCESS;
}
API cudnnGetConvolutionNdForwardOutputDim(ConvolutionDescriptor* c, Tensor* x, Filter* w, int rank, int* dims) {
    if (!dims) return BAD_PARAM_NULL_POINTER;
    if (rank != 4) return BAD_PARAM;
    return cudnnGetConvolution2dForwardOutputDim(c, x, w, &dims[0], &dims[1], &dims[2], &dims[3]);
}
// The convolution that these descriptors describe, if they fit together.
static Status shape_of(const Tensor* x, const Filter* w, const ConvolutionDescriptor* c, const Tensor* y, Shape* shape) {
    if (!x || !w || !c || !y) return refuse(BAD_PARAM_NULL_POINTER, "a descriptor is null");
    if (x->type < 0 || w->type < 0 || y->type < 0 || c->compute < 0) return refuse(BAD_PARAM, "a descriptor is not set");
    if (x->rank != 4 || y->rank != 4) return refuse(NOT_SUPPORTED, "only tensors of 4 dimensions");
    if (x->type != w->type || x->type != y->type)
        return refuse(BAD_PARAM, "the input's, the filters' and the output's types differ");
    int n, k, p, q;
    if (Status s = cudnnGetConvolution2dForwardOutputDim((ConvolutionDescriptor*)c, (Tensor*)x, (Filter*)w, &n, &k, &p, &q))
        return s;
    if (w->format == NHWC && (x->strides[1] != 1 || y->strides[1] != 1))
        return refuse(NOT_SUPPORTED, "NHWC filters with tensors that are not NHWC");
    int expected[] = {n, k, p, q};
    for (int i = 0; i < 4; i++)
        if (y->dims[i] != expected[i])
            return refuse(BAD_PARAM, "the output's dimension " + std::to_string(i) + " is " + std::to_string(y->dims[i]) +
                                         ", the convolution gives " + std::to_string(expected[i]));
    Shape s = {};
    s.n = n, s.c = x->dims[1], s.h = x->dims[2], s.w = x->dims[3];
    s.k = k, s.r = w->dims[2], s.s = w->dims[3], s.p = p, s.q = q;
    s.groups = c->groups;
    s.pad_h = c->pad[0], s.pad_w = c->pad[1], s.stride_h = c->stride[0], s.stride_w = c->stride[1];
    s.dilation_h = c->dilation[0], s.dilation_w = c->dilation[1];
    s.flip = c->mode == CONVOLUTION;
    s.tf32 = x->type == Float32 && c->math != FMA_MATH;
    s.type = x->type;
    for (int i = 0; i < 4; i++) s.x_stride[i] = x->strides[i], s.y_stride[i] = y->strides[i];
    int64_t cg = w->dims[1];
    if (w->format == NHWC) s.w_stride[0] = cg * s.r * s.s, s.w_stride[1] = 1, s.w_stride[2] = cg * s.s, s.w_stride[3] = cg;
    else s.w_stride[0] = cg * s.r * s.s, s.w_stride[1] = (int64_t)s.r * s.s, s.w_stride[2] = s.s, s.w_stride[3] = 1;
    *shape = s;
    return SUCCESS;
}

// ---- Algorithms and workspaces ----
struct Performance {
    int algorithm;
    Status status;
    float time;
    size_t memory;
    int determinism, math;
    int reserved[3];
};
enum Product { Forward, BackwardData, BackwardFilter };

static const int algorithm_count[] = {8, 6, 7};
// Algorithm 1 is the fast one with the larger workspace, 0 the other; the rest is not supported.
static Status workspace(Product product, int algorithm, const Shape& s, size_t* bytes) {
    if (algorithm < 0 || algorithm >= algorithm_count[product]) return BAD_PARAM;
    if (algorithm > 1) return NOT_SUPPORTED;
    size_t filter = (size_t)s.k * (size_t)(s.c / s.groups) * (size_t)s.r * (size_t)s.s * 4;
    size_t large = (filter + 4096 * (size_t)(product + 1) + 255) / 256 * 256;
    *bytes = algorithm == 1 ? large : 512 * (size_t)(product + 1);
    return SUCCESS;
}
static Status algorithms(Product product, const Shape& s, const ConvolutionDescriptor* c, int wanted, int* returned,
                         Performance* results, bool measured) {
    if (!returned || !results) return BAD_PARAM_NULL_POINTER;
    if (wanted < 1) return BAD_PARAM;
    static const int order[] = {1, 0, 2};
    float fast = measured ? 0.05f : -1.0f;
    *returned = wanted < 3 ? wanted : 3;
    for (int i = 0; i < *returned; i++) {
        Performance p = {};
        p.algorithm = order[i];
        p.status = workspace(product, order[i], s, &p.memory);
        p.time = p.status ? -1.0f : fast * (float)(i + 1);
        // As in cuDNN, algorithm 0 of the gradients adds atomically.
        p.determinism = product == Forward || order[i] == 1;
        p.math = c->math;
        results[i] = p;
    }
    return SUCCESS;
}
#define SHAPE(x, w, c, y)                                                                                              \
    Shape shape;                                                                                                       \
    if (Status s = shape_of(x, w, c, y, &shape)) return s

API cudnnGetConvolutionForwardAlgorithmMaxCount(Handle*, int* n) { return *n = 8, SUCCESS; }
API cudnnGetConvolutionBackwardDataAlgorithmMaxCount(Handle*, int* n) { return *n = 6, SUCCESS; }
API cudnnGetConvolutionBackwardFilterAlgorithmMaxCount(Handle*, int* n) { return *n = 7, SUCCESS; }

API cudnnGetConvolutionForwardAlgorithm_v7(Handle*, Tensor* x, Filter* w, ConvolutionDescriptor* c, Tensor* y, int wanted,
                                           int* returned, Performance* results) {
    SHAPE(x, w, c, y);
    return algorithms(Forward, shape, c, wanted, returned, results, false);
}
API cudnnGetConvolutionBackwardDataAlgorithm_v7(Handle*, Filter* w, Tensor* dy, ConvolutionDescriptor* c, Tensor* dx,
                                                int wanted, int* returned, Performance* results) {
    SHAPE(dx, w, c, dy);
    return algorithms(BackwardData, shape, c, wanted, returned, results, false);
}
API cudnnGetConvolutionBackwardFilterAlgorithm_v7(Handle*, Tensor* x, Tensor* dy, ConvolutionDescriptor* c, Filter* dw,
                                                  int wanted, int* returned, Performance* results) {
    SHAPE(x, dw, c, dy);
    return algorithms(BackwardFilter, shape, c, wanted, returned, results, false);
}
API cudnnGetConvolutionForwardWorkspaceSize(Handle*, Tensor* x, Filter* w, ConvolutionDescriptor* c, Tensor* y,
                                            int algorithm, size_t* bytes) {
    SHAPE(x, w, c, y);
    return workspace(Forward, algorithm, shape, bytes);
}
API cudnnGetConvolutionBackwardDataWorkspaceSize(Handle*, Filter* w, Tensor* dy, ConvolutionDescriptor* c, Tensor* dx,
                                                 int algorithm, size_t* bytes) {
    SHAPE(dx, w, c, dy);
    return workspace(BackwardData, algorithm, shape, bytes);
}
API cudnnGetConvolutionBackwardFilterWorkspaceSize(Handle*, Tensor* x, Tensor* dy, ConvolutionDescriptor* c, Filter* dw,
                                                   int algorithm, size_t* bytes) {
    SHAPE(x, dw, c, dy);
    return workspace(BackwardFilter, algorithm, shape, bytes);
}

// ---- Products ----
static Status on_device(const void* pointer, size_t bytes, const char* what) {
    if (!pointer) return refuse(BAD_PARAM_NULL_POINTER, std::string(what) + " is null");
    if (!sideways_emulator_device_range((CUdeviceptr)pointer, bytes))
        return refuse(BAD_PARAM, std::string(what) + " of " + std::to_string(bytes) +
                                     " bytes is not inside one live device allocation");
    return SUCCESS;
}
static Status check_workspace(Product product, int algorithm, const Shape& s, const void* pointer, size_t bytes,
                              size_t* needed) {
    if (Status status = workspace(product, algorithm, s, needed))
        return refuse(status, "algorithm " + std::to_string(algorithm) + " is not supported");
    if (bytes < *needed)
        return refuse(BAD_PARAM, "a workspace of " + std::to_string(bytes) + " bytes where algorithm " +
                                     std::to_string(algorithm) + " needs " + std::to_string(*needed));
    return on_device(pointer, bytes, "the workspace");
}

struct Queued {
    std::function<void()> run;
    uint32_t* workspace;
    size_t words;
    const char* name;
};
static int run_queued(void* argument) {
    auto* queued = (Queued*)argument;
    // What an algorithm would leave in its workspace: a mark of its own, which nobody else may touch meanwhile.
    static std::atomic<uint32_t> next{0x7fc00001};  // NaN in float32
    uint32_t mark = next++;
    for (size_t i = 0; i < queued->words; i++) queued->workspace[i] = mark;
    queued->run();
    for (size_t i = 0; i < queued->words; i++)
        if (queued->workspace[i] != mark) {
            std::string text = std::string(queued->name) +
                               ": something wrote to the workspace while the product ran: two products that run at "
                               "once must not share one, nor may it hold anything else";
            sideways_emulator_die(text.c_str());
        }
    return 0;
}
static Status enqueue(Handle* handle, const char* name, void* workspace, size_t needed, std::function<void()> run) {
    if (!handle) return refuse(BAD_PARAM_NULL_POINTER, "the handle is null");
    sideways_emulator_add("convolution", 1);
    auto* queued = new Queued{std::move(run), (uint32_t*)workspace, needed / 4, name};
    int error = sideways_emulator_issue(handle->stream, name, run_queued, queued,
                                        [](void* argument) { delete (Queued*)argument; });
    return error ? refuse(EXECUTION_FAILED_CUDA_DRIVER, std::string(name) + ": CUDA error " + std::to_string(error))
                 : SUCCESS;
}
static float scalar(const void* value) { return *(const float*)value; }  // of float32 and bfloat16 tensors alike
#define CHECK(call)                                                                                                    \
    if (Status status = call) return status
#define SCALARS(a, b)                                                                                                  \
    if (!a || !b) return refuse(BAD_PARAM_NULL_POINTER, "alpha or beta is null");                                      \
    float alpha = scalar(a), beta = scalar(b)

API cudnnConvolutionForward(Handle* handle, const void* alpha_at, Tensor* x_desc, const void* x, Filter* w_desc,
                            const void* w, ConvolutionDescriptor* c, int algorithm, void* space, size_t space_bytes,
                            const void* beta_at, Tensor* y_desc, void* y) {
    SHAPE(x_desc, w_desc, c, y_desc);
    SCALARS(alpha_at, beta_at);
    size_t needed;
    CHECK(check_workspace(Forward, algorithm, shape, space, space_bytes, &needed));
    CHECK(on_device(x, extent(*x_desc), "x"));
    CHECK(on_device(w, extent(*w_desc), "w"));
    CHECK(on_device(y, extent(*y_desc), "y"));
    return enqueue(handle, "cudnnConvolutionForward", space, needed,
                   [=] { convolution_forward(shape, alpha, x, w, beta, y, nullptr); });
}
API cudnnConvolutionBackwardData(Handle* handle, const void* alpha_at, Filter* w_desc, const void* w, Tensor* dy_desc,
                                 const void* dy, ConvolutionDescriptor* c, int algorithm, void* space, size_t space_bytes,
                                 const void* beta_at, Tensor* dx_desc, void* dx) {
    SHAPE(dx_desc, w_desc, c, dy_desc);
    SCALARS(alpha_at, beta_at);
    size_t needed;
    CHECK(check_workspace(BackwardData, algorithm, shape, space, space_bytes, &needed));
    CHECK(on_device(w, extent(*w_desc), "w"));
    CHECK(on_device(dy, extent(*dy_desc), "dy"));
    CHECK(on_device(dx, extent(*dx_desc), "dx"));
    return enqueue(handle, "cudnnConvolutionBackwardData", space, needed,
                   [=] { convolution_backward_data(shape, alpha, w, dy, beta, dx); });
}
API cudnnConvolutionBackwardFilter(Handle* handle, const void* alpha_at, Tensor* x_desc, const void* x, Tensor* dy_desc,
                                   const void* dy, ConvolutionDescriptor* c, int algorithm, void* space,
                                   size_t space_bytes, const void* beta_at, Filter* dw_desc, void* dw) {
    SHAPE(x_desc, dw_desc, c, dy_desc);
    SCALARS(alpha_at, beta_at);
    size_t needed;
    CHECK(check_workspace(BackwardFilter, algorithm, shape, space, space_bytes, &needed));
    CHECK(on_device(x, extent(*x_desc), "x"));
    CHECK(on_device(dy, extent(*dy_desc), "dy"));
    CHECK(on_device(dw, extent(*dw_desc), "dw"));
    return enqueue(handle, "cudnnConvolutionBackwardFilter", space, needed,
                   [=] { convolution_backward_filter(shape, alpha, x, dy, beta, dw); });
}
static Status check_bias(const Tensor* bias, const Tensor* y) {
    if (!bias || bias->rank != 4) return refuse(BAD_PARAM, "the bias has no 4 dimensions");
    if (bias->dims[0] != 1 || bias->dims[2] != 1 || bias->dims[3] != 1 || bias->dims[1] != y->dims[1])
        return refuse(BAD_PARAM, "the bias is not 1 x channels x 1 x 1");
    if (bias->type != y->type) return refuse(BAD_PARAM, "the bias' type differs from the tensor's");
    return SUCCESS;
}
API cudnnConvolutionBackwardBias(Handle* handle, const void* alpha_at, Tensor* dy_desc, const void* dy,
                                 const void* beta_at, Tensor* db_desc, void* db) {
    if (!dy_desc || dy_desc->rank != 4) return BAD_PARAM;
    SCALARS(alpha_at, beta_at);
    CHECK(check_bias(db_desc, dy_desc));
    CHECK(on_device(dy, extent(*dy_desc), "dy"));
    CHECK(on_device(db, extent(*db_desc), "db"));
    Shape shape = {};
    shape.n = dy_desc->dims[0], shape.k = dy_desc->dims[1], shape.p = dy_desc->dims[2], shape.q = dy_desc->dims[3];
    shape.type = dy_desc->type;
    for (int i = 0; i < 4; i++) shape.y_stride[i] = dy_desc->strides[i];
    return enqueue(handle, "cudnnConvolutionBackwardBias", nullptr, 0,
                   [=] { convolution_backward_bias(shape, alpha, dy, beta, db); });
}
API cudnnConvolutionBiasActivationForward(Handle* handle, const void* alpha1_at, Tensor* x_desc, const void* x,
                                          Filter* w_desc, const void* w, ConvolutionDescriptor* c, int algorithm,
                                          void* space, size_t space_bytes, const void* alpha2_at, Tensor* z_desc,
                                          const void* z, Tensor* bias_desc, const void* bias, Activation* activation,
                                          Tensor* y_desc, void* y) {
    SHAPE(x_desc, w_desc, c, y_desc);
    SCALARS(alpha1_at, alpha2_at);
    if (!activation || !z_desc) return BAD_PARAM_NULL_POINTER;
    if (activation->mode != ACTIVATION_RELU && activation->mode != ACTIVATION_IDENTITY)
        return refuse(NOT_SUPPORTED, "only ReLU and identity as fused activation");
    if (activation->mode == ACTIVATION_IDENTITY && algorithm != 1)
        return refuse(NOT_SUPPORTED, "the identity as fused activation needs the algorithm IMPLICIT_PRECOMP_GEMM");
    if (z_desc->type != y_desc->type || memcmp(z_desc->dims, y_desc->dims, 4 * sizeof(int)))
        return refuse(BAD_PARAM, "z and y differ in shape or type");
    size_t needed;
    CHECK(check_bias(bias_desc, y_desc));
    CHECK(check_workspace(Forward, algorithm, shape, space, space_bytes, &needed));
    CHECK(on_device(x, extent(*x_desc), "x"));
    CHECK(on_device(w, extent(*w_desc), "w"));
    CHECK(on_device(z, extent(*z_desc), "z"));
    CHECK(on_device(bias, extent(*bias_desc), "bias"));
    CHECK(on_device(y, extent(*y_desc), "y"));
    Epilogue epilogue;
    epilogue.z = z;
    for (int i = 0; i < 4; i++) epilogue.z_stride[i] = z_desc->strides[i];
    epilogue.alpha2 = beta;
    epilogue.bias = bias;
    epilogue.relu = activation->mode == ACTIVATION_RELU;
    return enqueue(handle, "cudnnConvolutionBiasActivationForward", space, needed,
                   [=] { convolution_forward(shape, alpha, x, w, 0, y, &epilogue); });
}
// c = alpha * a + beta * c, where a's sizes may be 1.
API cudnnAddTensor(Handle* handle, const void* alpha_at, Tensor* a_desc, const void* a, const void* beta_at,
                   Tensor* c_desc, void* c) {
    if (!a_desc || !c_desc) return BAD_PARAM_NULL_POINTER;
    SCALARS(alpha_at, beta_at);
    if (a_desc->type != c_desc->type || a_desc->rank != 4 || c_desc->rank != 4) return BAD_PARAM;
    for (int i = 0; i < 4; i++)
        if (a_desc->dims[i] != 1 && a_desc->dims[i] != c_desc->dims[i])
            return refuse(BAD_PARAM, "cudnnAddTensor: the shapes do not fit");
    CHECK(on_device(a, extent(*a_desc), "A"));
    CHECK(on_device(c, extent(*c_desc), "C"));
    Tensor from = *a_desc, to = *c_desc;
    return enqueue(handle, "cudnnAddTensor", nullptr, 0, [=] {
        int i[4];
        for (i[0] = 0; i[0] < to.dims[0]; i[0]++)
            for (i[1] = 0; i[1] < to.dims[1]; i[1]++)
                for (i[2] = 0; i[2] < to.dims[2]; i[2]++)
                    for (i[3] = 0; i[3] < to.dims[3]; i[3]++) {
                        int64_t at = 0, a_at = 0;
                        for (int d = 0; d < 4; d++) {
                            at += (int64_t)i[d] * to.strides[d];
                            if (from.dims[d] > 1) a_at += (int64_t)i[d] * from.strides[d];
                        }
                        float old = beta ? beta * load(c, to.type, at) : 0.0f;
                        store(c, to.type, at, alpha * load(a, from.type, a_at) + old);
                    }
    });
}

// ---- Searches ----
// They run on the device in cuDNN, with outputs overwritten and the device synchronised.
static Status search(Handle* handle, Product product, const Shape& s, ConvolutionDescriptor* c, int wanted, int* returned,
                     Performance* results) {
    if (!handle) return BAD_PARAM_NULL_POINTER;
    if (sideways_emulator_synchronize_for_search(handle->stream))
        return refuse(EXECUTION_FAILED_CUDA_DRIVER, "an algorithm search where the device cannot be synchronised");
    sideways_emulator_add("search", 1);
    return algorithms(product, s, c, wanted, returned, results, true);
}
static Status search_with_data(Handle* handle, Product product, const Shape& s, ConvolutionDescriptor* c, void* output,
                               size_t output_bytes, void* space, size_t space_bytes, int wanted, int* returned,
                               Performance* results) {
    CHECK(on_device(output, output_bytes, "the output"));
    if (space_bytes) CHECK(on_device(space, space_bytes, "the workspace"));
    CHECK(search(handle, product, s, c, wanted, returned, results));
    memset(output, 0xff, output_bytes);
    if (space_bytes) memset(space, 0xff, space_bytes);
    // What does not fit into the workspace fails, and failures come last.
    Performance fits[3], fails[3];
    int n_fits = 0, n_fails = 0;
    for (int i = 0; i < *returned; i++) {
        Performance p = results[i];
        if (p.status == SUCCESS && p.memory > space_bytes) p.status = INTERNAL_ERROR, p.time = -1;
        if (p.status == SUCCESS) fits[n_fits++] = p;
        else fails[n_fails++] = p;
    }
    for (int i = 0; i < *returned; i++) results[i] = i < n_fits ? fits[i] : fails[i - n_fits];
    return SUCCESS;
}
API cudnnFindConvolutionForwardAlgorithm(Handle* handle, Tensor* x, Filter* w, ConvolutionDescriptor* c, Tensor* y,
                                         int wanted, int* returned, Performance* results) {
    SHAPE(x, w, c, y);
    return search(handle, Forward, shape, c, wanted, returned, results);
}
API cudnnFindConvolutionBackwardDataAlgorithm(Handle* handle, Filter* w, Tensor* dy, ConvolutionDescriptor* c, Tensor* dx,
                                              int wanted, int* returned, Performance* results) {
    SHAPE(dx, w, c, dy);
    return search(handle, BackwardData, shape, c, wanted, returned, results);
}
API cudnnFindConvolutionBackwardFilterAlgorithm(Handle* handle, Tensor* x, Tensor* dy, ConvolutionDescriptor* c,
                                                Filter* dw, int wanted, int* returned, Performance* results) {
    SHAPE(x, dw, c, dy);
    return search(handle, BackwardFilter, shape, c, wanted, returned, results);
}
API cudnnFindConvolutionForwardAlgorithmEx(Handle* handle, Tensor* x_desc, const void* x, Filter* w_desc, const void* w,
                                           ConvolutionDescriptor* c, Tensor* y_desc, void* y, int wanted, int* returned,
                                           Performance* results, void* space, size_t bytes) {
    SHAPE(x_desc, w_desc, c, y_desc);
    CHECK(on_device(x, extent(*x_desc), "x"));
    CHECK(on_device(w, extent(*w_desc), "w"));
    return search_with_data(handle, Forward, shape, c, y, extent(*y_desc), space, bytes, wanted, returned, results);
}
API cudnnFindConvolutionBackwardDataAlgorithmEx(Handle* handle, Filter* w_desc, const void* w, Tensor* dy_desc,
                                                const void* dy, ConvolutionDescriptor* c, Tensor* dx_desc, void* dx,
                                                int wanted, int* returned, Performance* results, void* space,
                                                size_t bytes) {
    SHAPE(dx_desc, w_desc, c, dy_desc);
    CHECK(on_device(w, extent(*w_desc), "w"));
    CHECK(on_device(dy, extent(*dy_desc), "dy"));
    return search_with_data(handle, BackwardData, shape, c, dx, extent(*dx_desc), space, bytes, wanted, returned, results);
}
API cudnnFindConvolutionBackwardFilterAlgorithmEx(Handle* handle, Tensor* x_desc, const void* x, Tensor* dy_desc,
                                                  const void* dy, ConvolutionDescriptor* c, Filter* dw_desc, void* dw,
                                                  int wanted, int* returned, Performance* results, void* space,
                                                  size_t bytes) {
    SHAPE(x_desc, dw_desc, c, dy_desc);
    CHECK(on_device(x, extent(*x_desc), "x"));
    CHECK(on_device(dy, extent(*dy_desc), "dy"));
    return search_with_data(handle, BackwardFilter, shape, c, dw, extent(*dw_desc), space, bytes, wanted, returned,
                            results);
}
