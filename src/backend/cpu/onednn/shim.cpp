// A convolution's three products on oneDNN, as C functions. oneDNN's C interface for making primitives changed between
// 2.x and 3.x; its C++ interface differs in one place, `describe` below.
//
// Activations are NHWC; weights in whatever layout oneDNN prefers ("packed"), with reorders from and to OIHW.
// Everything computes on the calling thread alone: callers cut work among threads of their own, at places that do not
// depend on their number. Products may run on several threads at once.
// Every function returns 0 (or null) and a message where oneDNN throws.

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#if __has_include(<oneapi/dnnl/dnnl.hpp>)
#include <oneapi/dnnl/dnnl.hpp>
#else
#include <dnnl.hpp>
#endif
#if DNNL_CPU_RUNTIME == DNNL_RUNTIME_OMP
#include <omp.h>
#endif

using namespace dnnl;
using tag = memory::format_tag;

namespace {

const auto f32 = memory::data_type::f32;
const auto direct = algorithm::convolution_direct;
enum product { forward = 0, input_gradient = 1, weight_gradient = 2 };

engine &cpu() {
    static engine the(engine::kind::cpu, 0);
    return the;
}

// Products are cut into threads when they are made as well as when they run.
void on_one_thread() {
#if DNNL_CPU_RUNTIME == DNNL_RUNTIME_OMP
    omp_set_num_threads(1);
#endif
}

stream &queue() {
    static thread_local stream the(cpu());
    on_one_thread();
    return the;
}

struct descs {
    memory::desc x, w, bias, y;
    memory::dims strides, padding;
};

#if DNNL_VERSION_MAJOR >= 3
convolution_forward::primitive_desc describe_forward(const descs &d, const primitive_attr &attr) {
    return {cpu(), prop_kind::forward_training, direct, d.x, d.w, d.bias, d.y, d.strides, d.padding, d.padding, attr};
}
convolution_backward_data::primitive_desc describe_data(
        const descs &d, const convolution_forward::primitive_desc &hint, const primitive_attr &attr) {
    return {cpu(), direct, d.x, d.w, d.y, d.strides, d.padding, d.padding, hint, attr};
}
convolution_backward_weights::primitive_desc describe_weights(
        const descs &d, const convolution_forward::primitive_desc &hint, const primitive_attr &attr) {
    return {cpu(), direct, d.x, d.w, d.y, d.strides, d.padding, d.padding, hint, attr};
}
#else
convolution_forward::primitive_desc describe_forward(const descs &d, const primitive_attr &attr) {
    return {{prop_kind::forward_training, direct, d.x, d.w, d.bias, d.y, d.strides, d.padding, d.padding}, attr, cpu()};
}
convolution_backward_data::primitive_desc describe_data(
        const descs &d, const convolution_forward::primitive_desc &hint, const primitive_attr &attr) {
    return {{direct, d.x, d.w, d.y, d.strides, d.padding, d.padding}, attr, cpu(), hint};
}
convolution_backward_weights::primitive_desc describe_weights(
        const descs &d, const convolution_forward::primitive_desc &hint, const primitive_attr &attr) {
    return {{direct, d.x, d.w, d.y, d.strides, d.padding, d.padding}, attr, cpu(), hint};
}
#endif

memory at(const memory::desc &desc, const void *at) {
    return memory(desc, cpu(), const_cast<void *>(at));
}

template <typename F>
int guarded(char *message, size_t room, F f) {
    try {
        f();
        return 0;
    } catch (const std::exception &e) {
        std::strncpy(message, e.what(), room - 1);
        message[room - 1] = 0;
        return 1;
    }
}

} // namespace

