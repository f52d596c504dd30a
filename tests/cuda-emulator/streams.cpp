// Streams (a thread with a queue each) and host functions.
#include "emulator.h"
#include <csignal>
#include <pthread.h>
#include <unistd.h>

static std::mutex& registry_mutex() {
    static auto* value = new std::mutex;
    return *value;
}
static std::unordered_map<Stream*, std::shared_ptr<Stream>>& streams() {
    static auto* value = new std::unordered_map<Stream*, std::shared_ptr<Stream>>;
    return *value;
}

// ---- The worker ----
static void delay(Work kind) {
    const Knobs& k = knobs();
    unsigned us = kind == Work::Copy ? k.copy_delay_us : kind == Work::Launch ? k.launch_delay_us : 0;
    if (k.jitter_us && (kind == Work::Copy || kind == Work::Launch)) {
        thread_local unsigned state = (unsigned)(uint64_t)&state;
        state = state * 1664525u + 1013904223u;
        us += (state >> 8) % (k.jitter_us + 1);
    }
    if (us) usleep(us);
}

void run_operation(Context* context, const Operation& operation) {
    if (context->sticky && operation.kind != Work::Event && operation.kind != Work::Host) return;
    delay(operation.kind);
    current_operation = operation.name.c_str();
    CUresult result = operation.run();
    current_operation = nullptr;
    if (result) {
        complain("%s failed on the device with error %d", operation.name.c_str(), (int)result);
        int none = 0;
        context->sticky.compare_exchange_strong(none, result);
    }
}

static void work(std::shared_ptr<Stream> stream) {
    std::unique_lock<std::mutex> lock(stream->mutex);
    for (;;) {
        stream->work_ready.wait(lock, [&] { return !stream->queue.empty() || stream->closing; });
        if (stream->queue.empty()) return;
        Operation operation = std::move(stream->queue.front());
        stream->queue.pop_front();
        lock.unlock();
        run_operation(stream->context, operation);
        note("done", stream->id, operation.name, operation.bytes);
        operation = {};
        lock.lock();
        stream->completed++;
        stream->work_done.notify_all();
    }
}

void Stream::submit(Operation operation) {
    std::lock_guard<std::mutex> lock(mutex);
    note("issued", id, operation.name, operation.bytes);
    queue.push_back(std::move(operation));
    submitted++;
    work_ready.notify_one();
}
void Stream::wait_idle() {
    std::unique_lock<std::mutex> lock(mutex);
    unsigned long long target = submitted;
    work_done.wait(lock, [&] { return completed >= target; });
}
bool Stream::idle() {
    std::lock_guard<std::mutex> lock(mutex);
    return completed == submitted;
}

std::shared_ptr<Stream> make_stream(Context* context, unsigned flags, int priority) {
    static std::atomic<unsigned long long> next{1};
    auto stream = std::make_shared<Stream>();
    stream->context = context;
    stream->flags = flags;
    stream->priority = priority;
    stream->id = next++;
    // Signals go to the program's own threads.
    sigset_t all, before;
    sigfillset(&all);
    sigdelset(&all, SIGSEGV);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    std::thread(work, stream).detach();
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    std::lock_guard<std::mutex> lock(registry_mutex());
    streams()[stream.get()] = stream;
    return stream;
}
std::shared_ptr<Stream> find_stream(Context* context, CUstream handle) {
    if (handle == nullptr || handle == (CUstream)1) {
        static std::mutex once;
        std::lock_guard<std::mutex> lock(once);
        if (!context->null_stream) context->null_stream = make_stream(context, 0, 0);
        return context->null_stream;
    }
    if (handle == (CUstream)2) {
        thread_local std::map<Context*, std::shared_ptr<Stream>> own;
        auto& stream = own[context];
        if (!stream) stream = make_stream(context, 0, 0);
        return stream;
    }
    std::lock_guard<std::mutex> lock(registry_mutex());
    auto found = streams().find(handle);
    return found == streams().end() ? nullptr : found->second;
}
void wait_all_streams(int device) {
    std::vector<std::shared_ptr<Stream>> all;
    {
        std::lock_guard<std::mutex> lock(registry_mutex());
        for (auto& [handle, stream] : streams())
            if (stream->context->device == device) all.push_back(stream);
    }
    for (auto& stream : all) stream->wait_idle();
}

