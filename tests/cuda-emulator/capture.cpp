// Stream capture and graphs.
//
// A capture records the operations of its streams with what each depends on. A graph is replayed on one stream, in the
// order of issue or (a knob) in another order that its dependencies allow, which shows a missing one.
#include "emulator.h"
#include <algorithm>

struct Graph {
    std::vector<Node> nodes;
};
struct GraphExec {
    std::shared_ptr<std::vector<Node>> nodes;
};

std::mutex& capture_mutex() {
    static auto* value = new std::mutex;
    return *value;
}
static std::vector<std::weak_ptr<Capture>>& active() {
    static auto* value = new std::vector<std::weak_ptr<Capture>>;
    return *value;
}
static thread_local int thread_mode = CU_CAPTURE_GLOBAL;

bool captured(const std::shared_ptr<Stream>& stream, Operation& operation, CUresult* result) {
    std::unique_lock<std::mutex> lock(capture_mutex());
    if (stream->capture && knobs().capture_delay_us) {
        lock.unlock();
        std::this_thread::sleep_for(std::chrono::microseconds(knobs().capture_delay_us));
        lock.lock();
    }
    auto& capture = stream->capture;
    if (!capture) return false;
    if (capture->invalid) {
        *result = CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        return true;
    }
    capture->nodes.push_back({std::move(operation), stream->capture_tail});
    stream->capture_tail = {capture->nodes.size() - 1};
    return true;
}

