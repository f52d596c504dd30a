// cuDNN: version, handles and descriptors.
#include "cudnn.h"
#include <cstdio>
#include <cstring>

extern "C" int cuCtxSynchronize(void);

static thread_local std::string last_error;
Status refuse(Status status, const std::string& why) {
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
    cuCtxSynchronize();  // as the documentation has it
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
size_t extent(const Tensor& t) {
    size_t last = 0;
    for (int i = 0; i < t.rank; i++) last += (size_t)(t.dims[i] - 1) * (size_t)t.strides[i];
    return (last + 1) * element(t.type);
}
size_t extent(const Filter& f) {
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
Status shape_of(const Tensor* x, const Filter* w, const ConvolutionDescriptor* c, const Tensor* y, Shape* shape) {
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
