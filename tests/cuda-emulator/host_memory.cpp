// Page-locked host memory: allocated here, between guard zones, or registered by the program.
#include "emulator.h"
#include <cstring>
#include <sys/mman.h>

static std::mutex& mutex() {
    static auto* value = new std::mutex;
    return *value;
}
struct Pinned {
    size_t bytes;
    bool ours;  // by cuMemHostAlloc; else registered
};
static std::map<uint64_t, Pinned>& pinned() {
    static auto* value = new std::map<uint64_t, Pinned>;
    return *value;
}

bool pinned_range(const void* pointer, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex());
    auto at = (uint64_t)pointer;
    auto after = pinned().upper_bound(at);
    if (after == pinned().begin()) return false;
    auto& [start, region] = *std::prev(after);
    return at + bytes <= start + region.bytes;
}
// Whether a part of it is, and a part is not.
bool partly_pinned(const void* pointer, size_t bytes) {
    if (pinned_range(pointer, bytes)) return false;
    std::lock_guard<std::mutex> lock(mutex());
    auto at = (uint64_t)pointer;
    auto next = pinned().lower_bound(at + bytes);
    if (next == pinned().begin()) return false;
    auto& [start, region] = *std::prev(next);
    return start + region.bytes > at;
}
EXPORT CUresult cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
    ENTER(context);
    if (!bytes || !pointer) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult error = forbid_while_capturing(nullptr)) return error;
    size_t pages = round_up(bytes, page);
    auto* mapped = (unsigned char*)mmap(nullptr, pages + 2 * page, PROT_READ | PROT_WRITE,
                                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    mprotect(mapped, page, PROT_NONE);
    mprotect(mapped + page + pages, page, PROT_NONE);
    memset(mapped + page, 0xFF, bytes);
    fill_guard(mapped + page + bytes, mapped + page + pages);
    *pointer = mapped + page;
    std::lock_guard<std::mutex> lock(mutex());
    pinned()[(uint64_t)*pointer] = {bytes, true};
    count("host_alloc");
    return CUDA_SUCCESS;
}
EXPORT CUresult cuMemAllocHost_v2(void** pointer, size_t bytes) { return cuMemHostAlloc(pointer, bytes, 0); }
EXPORT CUresult cuMemFreeHost(void* pointer) {
    ENTER(context);
    if (!pointer) return CUDA_SUCCESS;
    if (CUresult error = forbid_while_capturing(nullptr)) return error;
    wait_all_streams(context->device);
    std::lock_guard<std::mutex> lock(mutex());
    auto found = pinned().find((uint64_t)pointer);
    if (found == pinned().end() || !found->second.ours) return CUDA_ERROR_INVALID_VALUE;
    size_t bytes = found->second.bytes, pages = round_up(bytes, page);
    auto* start = (unsigned char*)pointer;
    if (broken_guard(start + bytes, start + pages))
        die("guard zone: something wrote past the end of the page-locked host allocation of %zu bytes", bytes);
    pinned().erase(found);
    munmap(start - page, pages + 2 * page);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuMemHostRegister_v2(void* pointer, size_t bytes, unsigned) {
    ENTER(context);
    if (!pointer || !bytes) return CUDA_ERROR_INVALID_VALUE;
    if (pinned_range(pointer, 1)) return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    std::lock_guard<std::mutex> lock(mutex());
    pinned()[(uint64_t)pointer] = {bytes, false};
    count("host_register");
    return CUDA_SUCCESS;
}
EXPORT CUresult cuMemHostUnregister(void* pointer) {
    ENTER(context);
    wait_all_streams(context->device);
    std::lock_guard<std::mutex> lock(mutex());
    auto found = pinned().find((uint64_t)pointer);
    if (found == pinned().end() || found->second.ours) return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
    pinned().erase(found);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* device, void* pointer, unsigned) {
    if (!pinned_range(pointer, 1)) return CUDA_ERROR_INVALID_VALUE;
    *device = (CUdeviceptr)pointer;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuMemHostGetFlags(unsigned* flags, void* pointer) {
    if (!pinned_range(pointer, 1)) return CUDA_ERROR_INVALID_VALUE;
    *flags = 2;
    return CUDA_SUCCESS;
}
