// Initialisation, errors, devices and contexts.
#include "emulator.h"
#include <cstring>

static std::atomic<bool> initialized{false};
bool is_initialized() { return initialized; }
thread_local bool in_host_function = false;

static Context* primary(int device) {
    static auto* contexts = new std::vector<Context*>;
    static std::mutex mutex;
    std::lock_guard<std::mutex> lock(mutex);
    while ((int)contexts->size() <= device) {
        auto* context = new Context;
        context->device = (int)contexts->size();
        contexts->push_back(context);
    }
    return (*contexts)[device];
}
static bool valid(CUdevice device) { return device >= 0 && device < knobs().devices; }

static std::vector<Context*>& stack() {
    thread_local std::vector<Context*> contexts;
    return contexts;
}
Context* current_context() { return stack().empty() ? nullptr : stack().back(); }

CUresult enter(Context** context) {
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
    if (in_host_function) {
        complain("a function given to cuLaunchHostFunc calls the CUDA API: that deadlocks on a GPU");
        return CUDA_ERROR_NOT_PERMITTED;
    }
    *context = current_context();
    if (!*context) return CUDA_ERROR_INVALID_CONTEXT;
    return (CUresult)(*context)->sticky.load();
}

EXPORT CUresult cuInit(unsigned flags) {
    if (flags) return CUDA_ERROR_INVALID_VALUE;
    if (knobs().devices < 1) return CUDA_ERROR_NO_DEVICE;
    static std::once_flag once;
    std::call_once(once, install_fault_handler);
    initialized = true;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDriverGetVersion(int* version) {
    if (!version) return CUDA_ERROR_INVALID_VALUE;
    *version = 13000;
    return CUDA_SUCCESS;
}

// ---- Errors ----
struct ErrorText {
    int code;
    const char *name, *text;
};
#define E(code, text) {code, #code, text}
static const ErrorText errors[] = {
    E(CUDA_SUCCESS, "no error"),
    E(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    E(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    E(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    E(CUDA_ERROR_DEINITIALIZED, "driver shutting down"),
    E(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected"),
    E(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    E(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid"),
    E(CUDA_ERROR_INVALID_CONTEXT, "invalid device context"),
    E(CUDA_ERROR_MAP_FAILED, "mapping of buffer object failed"),
    E(CUDA_ERROR_ALREADY_MAPPED, "resource already mapped"),
    E(CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device"),
    E(CUDA_ERROR_PEER_ACCESS_UNSUPPORTED, "peer access is not supported between these two devices"),
    E(CUDA_ERROR_INVALID_PTX, "a PTX JIT compilation failed"),
    E(CUDA_ERROR_FILE_NOT_FOUND, "file not found"),
    E(CUDA_ERROR_SHARED_OBJECT_INIT_FAILED, "shared object initialization failed"),
    E(CUDA_ERROR_OPERATING_SYSTEM, "OS call failed or operation not supported on this OS"),
    E(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    E(CUDA_ERROR_ILLEGAL_STATE, "the operation cannot be performed in the present state"),
    E(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    E(CUDA_ERROR_NOT_READY, "device not ready"),
    E(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    E(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch"),
    E(CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED, "peer access is already enabled"),
    E(CUDA_ERROR_PEER_ACCESS_NOT_ENABLED, "peer access has not been enabled"),
    E(CUDA_ERROR_CONTEXT_IS_DESTROYED, "context is destroyed"),
    E(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "part or all of the requested memory range is already mapped"),
    E(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "pointer does not correspond to a registered memory region"),
    E(CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure"),
    E(CUDA_ERROR_NOT_PERMITTED, "operation not permitted"),
    E(CUDA_ERROR_NOT_SUPPORTED, "operation not supported"),
    E(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"),
    E(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "operation failed due to a previous error during capture"),
    E(CUDA_ERROR_STREAM_CAPTURE_MERGE, "operation would result in a merge of separate capture sequences"),
    E(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "capture was not ended in the same stream as it began"),
    E(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, "capturing stream has unjoined work"),
    E(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "dependency created on uncaptured work in another stream"),
    E(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "operation would make the legacy stream depend on a capturing blocking stream"),
    E(CUDA_ERROR_CAPTURED_EVENT, "operation not permitted on an event last recorded in a capturing stream"),
    E(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "attempt to terminate a thread-local capture sequence from another thread"),
    E(CUDA_ERROR_UNKNOWN, "unknown error"),
};
static const ErrorText* error(int code) {
    for (auto& entry : errors)
        if (entry.code == code) return &entry;
    return nullptr;
}
EXPORT CUresult cuGetErrorName(CUresult code, const char** text) {
    const ErrorText* entry = error(code);
    *text = entry ? entry->name : nullptr;
    return entry ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
EXPORT CUresult cuGetErrorString(CUresult code, const char** text) {
    const ErrorText* entry = error(code);
    *text = entry ? entry->text : nullptr;
    return entry ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// ---- Devices ----
#define DEVICE(device)                                                                                                 \
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;                                                               \
    if (!valid(device)) return CUDA_ERROR_INVALID_DEVICE

EXPORT CUresult cuDeviceGetCount(int* count) {
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
    *count = knobs().devices;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    DEVICE(ordinal);
    *device = ordinal;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
    DEVICE(device);
    snprintf(name, (size_t)length, "Sideways CUDA emulator (CPU)");
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
    DEVICE(device);
    memset(uuid, 0, sizeof *uuid);
    memcpy(uuid->bytes, "sideways-emu", 12);
    uuid->bytes[15] = (char)device;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) { return cuDeviceGetUuid_v2(uuid, device); }
EXPORT CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
    DEVICE(device);
    *bytes = knobs().memory;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetPCIBusId(char* text, int length, CUdevice device) {
    DEVICE(device);
    snprintf(text, (size_t)length, "0000:%02X:00.0", device + 1);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetByPCIBusId(CUdevice* device, const char* text) {
    unsigned domain = 0, bus = 0;
    if (!text || sscanf(text, "%x:%x", &domain, &bus) != 2) return CUDA_ERROR_INVALID_VALUE;
    DEVICE((int)bus - 1);
    *device = (int)bus - 1;
    return CUDA_SUCCESS;
}
// An H100's figures, except for what describes the emulator itself.
EXPORT CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice device) {
    DEVICE(device);
    static const std::unordered_map<int, int> values = {
        {1, 1024}, {2, 1024}, {3, 1024}, {4, 64},            // threads per block, block dimensions
        {5, 2147483647}, {6, 65535}, {7, 65535},             // grid dimensions
        {8, 49152}, {9, 65536}, {10, 32}, {11, 2147483647},  // shared and constant memory, warp, pitch
        {12, 65536}, {13, 1980000}, {14, 512}, {15, 1},      // registers, clock, texture alignment, overlap
        {16, 132}, {17, 0}, {18, 0}, {19, 1}, {20, 0},       // multiprocessors, timeout, integrated, map host, mode
        {31, 1}, {32, 1}, {34, 0}, {35, 0}, {36, 2619000},   // concurrent kernels, ECC, PCI device, TCC, memory clock
        {37, 5120}, {38, 52428800}, {39, 2048}, {40, 3},     // bus width, L2, threads per multiprocessor, copy engines
        {41, 1}, {50, 0}, {75, 9}, {76, 0}, {78, 1},         // unified addressing, domain, capability, priorities
        {81, 233472}, {82, 65536}, {83, 0}, {84, 0},         // shared memory, registers, managed memory
        {86, 0}, {87, 2}, {88, 0}, {89, 0}, {90, 1},         // native atomics, ratio, pageable access
        {91, 1}, {95, 1}, {97, 232448}, {99, 1},             // host pointers, cooperative, opt-in shared memory
        {102, 0}, {106, 32}, {111, 1024}, {115, 1}, {116, 0}, {120, 1}, {121, 1}, {124, 1},
    };
    if (attribute == 33) {  // PCI bus
        *value = device + 1;
        return CUDA_SUCCESS;
    }
    auto found = values.find(attribute);
    *value = found == values.end() ? 0 : found->second;
    return attribute > 0 && attribute < 256 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
EXPORT CUresult cuDeviceComputeCapability(int* major, int* minor, CUdevice device) {
    DEVICE(device);
    *major = 9;
    *minor = 0;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceCanAccessPeer(int* can, CUdevice device, CUdevice peer) {
    DEVICE(device);
    if (!valid(peer)) return CUDA_ERROR_INVALID_DEVICE;
    *can = device != peer && knobs().peer;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetP2PAttribute(int* value, int attribute, CUdevice device, CUdevice peer) {
    DEVICE(device);
    if (!valid(peer) || device == peer) return CUDA_ERROR_INVALID_DEVICE;
    *value = attribute == 2 ? knobs().peer : 0;  // access supported
    return CUDA_SUCCESS;
}

// ---- Contexts ----
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    DEVICE(device);
    *context = primary(device);
    (*context)->references++;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    DEVICE(device);
    Context* context = primary(device);
    if (context->references < 1) return CUDA_ERROR_INVALID_CONTEXT;
    if (--context->references == 0) wait_all_streams(device);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxReset_v2(CUdevice device) {
    DEVICE(device);
    wait_all_streams(device);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxSetFlags_v2(CUdevice device, unsigned flags) {
    DEVICE(device);
    primary(device)->flags = flags;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
    DEVICE(device);
    if (flags) *flags = primary(device)->flags;
    if (active) *active = primary(device)->references > 0;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxCreate_v4(CUcontext* context, void*, unsigned flags, CUdevice device) {
    DEVICE(device);
    auto* created = new Context;
    created->device = device;
    created->flags = flags;
    created->references = 1;
    stack().push_back(created);
    *context = created;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxCreate_v2(CUcontext* context, unsigned flags, CUdevice device) {
    return cuCtxCreate_v4(context, nullptr, flags, device);
}
EXPORT CUresult cuCtxDestroy_v2(CUcontext context) {
    if (!context) return CUDA_ERROR_INVALID_CONTEXT;
    wait_all_streams(context->device);
    if (current_context() == context) stack().pop_back();
    return CUDA_SUCCESS;  // kept: handles may still point to it
}
EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
    if (!stack().empty()) stack().pop_back();
    if (context) stack().push_back(context);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetCurrent(CUcontext* context) {
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
    *context = current_context();
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxPushCurrent_v2(CUcontext context) {
    if (!context) return CUDA_ERROR_INVALID_CONTEXT;
    stack().push_back(context);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxPopCurrent_v2(CUcontext* context) {
    if (stack().empty()) return CUDA_ERROR_INVALID_CONTEXT;
    if (context) *context = stack().back();
    stack().pop_back();
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetDevice(CUdevice* device) {
    ENTER(context);
    *device = context->device;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetDevice_v2(CUdevice* device, CUcontext context) {
    if (!context) return cuCtxGetDevice(device);
    *device = context->device;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSynchronize(void) {
    ENTER(context);
    if (CUresult error = forbid_beside_captures()) return error;
    count("sync");
    wait_all_streams(context->device);
    return (CUresult)context->sticky.load();
}
EXPORT CUresult cuCtxSynchronize_v2(CUcontext context) {
    if (!context) return cuCtxSynchronize();
    if (CUresult error = forbid_beside_captures()) return error;
    count("sync");
    wait_all_streams(context->device);
    return (CUresult)context->sticky.load();
}
EXPORT CUresult cuCtxGetFlags(unsigned* flags) {
    ENTER(context);
    *flags = context->flags;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetFlags(unsigned flags) {
    ENTER(context);
    context->flags = flags;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetId(CUcontext context, unsigned long long* id) {
    *id = (unsigned long long)(context ? context : current_context());
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetApiVersion(CUcontext, unsigned* version) {
    *version = 13000;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetLimit(size_t* value, int) {
    ENTER(context);
    *value = 1024;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetLimit(int, size_t) {
    ENTER(context);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetCacheConfig(int* config) {
    ENTER(context);
    *config = 0;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetCacheConfig(int) {
    ENTER(context);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    ENTER(context);
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxEnablePeerAccess(CUcontext peer, unsigned) {
    ENTER(context);
    if (!peer || peer->device == context->device) return CUDA_ERROR_INVALID_DEVICE;
    return knobs().peer ? CUDA_SUCCESS : CUDA_ERROR_PEER_ACCESS_UNSUPPORTED;
}
EXPORT CUresult cuCtxDisablePeerAccess(CUcontext) { return CUDA_SUCCESS; }
EXPORT CUresult cuProfilerStart(void) { return CUDA_SUCCESS; }
EXPORT CUresult cuProfilerStop(void) { return CUDA_SUCCESS; }
