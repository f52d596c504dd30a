// Copies and memsets.
#include "emulator.h"
#include <cstring>

static bool on_device(uint64_t pointer, size_t bytes, const char* call) {
    if (device_range(pointer, bytes)) return true;
    complain("%s: [0x%llx, +%zu) is not inside one live device allocation", call, (unsigned long long)pointer, bytes);
    return false;
}

enum Direction { HostToDevice, DeviceToHost, DeviceToDevice, HostToHost };

// The copy as an operation; the device side is looked at again when it runs, since it may be freed by then.
static Operation copying(uint64_t to, uint64_t from, size_t bytes, Direction direction, const char* call,
                         std::shared_ptr<std::vector<char>> staged = nullptr) {
    return {Work::Copy, call, [=] {
                if ((direction == HostToDevice || direction == DeviceToDevice) && !on_device(to, bytes, call))
                    return CUDA_ERROR_ILLEGAL_ADDRESS;
                if ((direction == DeviceToHost || direction == DeviceToDevice) && !on_device(from, bytes, call))
                    return CUDA_ERROR_ILLEGAL_ADDRESS;
                memmove((void*)to, staged ? (const void*)staged->data() : (const void*)from, bytes);
                return CUDA_SUCCESS;
            }, bytes};
}

static CUresult copy(uint64_t to, uint64_t from, size_t bytes, Direction direction, CUstream handle, bool wait,
                     const char* call) {
    STREAM(stream, handle);
    if (!bytes) return CUDA_SUCCESS;
    if (!to || !from) return CUDA_ERROR_INVALID_VALUE;
    if (wait)
        if (CUresult error = forbid_while_capturing(nullptr)) return error;
    if ((direction == HostToDevice || direction == DeviceToDevice) && !on_device(to, bytes, call))
        return CUDA_ERROR_INVALID_VALUE;
    if ((direction == DeviceToHost || direction == DeviceToDevice) && !on_device(from, bytes, call))
        return CUDA_ERROR_INVALID_VALUE;
    const void* host = direction == HostToDevice ? (void*)from : direction == DeviceToHost ? (void*)to : nullptr;
    if (host && partly_pinned(host, bytes)) {
        complain("%s: a part of the %zu bytes at %p is page-locked, and a part is not", call, bytes, host);
        return CUDA_ERROR_INVALID_VALUE;
    }
    count("copy");
    static const char* names[] = {"copy_htod", "copy_dtoh", "copy_dtod", "copy_htoh"};
    count(names[direction]);
    std::shared_ptr<std::vector<char>> staged;
    bool pageable = (direction == HostToDevice && !pinned_range((void*)from, bytes)) ||
                    (direction == DeviceToHost && !pinned_range((void*)to, bytes));
    if (pageable && !wait) {
        count("copy_pageable");
        if (CUresult error = forbid_while_capturing(stream.get())) return error;
        if (direction == HostToDevice) staged = std::make_shared<std::vector<char>>((char*)from, (char*)from + bytes);
        else count("blocking_copy"), wait = true;
    } else if (wait) {
        count("sync");
    }
    CUresult result = issue(stream, copying(to, from, bytes, direction, call, staged));
    if (result || !wait) return result;
    stream->wait_idle();
    return (CUresult)context->sticky.load();
}

// cuMemcpy: the addresses tell the direction.
static Direction direction(uint64_t to, uint64_t from) {
    bool to_device = device_range(to, 1), from_device = device_range(from, 1);
    return to_device ? (from_device ? DeviceToDevice : HostToDevice) : (from_device ? DeviceToHost : HostToHost);
}

EXPORT CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
    return copy(to, (uint64_t)from, bytes, HostToDevice, nullptr, true, "cuMemcpyHtoD");
}
EXPORT CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
    return copy((uint64_t)to, from, bytes, DeviceToHost, nullptr, true, "cuMemcpyDtoH");
}
EXPORT CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    return copy(to, from, bytes, DeviceToDevice, nullptr, false, "cuMemcpyDtoD");
}
EXPORT CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    return copy(to, from, bytes, direction(to, from), nullptr, true, "cuMemcpy");
}
EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
    return copy(to, (uint64_t)from, bytes, HostToDevice, stream, false, "cuMemcpyHtoDAsync");
}
EXPORT CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return copy((uint64_t)to, from, bytes, DeviceToHost, stream, false, "cuMemcpyDtoHAsync");
}
EXPORT CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return copy(to, from, bytes, DeviceToDevice, stream, false, "cuMemcpyDtoDAsync");
}
EXPORT CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return copy(to, from, bytes, direction(to, from), stream, false, "cuMemcpyAsync");
}
EXPORT CUresult cuMemcpyPeerAsync(CUdeviceptr to, CUcontext, CUdeviceptr from, CUcontext, size_t bytes, CUstream stream) {
    return copy(to, from, bytes, DeviceToDevice, stream, false, "cuMemcpyPeerAsync");
}
EXPORT CUresult cuMemcpyPeer(CUdeviceptr to, CUcontext, CUdeviceptr from, CUcontext, size_t bytes) {
    return copy(to, from, bytes, DeviceToDevice, nullptr, true, "cuMemcpyPeer");
}
EXPORT CUresult cuMemcpy2D_v2(const void*) { return CUDA_ERROR_NOT_SUPPORTED; }
EXPORT CUresult cuMemcpy2DAsync_v2(const void*, CUstream) { return CUDA_ERROR_NOT_SUPPORTED; }
EXPORT CUresult cuMemcpy3DAsync_v2(const void*, CUstream) { return CUDA_ERROR_NOT_SUPPORTED; }

template <class T> static CUresult set(uint64_t to, T value, size_t n, CUstream handle, const char* call) {
    STREAM(stream, handle);
    if (!n) return CUDA_SUCCESS;
    if (to % sizeof(T) || !on_device(to, n * sizeof(T), call)) return CUDA_ERROR_INVALID_VALUE;
    count("memset");
    return issue(stream, {Work::Memset, call, [=] {
                              if (!on_device(to, n * sizeof(T), call)) return CUDA_ERROR_ILLEGAL_ADDRESS;
                              for (size_t i = 0; i < n; i++) ((T*)to)[i] = value;
                              return CUDA_SUCCESS;
                          }});
}
EXPORT CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t n) {
    return set(to, value, n, nullptr, "cuMemsetD8");
}
EXPORT CUresult cuMemsetD16_v2(CUdeviceptr to, unsigned short value, size_t n) {
    return set(to, value, n, nullptr, "cuMemsetD16");
}
EXPORT CUresult cuMemsetD32_v2(CUdeviceptr to, unsigned value, size_t n) {
    return set(to, value, n, nullptr, "cuMemsetD32");
}
EXPORT CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t n, CUstream stream) {
    return set(to, value, n, stream, "cuMemsetD8Async");
}
EXPORT CUresult cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t n, CUstream stream) {
    return set(to, value, n, stream, "cuMemsetD16Async");
}
EXPORT CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t n, CUstream stream) {
    return set(to, value, n, stream, "cuMemsetD32Async");
}
