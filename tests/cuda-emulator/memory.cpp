// Device memory.
//
// Each device owns a large reserved range of addresses backed by one memfd, so that another process can open a part of
// it. An allocation takes whole pages of it and ends where its last page ends (down to CUDA's alignment of 256 bytes);
// the pages around it stay inaccessible and addresses are not used again, so most overruns and uses of freed memory
// fault at once and the fault handler says what happened. The bytes of its pages before and after it hold a pattern
// that is checked when it is freed and when the process ends.
#include "emulator.h"
#include <cerrno>
#include <csignal>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

static const uint64_t reserve = 1ull << 43;
static const unsigned char pattern[4] = {0xFF, 0xFF, 0xFF, 0x7F};  // NaN in float32 and in bfloat16

struct Heap {
    int file = -1;
    uint64_t start = 0, next = 0, length = 0;
    size_t used = 0, peak = 0;
};
static std::mutex& mutex() {
    static auto* value = new std::mutex;
    return *value;
}
static std::vector<Heap>& heaps() {
    static auto* value = new std::vector<Heap>;
    return *value;
}
static std::map<uint64_t, Allocation>& allocations() {
    static auto* value = new std::map<uint64_t, Allocation>;
    return *value;
}
static std::map<uint64_t, Allocation>& freed() {  // for messages only
    static auto* value = new std::map<uint64_t, Allocation>;
    return *value;
}
thread_local const char* current_operation = nullptr;

static Heap& heap(int device) {
    auto& all = heaps();
    if ((int)all.size() <= device) all.resize((size_t)knobs().devices);
    Heap& h = all[(size_t)device];
    if (h.file < 0) {
        h.file = memfd_create("sideways-emulated-device", MFD_CLOEXEC);
        if (h.file < 0) die("memfd_create: %s", strerror(errno));
        void* at = mmap(nullptr, reserve, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) die("cannot reserve addresses for device memory: %s", strerror(errno));
        h.start = (uint64_t)at;
        h.next = page;
    }
    return h;
}

void fill_guard(unsigned char* from, unsigned char* to) {
    for (; from < to; from++) *from = pattern[(uint64_t)from % 4];
}
const unsigned char* broken_guard(const unsigned char* from, const unsigned char* to) {
    for (; from < to; from++)
        if (*from != pattern[(uint64_t)from % 4]) return from;
    return nullptr;
}
static void check_guards(const Allocation& a, const char* when) {
    auto* start = (const unsigned char*)a.map_start;
    auto* end = start + a.map_bytes;
    auto* data = (const unsigned char*)a.base;
    if (auto* at = broken_guard(start, data))
        die("guard zone: something wrote %zu bytes before the device allocation of %zu bytes at %p (noticed %s)",
            (size_t)(data - at), a.bytes, (const void*)data, when);
    if (auto* at = broken_guard(data + a.bytes, end))
        die("guard zone: something wrote %zu bytes past the end of the device allocation of %zu bytes at %p (noticed %s)",
            (size_t)(at - data - a.bytes), a.bytes, (const void*)data, when);
}
void check_all_guards() {
    std::unique_lock<std::mutex> lock(mutex(), std::try_to_lock);
    if (!lock) return;
    for (auto& [base, a] : allocations())
        if (a.kind != Allocation::Imported) check_guards(a, "when the process ended");
}