CUresult forbid_while_capturing(Stream* stream) {
    std::lock_guard<std::mutex> lock(capture_mutex());
    if (stream) {
        if (!stream->capture) return CUDA_SUCCESS;
        stream->capture->invalid = true;
        complain("a call that is not permitted while its stream is captured");
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    if (thread_mode == CU_CAPTURE_RELAXED) return CUDA_SUCCESS;
    bool forbidden = false;
    for (auto& weak : active())
        if (auto capture = weak.lock()) {
            bool mine = capture->thread == std::this_thread::get_id();
            if (capture->mode == CU_CAPTURE_RELAXED && mine) continue;
            if (capture->mode != CU_CAPTURE_GLOBAL && !mine) continue;
            capture->invalid = true;
            forbidden = true;
        }
    if (forbidden) complain("an allocation, free or synchronisation while a stream is captured");
    return forbidden ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}

CUresult forbid_beside_captures() {
    std::lock_guard<std::mutex> lock(capture_mutex());
    bool forbidden = false;
    for (auto& weak : active())
        if (auto capture = weak.lock()) {
            capture->invalid = true;
            forbidden = true;
        }
    if (forbidden) complain("a wait for the whole context while one of its streams is captured");
    return forbidden ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}

// ---- The API: capture ----
EXPORT CUresult cuStreamBeginCapture_v2(CUstream handle, int mode) {
    STREAM(stream, handle);
    if (mode < 0 || mode > 2) return CUDA_ERROR_INVALID_VALUE;
    if (handle == nullptr || handle == (CUstream)1) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;  // the legacy stream
    static std::atomic<unsigned long long> next{1};
    std::lock_guard<std::mutex> lock(capture_mutex());
    if (stream->capture) return CUDA_ERROR_ILLEGAL_STATE;
    auto capture = std::make_shared<Capture>();
    capture->id = next++;
    capture->mode = mode;
    capture->origin = stream.get();
    capture->thread = std::this_thread::get_id();
    capture->joined.push_back(stream);
    stream->capture = capture;
    stream->capture_tail.clear();
    auto& all = active();
    all.erase(std::remove_if(all.begin(), all.end(), [](auto& weak) { return weak.expired(); }), all.end());
    all.push_back(capture);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
    STREAM(stream, handle);
    if (!graph) return CUDA_ERROR_INVALID_VALUE;
    *graph = nullptr;
    std::lock_guard<std::mutex> lock(capture_mutex());
    auto capture = stream->capture;
    if (!capture) return CUDA_ERROR_ILLEGAL_STATE;
    if (capture->origin != stream.get()) return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
    if (capture->mode != CU_CAPTURE_RELAXED && capture->thread != std::this_thread::get_id())
        return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
    // Everything captured in the other streams must have been joined into this one.
    std::vector<bool> reached(capture->nodes.size());
    std::vector<size_t> pending = stream->capture_tail;
    while (!pending.empty()) {
        size_t node = pending.back();
        pending.pop_back();
        if (reached[node]) continue;
        reached[node] = true;
        for (size_t dependency : capture->nodes[node].dependencies) pending.push_back(dependency);
    }
    bool unjoined = std::find(reached.begin(), reached.end(), false) != reached.end();
    for (auto& weak : capture->joined)
        if (auto other = weak.lock()) {
            other->capture.reset();
            other->capture_tail.clear();
        }
    if (capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    if (unjoined) return CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
    *graph = new Graph{std::move(capture->nodes)};
    capture->invalid = true;  // for events that still point to it
    count("capture");
    return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamIsCapturing(CUstream handle, int* status) {
    STREAM(stream, handle);
    std::lock_guard<std::mutex> lock(capture_mutex());
    *status = !stream->capture            ? CU_STREAM_CAPTURE_STATUS_NONE
              : stream->capture->invalid ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                         : CU_STREAM_CAPTURE_STATUS_ACTIVE;
    return CUDA_SUCCESS;
}
static CUresult capture_info(CUstream handle, int* status, unsigned long long* id, CUgraph* graph, size_t* n) {
    if (CUresult error = cuStreamIsCapturing(handle, status)) return error;
    if (graph) *graph = nullptr;
    if (n) *n = 0;
    if (id) {
        auto stream = find_stream(current_context(), handle);
        std::lock_guard<std::mutex> lock(capture_mutex());
        *id = stream->capture ? stream->capture->id : 0;
    }
    return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamGetCaptureInfo_v2(CUstream stream, int* status, unsigned long long* id, CUgraph* graph,
                                          const void** dependencies, size_t* n) {
    if (dependencies) *dependencies = nullptr;
    return capture_info(stream, status, id, graph, n);
}
EXPORT CUresult cuStreamGetCaptureInfo_v3(CUstream stream, int* status, unsigned long long* id, CUgraph* graph,
                                          const void** dependencies, const void** edges, size_t* n) {
    if (dependencies) *dependencies = nullptr;
    if (edges) *edges = nullptr;
    return capture_info(stream, status, id, graph, n);
}
EXPORT CUresult cuThreadExchangeStreamCaptureMode(int* mode) {
    if (!mode || *mode < 0 || *mode > 2) return CUDA_ERROR_INVALID_VALUE;
    std::swap(*mode, thread_mode);
    return CUDA_SUCCESS;
}

// ---- The API: graphs ----
EXPORT CUresult cuGraphCreate(CUgraph* graph, unsigned) {
    *graph = new Graph;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphDestroy(CUgraph graph) {
    if (!graph) return CUDA_ERROR_INVALID_VALUE;
    delete graph;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphGetNodes(CUgraph graph, void** nodes, size_t* n) {
    if (nodes) return CUDA_ERROR_NOT_SUPPORTED;
    *n = graph->nodes.size();
    return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphInstantiateWithFlags(CUgraphExec* exec, CUgraph graph, unsigned long long flags) {
    ENTER(context);
    if (!exec || !graph || flags > 15) return CUDA_ERROR_INVALID_VALUE;
    if ((flags & CU_GRAPH_DEVICE_LAUNCH) && (flags & CU_GRAPH_AUTO_FREE)) return CUDA_ERROR_INVALID_VALUE;
    *exec = new GraphExec{std::make_shared<std::vector<Node>>(graph->nodes)};
    count("graph_instantiate");
    return CUDA_SUCCESS;
}
struct InstantiateParams {
    unsigned long long flags;
    CUstream upload;
    void* error_node;
    int result;
};
EXPORT CUresult cuGraphInstantiateWithParams(CUgraphExec* exec, CUgraph graph, InstantiateParams* params) {
    params->error_node = nullptr;
    params->result = 0;
    return cuGraphInstantiateWithFlags(exec, graph, params->flags);
}
EXPORT CUresult cuGraphExecDestroy(CUgraphExec exec) {
    if (!exec) return CUDA_ERROR_INVALID_VALUE;
    delete exec;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphUpload(CUgraphExec exec, CUstream) { return exec ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }

static std::vector<size_t> shuffled(const std::vector<Node>& nodes, unsigned seed) {
    std::vector<std::vector<size_t>> next(nodes.size());
    std::vector<size_t> missing(nodes.size()), ready, order;
    for (size_t i = 0; i < nodes.size(); i++) {
        missing[i] = nodes[i].dependencies.size();
        for (size_t dependency : nodes[i].dependencies) next[dependency].push_back(i);
        if (!missing[i]) ready.push_back(i);
    }
    while (!ready.empty()) {
        seed = seed * 1664525u + 1013904223u;
        std::swap(ready[(seed >> 8) % ready.size()], ready.back());
        size_t node = ready.back();
        ready.pop_back();
        order.push_back(node);
        for (size_t after : next[node])
            if (!--missing[after]) ready.push_back(after);
    }
    return order;
}
EXPORT CUresult cuGraphLaunch(CUgraphExec exec, CUstream handle) {
    STREAM(stream, handle);
    if (!exec) return CUDA_ERROR_INVALID_VALUE;
    count("graph_launch");
    static std::atomic<unsigned> seed{1};
    auto nodes = exec->nodes;
    unsigned own = seed++;
    Context* owner = stream->context;
    return issue(stream, {Work::Other, "cuGraphLaunch", [nodes, own, owner] {
                              if (knobs().shuffle_graphs)
                                  for (size_t i : shuffled(*nodes, own)) run_operation(owner, (*nodes)[i].operation);
                              else
                                  for (auto& node : *nodes) run_operation(owner, node.operation);
                              return CUDA_SUCCESS;
                          }});
}
EXPORT CUresult cuGraphExecUpdate_v2(CUgraphExec, CUgraph, void*) { return CUDA_ERROR_NOT_SUPPORTED; }
