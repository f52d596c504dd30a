// Events, of this process and shared with others.
#include "emulator.h"
#include <chrono>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

using Clock = std::chrono::steady_clock;

static std::mutex& registry_mutex() {
    static auto* value = new std::mutex;
    return *value;
}

struct Moment {  // one recording of an event
    std::mutex mutex;
    std::condition_variable changed;
    bool done = false;
    Clock::time_point at;
};
struct Shared {  // of an event that other processes may open
    std::atomic<unsigned long long> recorded, done;
};
struct Event {
    Context* context = nullptr;
    unsigned flags = 0;
    std::shared_ptr<Moment> moment;
    Shared* shared = nullptr;
    int file = -1;
    std::weak_ptr<Capture> capture;  // set when last recorded in a capture
    std::vector<size_t> captured_at;
};
static std::unordered_map<Event*, std::shared_ptr<Event>>& events() {
    static auto* value = new std::unordered_map<Event*, std::shared_ptr<Event>>;
    return *value;
}
static std::shared_ptr<Event> find_event(CUevent handle) {
    std::lock_guard<std::mutex> lock(registry_mutex());
    auto found = events().find(handle);
    return found == events().end() ? nullptr : found->second;
}
static CUevent add_event(std::shared_ptr<Event> event) {
    std::lock_guard<std::mutex> lock(registry_mutex());
    CUevent handle = event.get();
    events()[handle] = std::move(event);
    return handle;
}
static void wait_for(Moment& moment) {
    std::unique_lock<std::mutex> lock(moment.mutex);
    moment.changed.wait(lock, [&] { return moment.done; });
}
static void wait_for(Shared& shared, unsigned long long target) {
    while (shared.done.load() < target) usleep(20);
}
static Operation recording(std::shared_ptr<Event> event, std::shared_ptr<Moment> moment, unsigned long long sequence) {
    return {Work::Event, "cuEventRecord", [event, moment, sequence] {
                if (event->shared) {
                    unsigned long long seen = event->shared->done.load();
                    while (seen < sequence && !event->shared->done.compare_exchange_weak(seen, sequence)) {}
                }
                std::lock_guard<std::mutex> lock(moment->mutex);
                moment->at = Clock::now();
                moment->done = true;
                moment->changed.notify_all();
                return CUDA_SUCCESS;
            }};
}

EXPORT CUresult cuEventCreate(CUevent* handle, unsigned flags) {
    ENTER(context);
    if (!handle || flags > 7) return CUDA_ERROR_INVALID_VALUE;
    auto event = std::make_shared<Event>();
    event->context = context;
    event->flags = flags;
    if (flags & CU_EVENT_INTERPROCESS) {
        if (!(flags & CU_EVENT_DISABLE_TIMING)) return CUDA_ERROR_INVALID_VALUE;
        event->file = memfd_create("sideways-emulated-event", MFD_CLOEXEC);
        if (event->file < 0 || ftruncate(event->file, sizeof(Shared))) return CUDA_ERROR_OPERATING_SYSTEM;
        event->shared = (Shared*)mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, event->file, 0);
        if (event->shared == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    }
    *handle = add_event(std::move(event));
    count("event_create");
    return CUDA_SUCCESS;
}
EXPORT CUresult cuEventDestroy_v2(CUevent handle) {
    std::shared_ptr<Event> event;
    std::lock_guard<std::mutex> lock(registry_mutex());
    auto found = events().find(handle);
    if (found == events().end()) return CUDA_ERROR_INVALID_HANDLE;
    if (found->second->file >= 0) close(found->second->file);  // its page stays mapped: others may wait on it
    events().erase(found);
    return CUDA_SUCCESS;
}
#define EVENT(event, handle)                                                                                           \
    auto event = find_event(handle);                                                                                   \
    if (!event) return CUDA_ERROR_INVALID_HANDLE