CUresult issue(const std::shared_ptr<Stream>& stream, Operation operation) {
    CUresult result = CUDA_SUCCESS;
    if (captured(stream, operation, &result)) return result;
    stream->submit(std::move(operation));
    return CUDA_SUCCESS;
}
// For libcudnn: queues `run(argument)` on a stream, or adds it to its capture; `drop(argument)` when not needed any more.
EXPORT int sideways_emulator_issue(CUstream handle, const char* name, int (*run)(void*), void* argument,
                                   void (*drop)(void*)) {
    std::shared_ptr<void> owned(argument, drop);
    ENTER(context);
    auto stream = find_stream(context, handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    return issue(stream, {Work::Launch, name, [run, owned] { return (CUresult)run(owned.get()); }});
}
EXPORT int sideways_emulator_synchronize_for_search(CUstream handle) {
    ENTER(context);
    auto stream = find_stream(context, handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (CUresult error = forbid_while_capturing(stream.get())) return error;
    count("sync");
    wait_all_streams(context->device);
    return CUDA_SUCCESS;
}

// ---- The API: streams ----
EXPORT CUresult cuStreamCreateWithPriority(CUstream* handle, unsigned flags, int priority) {
    ENTER(context);
    if (!handle || flags > 1) return CUDA_ERROR_INVALID_VALUE;
    *handle = make_stream(context, flags, priority).get();
    count("stream_create");
    return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamCreate(CUstream* handle, unsigned flags) { return cuStreamCreateWithPriority(handle, flags, 0); }
EXPORT CUresult cuStreamDestroy_v2(CUstream handle) {
    std::shared_ptr<Stream> stream;
    {
        std::lock_guard<std::mutex> lock(registry_mutex());
        auto found = streams().find(handle);
        if (found == streams().end()) return CUDA_ERROR_INVALID_HANDLE;
        stream = found->second;
        streams().erase(found);
    }
    std::lock_guard<std::mutex> lock(stream->mutex);
    stream->closing = true;  // the thread finishes the queue first
    stream->work_ready.notify_one();
    return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamSynchronize(CUstream handle) {
    STREAM(stream, handle);
    if (CUresult error = forbid_while_capturing(stream.get())) return error;
    count("sync");
    stream->wait_idle();
    return (CUresult)context->sticky.load();
}
EXPORT CUresult cuStreamQuery(CUstream handle) {
    STREAM(stream, handle);
    if (CUresult error = forbid_while_capturing(stream.get())) return error;
    return stream->idle() ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}
EXPORT CUresult cuStreamGetFlags(CUstream handle, unsigned* flags) {
    STREAM(stream, handle);
    *flags = stream->flags;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamGetPriority(CUstream handle, int* priority) {
    STREAM(stream, handle);
    *priority = stream->priority;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamGetId(CUstream handle, unsigned long long* id) {
    STREAM(stream, handle);
    *id = stream->id;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamGetCtx(CUstream handle, CUcontext* owner) {
    STREAM(stream, handle);
    *owner = stream->context;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamGetDevice(CUstream handle, CUdevice* device) {
    STREAM(stream, handle);
    *device = stream->context->device;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamAttachMemAsync(CUstream, CUdeviceptr, size_t, unsigned) { return CUDA_ERROR_NOT_SUPPORTED; }
EXPORT CUresult cuLaunchHostFunc(CUstream handle, CUhostFn function, void* data) {
    STREAM(stream, handle);
    if (!function) return CUDA_ERROR_INVALID_VALUE;
    count("host_function");
    return issue(stream, {Work::Host, "a host function", [function, data] {
                              in_host_function = true;
                              function(data);
                              in_host_function = false;
                              return CUDA_SUCCESS;
                          }});
}