// Takes pages of the device's range, maps `file` from `offset` there, or its own file at the same place (file < 0).
static bool map_pages(Heap& h, uint64_t bytes, int file, uint64_t offset, uint64_t* at) {
    if (h.next + bytes + page > reserve) return false;
    uint64_t place = h.next;
    if (file < 0) {
        if (h.length < place + bytes && ftruncate(h.file, (off_t)(place + bytes))) return false;
        h.length = place + bytes;
        file = h.file;
        offset = place;
    }
    void* mapped = mmap((void*)(h.start + place), bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file,
                        (off_t)offset);
    if (mapped == MAP_FAILED) return false;
    h.next = place + bytes + page;
    *at = (uint64_t)mapped;
    return true;
}
static void unmap_pages(uint64_t start, uint64_t bytes) {
    mmap((void*)start, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

CUresult allocate_device(int device, size_t bytes, Allocation::Kind kind, uint64_t* pointer) {
    if (!bytes || !pointer) return CUDA_ERROR_INVALID_VALUE;
    std::lock_guard<std::mutex> lock(mutex());
    Heap& h = heap(device);
    if (bytes > knobs().memory || h.used + bytes > knobs().memory) return CUDA_ERROR_OUT_OF_MEMORY;
    Allocation a;
    a.bytes = bytes;
    a.device = device;
    a.kind = kind;
    a.map_bytes = round_up(round_up(bytes, 256), page);
    if (!map_pages(h, a.map_bytes, -1, 0, &a.map_start)) return CUDA_ERROR_OUT_OF_MEMORY;
    a.base = a.map_start + a.map_bytes - round_up(bytes, 256);
    fill_guard((unsigned char*)a.map_start, (unsigned char*)a.base);
    memset((void*)a.base, 0xFF, bytes);
    fill_guard((unsigned char*)a.base + bytes, (unsigned char*)(a.map_start + a.map_bytes));
    h.used += bytes;
    h.peak = std::max(h.peak, h.used);
    allocations()[a.base] = a;
    count("alloc");
    *pointer = a.base;
    return CUDA_SUCCESS;
}

CUresult release_device(uint64_t pointer) {
    std::lock_guard<std::mutex> lock(mutex());
    auto found = allocations().find(pointer);
    if (found == allocations().end() || found->second.kind == Allocation::Imported) {
        complain("free of 0x%llx, which is not (or no longer) the start of a device allocation",
                 (unsigned long long)pointer);
        return CUDA_ERROR_INVALID_VALUE;
    }
    Allocation a = found->second;
    check_guards(a, "when it was freed");
    allocations().erase(found);
    Heap& h = heap(a.device);
    unmap_pages(a.map_start, a.map_bytes);
    fallocate(h.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(a.map_start - h.start), (off_t)a.map_bytes);
    h.used -= a.bytes;
    if (freed().size() > 10000) freed().erase(freed().begin());
    freed()[a.map_start] = a;
    count("free");
    return CUDA_SUCCESS;
}

static const Allocation* containing(uint64_t pointer) {
    auto& all = allocations();
    auto after = all.upper_bound(pointer);
    if (after == all.begin()) return nullptr;
    const Allocation& a = std::prev(after)->second;
    return pointer < a.base + a.bytes ? &a : nullptr;
}
bool device_range(uint64_t pointer, size_t bytes, Allocation* found) {
    std::lock_guard<std::mutex> lock(mutex());
    const Allocation* a = containing(pointer);
    if (!a || bytes > a->base + a->bytes - pointer) return false;
    if (found) *found = *a;
    return true;
}
bool device_address(uint64_t pointer) {
    std::lock_guard<std::mutex> lock(mutex());
    for (auto& h : heaps())
        if (h.start && pointer >= h.start && pointer < h.start + reserve) return true;
    return false;
}
EXPORT int sideways_emulator_device_range(CUdeviceptr pointer, size_t bytes) { return device_range(pointer, bytes); }

// The most bytes that were allocated at once on a device.
EXPORT unsigned long long sideways_emulator_peak(int device) {
    std::lock_guard<std::mutex> lock(mutex());
    return device < (int)heaps().size() ? heaps()[(size_t)device].peak : 0;
}

// ---- Faults ----
static struct sigaction previous;
static void on_fault(int signal, siginfo_t* info, void* context) {
    auto address = (uint64_t)info->si_addr;
    std::unique_lock<std::mutex> lock(mutex(), std::try_to_lock);
    for (auto& h : heaps()) {
        if (!h.start || address < h.start || address >= h.start + reserve) continue;
        const char* who = current_operation ? current_operation : "host code";
        auto dead = freed().upper_bound(address);
        if (dead != freed().begin()) {
            const Allocation& a = std::prev(dead)->second;
            if (address < a.map_start + a.map_bytes)
                die("%s used device memory that was freed: byte %lld of an allocation of %zu bytes", who,
                    (long long)(address - a.base), a.bytes);
        }
        auto after = allocations().upper_bound(address);
        const Allocation* below = after == allocations().begin() ? nullptr : &std::prev(after)->second;
        const Allocation* above = after == allocations().end() ? nullptr : &after->second;
        if (below && address < below->map_start + below->map_bytes + page)
            die("%s is out of bounds: %llu bytes past the end of the device allocation of %zu bytes", who,
                (unsigned long long)(address - below->base - below->bytes), below->bytes);
        if (above && address + page >= above->map_start)
            die("%s is out of bounds: %llu bytes before the device allocation of %zu bytes", who,
                (unsigned long long)(above->base - address), above->bytes);
        die("%s used the device address 0x%llx, where nothing is allocated", who, (unsigned long long)address);
    }
    if (current_operation && info->si_code == SI_KERNEL)
        die("%s used a misaligned or impossible address", current_operation);
    if (current_operation) die("%s used the address 0x%llx, which is no device memory", current_operation,
                               (unsigned long long)address);
    if (previous.sa_flags & SA_SIGINFO && previous.sa_sigaction) previous.sa_sigaction(signal, info, context);
    else sigaction(signal, &previous, nullptr);  // runs again into the fault
}
void install_fault_handler() {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &previous);
}

// ---- The API: device memory ----
EXPORT CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
    ENTER(context);
    std::lock_guard<std::mutex> lock(mutex());
    *total = knobs().memory;
    *free = knobs().memory - heap(context->device).used;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuMemAlloc_v2(CUdeviceptr* pointer, size_t bytes) {
    ENTER(context);
    if (CUresult error = forbid_while_capturing(nullptr)) return error;
    return allocate_device(context->device, bytes, Allocation::Device, (uint64_t*)pointer);
}
EXPORT CUresult cuMemAllocPitch_v2(CUdeviceptr* pointer, size_t* pitch, size_t width, size_t height, unsigned) {
    *pitch = round_up(width, 512);
    return cuMemAlloc_v2(pointer, *pitch * height);
}
EXPORT CUresult cuMemAllocManaged(CUdeviceptr*, size_t, unsigned) { return CUDA_ERROR_NOT_SUPPORTED; }
EXPORT CUresult cuMemFree_v2(CUdeviceptr pointer) {
    ENTER(context);
    if (!pointer) return CUDA_SUCCESS;
    if (CUresult error = forbid_while_capturing(nullptr)) return error;
    Allocation a;
    wait_all_streams(device_range(pointer, 1, &a) ? a.device : context->device);
    count("implicit_sync");
    return release_device(pointer);
}
EXPORT CUresult cuMemAllocAsync(CUdeviceptr* pointer, size_t bytes, CUstream handle) {
    ENTER(context);
    auto stream = find_stream(context, handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (CUresult error = forbid_while_capturing(stream.get())) return error;
    // Memory that is freed by work still in the queues counts as free only when that is done.
    CUresult result = allocate_device(context->device, bytes, Allocation::Pooled, (uint64_t*)pointer);
    if (result == CUDA_ERROR_OUT_OF_MEMORY) {
        wait_all_streams(context->device);
        result = allocate_device(context->device, bytes, Allocation::Pooled, (uint64_t*)pointer);
    }
    return result;
}
EXPORT CUresult cuMemAllocFromPoolAsync(CUdeviceptr* pointer, size_t bytes, CUmemoryPool, CUstream stream) {
    return cuMemAllocAsync(pointer, bytes, stream);
}
EXPORT CUresult cuMemFreeAsync(CUdeviceptr pointer, CUstream handle) {
    ENTER(context);
    auto stream = find_stream(context, handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (CUresult error = forbid_while_capturing(stream.get())) return error;
    if (!pointer) return CUDA_SUCCESS;
    Allocation a;
    if (!device_range(pointer, 1, &a) || a.base != pointer) {
        complain("cuMemFreeAsync of 0x%llx, which is not (or no longer) the start of a device allocation", pointer);
        return CUDA_ERROR_INVALID_VALUE;
    }
    return issue(stream, {Work::Other, "cuMemFreeAsync", [pointer] { return release_device(pointer); }});
}
EXPORT CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* bytes, CUdeviceptr pointer) {
    ENTER(context);
    Allocation a;
    if (!device_range(pointer, 1, &a)) return CUDA_ERROR_NOT_FOUND;
    if (base) *base = a.base;
    if (bytes) *bytes = a.bytes;
    return CUDA_SUCCESS;
}
// Pools: one for each device, without behaviour of its own.
EXPORT CUresult cuDeviceGetDefaultMemPool(CUmemoryPool* pool, CUdevice device) {
    *pool = (CUmemoryPool)(uint64_t)(device + 1);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetMemPool(CUmemoryPool* pool, CUdevice device) {
    return cuDeviceGetDefaultMemPool(pool, device);
}
EXPORT CUresult cuDeviceSetMemPool(CUdevice, CUmemoryPool) { return CUDA_SUCCESS; }
EXPORT CUresult cuMemPoolSetAttribute(CUmemoryPool, int, void*) { return CUDA_SUCCESS; }
EXPORT CUresult cuMemPoolGetAttribute(CUmemoryPool pool, int attribute, void* value) {
    std::lock_guard<std::mutex> lock(mutex());
    Heap& h = heap((int)(uint64_t)pool - 1);
    if (attribute <= 3) *(int*)value = 1;
    else if (attribute == 4) *(uint64_t*)value = 0;                            // release threshold
    else *(uint64_t*)value = attribute == 6 || attribute == 8 ? h.peak : h.used;  // reserved, used: now and most
    return CUDA_SUCCESS;
}
EXPORT CUresult cuMemPoolTrimTo(CUmemoryPool, size_t) { return CUDA_SUCCESS; }
EXPORT CUresult cuMemPoolCreate(CUmemoryPool*, const void*) { return CUDA_ERROR_NOT_SUPPORTED; }
EXPORT CUresult cuMemPoolDestroy(CUmemoryPool) { return CUDA_ERROR_NOT_SUPPORTED; }

// ---- The API: attributes ----
EXPORT CUresult cuPointerGetAttribute(void* data, int attribute, CUdeviceptr pointer) {
    ENTER(context);
    Allocation a;
    bool device = device_range(pointer, 1, &a);
    if (!device && !pinned_range((void*)pointer, 1)) return CUDA_ERROR_INVALID_VALUE;
    switch (attribute) {
    case 1: *(CUcontext*)data = context; break;
    case 2: *(unsigned*)data = device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST; break;
    case 3: *(CUdeviceptr*)data = pointer; break;
    case 4:
        if (device) return CUDA_ERROR_INVALID_VALUE;
        *(void**)data = (void*)pointer;
        break;
    case 6: *(int*)data = 0; break;       // sync memops
    case 7: *(uint64_t*)data = device ? a.base : pointer; break;  // buffer id
    case 8: *(unsigned*)data = 0; break;  // managed
    case 9: *(int*)data = device ? a.device : context->device; break;
    case 10: *(int*)data = device && a.kind == Allocation::Device; break;  // legacy CUDA IPC capable
    case 11: *(CUdeviceptr*)data = device ? a.base : pointer; break;
    case 12: *(size_t*)data = device ? a.bytes : 1; break;
    case 13: *(int*)data = 1; break;  // mapped
    default: return CUDA_ERROR_NOT_SUPPORTED;
    }
    return CUDA_SUCCESS;
}
EXPORT CUresult cuPointerGetAttributes(unsigned n, int* attributes, void** data, CUdeviceptr pointer) {
    for (unsigned i = 0; i < n; i++)
        if (cuPointerGetAttribute(data[i], attributes[i], pointer)) memset(data[i], 0, 4);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuPointerSetAttribute(const void*, int, CUdeviceptr) { return CUDA_SUCCESS; }

// ---- The API: memory of another process ----
struct MemoryHandle {
    char magic[8];
    int process, file, device;
    uint64_t offset, map_bytes, lead, bytes;
};
static_assert(sizeof(MemoryHandle) <= sizeof(CUipcHandle));

EXPORT CUresult cuIpcGetMemHandle(CUipcHandle* handle, CUdeviceptr pointer) {
    ENTER(context);
    Allocation a;
    if (!handle || !device_range(pointer, 1, &a)) return CUDA_ERROR_INVALID_VALUE;
    if (a.kind != Allocation::Device) {
        complain("cuIpcGetMemHandle: only memory of cuMemAlloc can be shared, not that of cuMemAllocAsync");
        return CUDA_ERROR_INVALID_VALUE;
    }
    std::lock_guard<std::mutex> lock(mutex());
    Heap& h = heap(a.device);
    MemoryHandle m = {"swmemry", getpid(), h.file, a.device, a.map_start - h.start, a.map_bytes,
                      a.base - a.map_start, a.bytes};
    memset(handle, 0, sizeof *handle);
    memcpy(handle, &m, sizeof m);
    count("ipc_export");
    return CUDA_SUCCESS;
}
EXPORT CUresult cuIpcOpenMemHandle_v2(CUdeviceptr* pointer, CUipcHandle handle, unsigned flags) {
    ENTER(context);
    MemoryHandle m;
    memcpy(&m, &handle, sizeof m);
    if (!pointer || memcmp(m.magic, "swmemry", 8)) return CUDA_ERROR_INVALID_VALUE;
    if (flags != 1) return CUDA_ERROR_INVALID_VALUE;  // CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
    if (m.process == getpid()) return CUDA_ERROR_INVALID_CONTEXT;
    if (m.device != context->device && !knobs().peer) return CUDA_ERROR_PEER_ACCESS_UNSUPPORTED;
    std::string key((const char*)&m, sizeof m);
    std::lock_guard<std::mutex> lock(mutex());
    for (auto& [base, a] : allocations())
        if (a.kind == Allocation::Imported && a.key == key) {
            a.references++;
            *pointer = base;
            return CUDA_SUCCESS;
        }
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", m.process, m.file);
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0) return CUDA_ERROR_MAP_FAILED;
    Allocation a;
    bool mapped = map_pages(heap(context->device), m.map_bytes, file, m.offset, &a.map_start);
    close(file);
    if (!mapped) return CUDA_ERROR_MAP_FAILED;
    a.map_bytes = m.map_bytes;
    a.base = a.map_start + m.lead;
    a.bytes = m.bytes;
    a.device = context->device;
    a.kind = Allocation::Imported;
    a.key = key;
    allocations()[a.base] = a;
    *pointer = a.base;
    count("ipc_open");
    return CUDA_SUCCESS;
}
EXPORT CUresult cuIpcCloseMemHandle(CUdeviceptr pointer) {
    ENTER(context);
    wait_all_streams(context->device);
    std::lock_guard<std::mutex> lock(mutex());
    auto found = allocations().find(pointer);
    if (found == allocations().end() || found->second.kind != Allocation::Imported) return CUDA_ERROR_INVALID_VALUE;
    Allocation a = found->second;
    if (--found->second.references) return CUDA_SUCCESS;
    allocations().erase(found);
    unmap_pages(a.map_start, a.map_bytes);
    freed()[a.map_start] = a;
    return CUDA_SUCCESS;
}