extern "C" {

struct sw_product {
    product kind;
    primitive run;
    // Activations below (x, or its cotangent), weights packed and plain, activations above.
    memory::desc x, w, plain, bias, y, scratch;
    std::string name;
    bool has_bias;
};

// shape: b, c, h, w, o, kh, kw, stride h, stride w, padding h, padding w, groups, 1 for a bias.
sw_product *sw_product_new(const int64_t *s, int kind, char *message, size_t room) {
    sw_product *made = nullptr;
    on_one_thread();
    int failed = guarded(message, room, [&] {
        std::unique_ptr<sw_product> p(new sw_product);
        int64_t b = s[0], c = s[1], h = s[2], w = s[3], o = s[4], kh = s[5], kw = s[6], g = s[11];
        int64_t oh = (h + 2 * s[9] - kh) / s[7] + 1, ow = (w + 2 * s[10] - kw) / s[8] + 1;
        memory::dims weight = g == 1 ? memory::dims {o, c, kh, kw} : memory::dims {g, o / g, c / g, kh, kw};
        p->plain = memory::desc(weight, f32, g == 1 ? tag::oihw : tag::goihw);
        p->has_bias = s[12] != 0;
        descs d {memory::desc({b, c, h, w}, f32, tag::nhwc), memory::desc(weight, f32, tag::any),
                p->has_bias ? memory::desc({o}, f32, tag::x) : memory::desc(), memory::desc({b, o, oh, ow}, f32, tag::nhwc),
                {s[7], s[8]}, {s[9], s[10]}};
        primitive_attr attr;
        attr.set_scratchpad_mode(scratchpad_mode::user);
        p->kind = product(kind);
        auto fwd = describe_forward(d, attr);
        memory::desc packed, scratch;
        if (p->kind == forward) {
            packed = fwd.weights_desc(), scratch = fwd.scratchpad_desc(), p->name = fwd.impl_info_str();
            p->run = convolution_forward(fwd);
        } else if (p->kind == input_gradient) {
            auto pd = describe_data(d, fwd, attr);
            packed = pd.weights_desc(), scratch = pd.scratchpad_desc(), p->name = pd.impl_info_str();
            p->run = convolution_backward_data(pd);
        } else {
            auto pd = describe_weights(d, fwd, attr);
            packed = pd.diff_weights_desc(), scratch = pd.scratchpad_desc(), p->name = pd.impl_info_str();
            p->run = convolution_backward_weights(pd);
        }
        p->x = d.x, p->w = packed, p->y = d.y, p->bias = d.bias, p->scratch = scratch;
        made = p.release();
    });
    return failed ? nullptr : made;
}

void sw_product_free(sw_product *p) {
    delete p;
}

const char *sw_product_name(const sw_product *p) {
    return p->name.c_str();
}

size_t sw_product_packed_bytes(const sw_product *p) {
    return p->w.get_size();
}

size_t sw_product_scratch_bytes(const sw_product *p) {
    return p->scratch.get_size();
}

// Reorders weights: from OIHW to packed, or back.
int sw_product_reorder(const sw_product *p, const float *from, float *to, int unpack, char *message, size_t room) {
    return guarded(message, room, [&] {
        memory a = at(unpack ? p->w : p->plain, from), b = at(unpack ? p->plain : p->w, to);
        reorder(a, b).execute(queue(), a, b);
        queue().wait();
    });
}

// x, w and y as the product has them: the one that it computes is written, the others are read.
int sw_product_run(
        const sw_product *p, void *x, void *w, const void *bias, void *y, void *scratch, char *message, size_t room) {
    return guarded(message, room, [&] {
        memory xm = at(p->x, x), wm = at(p->w, w), ym = at(p->y, y);
        std::unordered_map<int, memory> args {{DNNL_ARG_SCRATCHPAD, at(p->scratch, scratch)}};
        if (p->kind == forward) {
            args.insert({{DNNL_ARG_SRC, xm}, {DNNL_ARG_WEIGHTS, wm}, {DNNL_ARG_DST, ym}});
            if (p->has_bias) args.insert({DNNL_ARG_BIAS, at(p->bias, bias)});
        } else if (p->kind == input_gradient) {
            args.insert({{DNNL_ARG_DIFF_SRC, xm}, {DNNL_ARG_WEIGHTS, wm}, {DNNL_ARG_DIFF_DST, ym}});
        } else {
            args.insert({{DNNL_ARG_SRC, xm}, {DNNL_ARG_DIFF_WEIGHTS, wm}, {DNNL_ARG_DIFF_DST, ym}});
        }
        p->run.execute(queue(), args);
        queue().wait();
    });
}

// c = op(a) op(b) + beta c, row-major, op transposing where the letter is 'T' (m by n, inner dimension k). 0: done.
int sw_sgemm(char ta, char tb, int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb,
        float beta, float *c, int64_t ldc) {
    on_one_thread();
    return dnnl_sgemm(ta, tb, m, n, k, 1.0f, a, lda, b, ldb, beta, c, ldc) != dnnl_success;
}

// The library's version: major, minor, patch.
void sw_version(int *out) {
    const dnnl_version_t *v = dnnl_version();
    out[0] = v->major, out[1] = v->minor, out[2] = v->patch;
}
}
