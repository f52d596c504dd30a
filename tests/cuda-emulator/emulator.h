// What the source files of the emulated driver (libcuda) share: devices, allocations, streams, captures.
#pragma once
#include "abi.h"
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

// ---- Knobs and counters (knobs.cpp) ----
struct Knobs {
    int devices;                // SIDEWAYS_EMULATOR_DEVICES
    size_t memory;              // SIDEWAYS_EMULATOR_MEMORY, bytes per device and process
    unsigned copy_delay_us;     // SIDEWAYS_EMULATOR_COPY_DELAY_US
    unsigned launch_delay_us;   // SIDEWAYS_EMULATOR_LAUNCH_DELAY_US
    unsigned capture_delay_us;  // SIDEWAYS_EMULATOR_CAPTURE_DELAY_US
    unsigned jitter_us;         // SIDEWAYS_EMULATOR_JITTER_US
    bool peer;                  // SIDEWAYS_EMULATOR_PEER
    bool shuffle_graphs;        // SIDEWAYS_EMULATOR_GRAPH_ORDER=shuffled
};
const Knobs& knobs();
void count(const char* what, unsigned long long n = 1);
// A line of the log: what became of work on a stream (0: none), and how many bytes it copies.
void note(const char* what, unsigned long long stream, const std::string& name, size_t bytes);
[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));
void complain(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- Devices and contexts (device.cpp) ----
struct Context {
    int device = 0;
    std::atomic<int> sticky{0};  // the first error of queued work; every later call returns it, as CUDA does
    std::atomic<int> references{0};
    unsigned flags = 0;
    std::shared_ptr<struct Stream> null_stream;
};
Context* current_context();  // null when the thread has none
bool is_initialized();
extern thread_local bool in_host_function;

// Checks that every call makes: initialised, not inside a host function, a current context without a sticky error.
CUresult enter(Context** context);
#define ENTER(context)                                                                                                 \
    Context* context = nullptr;                                                                                        \
    if (CUresult entered = enter(&context)) return entered

// ---- Memory (memory.cpp, host_memory.cpp) ----
const uint64_t page = 4096;
inline uint64_t round_up(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }
void fill_guard(unsigned char* from, unsigned char* to);
const unsigned char* broken_guard(const unsigned char* from, const unsigned char* to);  // the first wrong byte, or null
struct Allocation {
    uint64_t base = 0;
    size_t bytes = 0;
    int device = 0;
    enum Kind { Device, Pooled, Imported } kind = Device;
    uint64_t map_start = 0, map_bytes = 0;  // the accessible pages around it; the rest of them is guard zone
    int references = 1;                     // of an imported one
    std::string key;                        // of an imported one
};
// Whether [pointer, pointer + bytes) lies in one live device allocation.
bool device_range(uint64_t pointer, size_t bytes, Allocation* found = nullptr);
// Whether it is an address that belongs to a device, allocated or not.
bool device_address(uint64_t pointer);
// Whether it lies in page-locked host memory.
bool pinned_range(const void* pointer, size_t bytes);
bool partly_pinned(const void* pointer, size_t bytes);
CUresult allocate_device(int device, size_t bytes, Allocation::Kind kind, uint64_t* pointer);
CUresult release_device(uint64_t pointer);
void check_all_guards();
void install_fault_handler();
extern thread_local const char* current_operation;

// ---- Streams (streams.cpp; events.cpp) ----
enum class Work { Copy, Launch, Memset, Host, Event, Other };
struct Operation {
    Work kind = Work::Other;
    std::string name;
    std::function<CUresult()> run;
    size_t bytes = 0;  // of a copy
};
struct Capture;
struct Stream : std::enable_shared_from_this<Stream> {
    Context* context = nullptr;
    unsigned flags = 0;
    int priority = 0;
    unsigned long long id = 0;
    std::shared_ptr<Capture> capture;     // guarded by capture_mutex()
    std::vector<size_t> capture_tail;     // the captured nodes that its next one depends on
    std::mutex mutex;
    std::condition_variable work_ready, work_done;
    std::deque<Operation> queue;
    unsigned long long submitted = 0, completed = 0;
    bool closing = false;
    void submit(Operation operation);
    void wait_idle();
    bool idle();
};
std::shared_ptr<Stream> make_stream(Context* context, unsigned flags, int priority);
// The stream behind a handle (null: the legacy default stream; 0x2: this thread's), or an empty pointer.
std::shared_ptr<Stream> find_stream(Context* context, CUstream handle);
// The stream behind a handle that a call was given, with the checks of `ENTER`.
#define STREAM(stream, handle)                                                                                         \
    ENTER(context);                                                                                                    \
    auto stream = find_stream(context, handle);                                                                        \
    if (!stream) return CUDA_ERROR_INVALID_HANDLE
void wait_all_streams(int device);
void run_operation(Context* context, const Operation& operation);
// Queues an operation, or adds it to the stream's capture.
CUresult issue(const std::shared_ptr<Stream>& stream, Operation operation);

// ---- Captures and graphs (capture.cpp) ----
struct Node {
    Operation operation;
    std::vector<size_t> dependencies;
};
struct Capture {
    unsigned long long id = 0;
    int mode = 0;
    bool invalid = false;
    Stream* origin = nullptr;
    std::thread::id thread;
    std::vector<Node> nodes;
    std::vector<std::weak_ptr<Stream>> joined;
};
std::mutex& capture_mutex();
// Whether the stream is being captured (then the operation was recorded, or `result` says why not).
bool captured(const std::shared_ptr<Stream>& stream, Operation& operation, CUresult* result);
// An error for calls that a capture forbids: `stream` (may be null) is being captured, or this thread must not make
// unsafe calls now. The captures concerned are invalidated.
CUresult forbid_while_capturing(Stream* stream);
// What waits for a whole context ends every capture of its streams, whichever thread calls and whatever the mode.
CUresult forbid_beside_captures();
