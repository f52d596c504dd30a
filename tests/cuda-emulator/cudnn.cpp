// cuDNN: the convolution API, queued on the handle's stream.
#include "cudnn.h"
#include <atomic>
#include <cstring>
#include <functional>

// From libcuda.
extern "C" int sideways_emulator_issue(CUstream, const char*, int (*)(void*), void*, void (*)(void*));
extern "C" int sideways_emulator_synchronize_for_search(CUstream);
extern "C" int sideways_emulator_device_range(CUdeviceptr, size_t);
extern "C" void sideways_emulator_add(const char*, unsigned long long);
extern "C" [[noreturn]] void sideways_emulator_die(const char*);

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