EXPORT CUresult cuEventRecordWithFlags(CUevent handle, CUstream stream_handle, unsigned flags) {
    STREAM(stream, stream_handle);
    EVENT(event, handle);
    if (event->context != stream->context) {
        complain("an event is recorded in a stream of another context than its own");
        return CUDA_ERROR_INVALID_HANDLE;
    }
    count("event_record");
    if (!(flags & CU_EVENT_RECORD_EXTERNAL)) {
        std::lock_guard<std::mutex> lock(capture_mutex());
        if (stream->capture) {
            if (stream->capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
            event->capture = stream->capture;
            event->captured_at = stream->capture_tail;
            return CUDA_SUCCESS;
        }
        event->capture.reset();
    }
    auto moment = std::make_shared<Moment>();
    event->moment = moment;
    unsigned long long sequence = event->shared ? ++event->shared->recorded : 0;
    return issue(stream, recording(event, moment, sequence));
}
EXPORT CUresult cuEventRecord(CUevent handle, CUstream stream) { return cuEventRecordWithFlags(handle, stream, 0); }

EXPORT CUresult cuStreamWaitEvent(CUstream stream_handle, CUevent handle, unsigned flags) {
    STREAM(stream, stream_handle);
    EVENT(event, handle);
    count("event_wait");
    if (!(flags & CU_EVENT_WAIT_EXTERNAL)) {
        std::lock_guard<std::mutex> lock(capture_mutex());
        auto from = event->capture.lock();
        if (from) {  // the stream joins the capture, or waits within it
            if (from->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
            if (!stream->capture) {
                stream->capture = from;
                stream->capture_tail.clear();
                from->joined.push_back(stream);
            } else if (stream->capture != from) {
                from->invalid = stream->capture->invalid = true;
                return CUDA_ERROR_STREAM_CAPTURE_MERGE;
            }
            for (size_t node : event->captured_at) stream->capture_tail.push_back(node);
            return CUDA_SUCCESS;
        }
        if (stream->capture && (event->moment || event->shared)) {
            complain("a stream being captured waits on an event that was recorded outside of the capture");
            stream->capture->invalid = true;
            return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
        }
    }
    if (event->shared) {
        Shared* shared = event->shared;
        unsigned long long target = shared->recorded.load();
        return issue(stream, {Work::Event, "cuStreamWaitEvent", [event, shared, target] {
                                  wait_for(*shared, target);
                                  return CUDA_SUCCESS;
                              }});
    }
    auto moment = event->moment;
    if (!moment) return CUDA_SUCCESS;
    return issue(stream, {Work::Event, "cuStreamWaitEvent", [moment] {
                              wait_for(*moment);
                              return CUDA_SUCCESS;
                          }});
}
static CUresult forbid_captured(Event& event) {
    std::lock_guard<std::mutex> lock(capture_mutex());
    auto capture = event.capture.lock();
    if (!capture) return CUDA_SUCCESS;
    capture->invalid = true;
    return CUDA_ERROR_CAPTURED_EVENT;
}
EXPORT CUresult cuEventQuery(CUevent handle) {
    ENTER(context);
    EVENT(event, handle);
    if (CUresult error = forbid_captured(*event)) return error;
    if (event->shared)
        return event->shared->done.load() >= event->shared->recorded.load() ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
    if (!event->moment) return CUDA_SUCCESS;
    std::lock_guard<std::mutex> lock(event->moment->mutex);
    return event->moment->done ? (CUresult)context->sticky.load() : CUDA_ERROR_NOT_READY;
}
EXPORT CUresult cuEventSynchronize(CUevent handle) {
    ENTER(context);
    EVENT(event, handle);
    if (CUresult error = forbid_captured(*event)) return error;
    count("event_sync");
    if (event->shared) wait_for(*event->shared, event->shared->recorded.load());
    else if (auto moment = event->moment) wait_for(*moment);
    return (CUresult)context->sticky.load();
}
EXPORT CUresult cuEventElapsedTime_v2(float* milliseconds, CUevent start_handle, CUevent end_handle) {
    ENTER(context);
    EVENT(start, start_handle);
    EVENT(end, end_handle);
    if ((start->flags | end->flags) & CU_EVENT_DISABLE_TIMING) return CUDA_ERROR_INVALID_HANDLE;
    auto first = start->moment, last = end->moment;
    if (!first || !last) return CUDA_ERROR_INVALID_HANDLE;
    Clock::time_point times[2];
    for (auto* moment : {first.get(), last.get()}) {
        std::lock_guard<std::mutex> lock(moment->mutex);
        if (!moment->done) return CUDA_ERROR_NOT_READY;
        times[moment == last.get()] = moment->at;
    }
    *milliseconds = std::chrono::duration<float, std::milli>(times[1] - times[0]).count();
    if (first == last) *milliseconds = 0;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
    return cuEventElapsedTime_v2(milliseconds, start, end);
}

struct EventHandle {
    char magic[8];
    int process, file;
};
EXPORT CUresult cuIpcGetEventHandle(CUipcHandle* handle, CUevent event_handle) {
    ENTER(context);
    EVENT(event, event_handle);
    if (!event->shared || event->file < 0) return CUDA_ERROR_INVALID_HANDLE;
    EventHandle e = {"swevent", getpid(), event->file};
    memset(handle, 0, sizeof *handle);
    memcpy(handle, &e, sizeof e);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuIpcOpenEventHandle(CUevent* event_handle, CUipcHandle handle) {
    ENTER(context);
    EventHandle e;
    memcpy(&e, &handle, sizeof e);
    if (memcmp(e.magic, "swevent", 8)) return CUDA_ERROR_INVALID_HANDLE;
    if (e.process == getpid()) return CUDA_ERROR_INVALID_CONTEXT;
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", e.process, e.file);
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0) return CUDA_ERROR_MAP_FAILED;
    auto event = std::make_shared<Event>();
    event->context = context;
    event->flags = CU_EVENT_INTERPROCESS | CU_EVENT_DISABLE_TIMING;
    event->shared = (Shared*)mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (event->shared == MAP_FAILED) return CUDA_ERROR_MAP_FAILED;
    *event_handle = add_event(std::move(event));
    return CUDA_SUCCESS;
}
