// The driver's entry points for memory: allocation, copies, fills, and questions about pointers.
#include <cstring>
#include <vector>

#include "memory.h"
#include "stream.h"

using namespace emulator;

// ---- allocation

static CUresult allocate_device(CUdeviceptr* pointer, size_t bytes) {
    if (current_device() == nullptr) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    if (bytes == 0) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    // During a capture a real driver makes this a node of the graph in the asynchronous case; that is not emulated.
    if (CUresult refused = refuse_while_capturing()) {
        return refused;
    }
    *pointer = reinterpret_cast<CUdeviceptr>(allocate(current_device(), bytes));
    return *pointer != 0 ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

EXPORT CUresult cuMemAlloc_v2(CUdeviceptr* pointer, size_t bytes) {
    return allocate_device(pointer, bytes);
}

EXPORT CUresult cuMemAllocAsync(CUdeviceptr* pointer, size_t bytes, CUstream stream) {
    return find_stream(stream) != nullptr ? allocate_device(pointer, bytes) : CUDA_ERROR_INVALID_HANDLE;
}

EXPORT CUresult cuMemFree_v2(CUdeviceptr pointer) {
    Allocation allocation;
    if (!find_allocation(pointer, 1, &allocation) || allocation.device == nullptr || allocation.address != pointer) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (CUresult refused = refuse_while_capturing()) {
        return refused;
    }
    finish_all(allocation.device);
    return release(pointer, false) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuMemFreeAsync(CUdeviceptr pointer, CUstream handle) {
    Stream* stream = find_stream(handle);
    Allocation allocation;
    if (stream == nullptr) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (!find_allocation(pointer, 1, &allocation) || allocation.device == nullptr || allocation.address != pointer) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (CUresult refused = refuse_captured(*stream)) {
        return refused;
    }
    return submit(*stream, [pointer] { release(pointer, false); });
}

EXPORT CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
    const Device* device = current_device();
    if (device == nullptr) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    *total = device->total_bytes;
    *free = device->total_bytes - device->used_bytes;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
    if (current_device() == nullptr) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    if (bytes == 0) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    *pointer = allocate(nullptr, bytes);
    return *pointer != nullptr ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

EXPORT CUresult cuMemAllocHost_v2(void** pointer, size_t bytes) {
    return cuMemHostAlloc(pointer, bytes, 0);
}

EXPORT CUresult cuMemFreeHost(void* pointer) {
    if (current_device() != nullptr) {
        finish_all(current_device());
    }
    return release(reinterpret_cast<uintptr_t>(pointer), true) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* device_pointer, void* pointer, unsigned) {
    *device_pointer = reinterpret_cast<CUdeviceptr>(pointer);
    return is_page_locked(pointer, 1) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuMemHostRegister_v2(void* pointer, size_t bytes, unsigned) {
    bool added = register_host(reinterpret_cast<uintptr_t>(pointer), bytes);
    return added ? CUDA_SUCCESS : CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
}

EXPORT CUresult cuMemHostUnregister(void* pointer) {
    bool removed = unregister_host(reinterpret_cast<uintptr_t>(pointer));
    return removed ? CUDA_SUCCESS : CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
}

// ---- copies and fills

static void* pointer_of(CUdeviceptr address) {
    return reinterpret_cast<void*>(address);
}

// Is all of it memory that a GPU can reach: a device's, or page-locked memory of the host?
static bool reachable(CUdeviceptr address, size_t bytes) {
    return is_page_locked(pointer_of(address), bytes);
}

static CUresult fill(CUdeviceptr address, unsigned value, size_t unit, size_t count, CUstream handle) {
    Stream* stream = find_stream(handle);
    if (stream == nullptr) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (address % unit != 0 || !reachable(address, unit * count)) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    return submit(*stream, [=] {
        for (size_t i = 0; i < count; i++) {
            std::memcpy(static_cast<char*>(pointer_of(address)) + i * unit, &value, unit);
        }
    });
}

static CUresult copy(void* target, const void* source, size_t bytes, CUstream handle) {
    Stream* stream = find_stream(handle);
    if (stream == nullptr) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (stream->capture == nullptr && mode() != Mode::AtOnce) {
        // The driver reads pageable memory before it returns, and has written it when it returns.
        if (!is_page_locked(source, bytes)) {
            auto read = std::make_shared<std::vector<char>>(static_cast<const char*>(source),
                                                            static_cast<const char*>(source) + bytes);
            return submit(*stream, [target, read] { std::memcpy(target, read->data(), read->size()); });
        }
        if (!is_page_locked(target, bytes)) {
            finish(*stream);
            std::memcpy(target, source, bytes);
            return CUDA_SUCCESS;
        }
    }
    return submit(*stream, [=] { std::memmove(target, source, bytes); });
}

// Copies that return when they are done are ordered only with the default stream.
static CUresult copy_and_wait(void* target, const void* source, size_t bytes) {
    if (current_device() == nullptr) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    if (CUresult refused = refuse_while_capturing()) {
        return refused;
    }
    finish_blocking(current_device());
    std::memmove(target, source, bytes);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemcpyHtoD_v2(CUdeviceptr target, const void* source, size_t bytes) {
    return reachable(target, bytes) ? copy_and_wait(pointer_of(target), source, bytes) : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuMemcpyDtoH_v2(void* target, CUdeviceptr source, size_t bytes) {
    return reachable(source, bytes) ? copy_and_wait(target, pointer_of(source), bytes) : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuMemcpyDtoD_v2(CUdeviceptr target, CUdeviceptr source, size_t bytes) {
    bool both = reachable(target, bytes) && reachable(source, bytes);
    return both ? copy_and_wait(pointer_of(target), pointer_of(source), bytes) : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuMemcpy(CUdeviceptr target, CUdeviceptr source, size_t bytes) {
    return copy_and_wait(pointer_of(target), pointer_of(source), bytes);
}

EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr target, const void* source, size_t bytes, CUstream stream) {
    return reachable(target, bytes) ? copy(pointer_of(target), source, bytes, stream) : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuMemcpyDtoHAsync_v2(void* target, CUdeviceptr source, size_t bytes, CUstream stream) {
    return reachable(source, bytes) ? copy(target, pointer_of(source), bytes, stream) : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr target, CUdeviceptr source, size_t bytes, CUstream stream) {
    bool both = reachable(target, bytes) && reachable(source, bytes);
    return both ? copy(pointer_of(target), pointer_of(source), bytes, stream) : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuMemcpyPeerAsync(CUdeviceptr target, CUcontext, CUdeviceptr source, CUcontext, size_t bytes,
                                  CUstream stream) {
    return cuMemcpyDtoDAsync_v2(target, source, bytes, stream);
}

EXPORT CUresult cuMemcpyAsync(CUdeviceptr target, CUdeviceptr source, size_t bytes, CUstream stream) {
    return copy(pointer_of(target), pointer_of(source), bytes, stream);
}

EXPORT CUresult cuMemsetD8Async(CUdeviceptr address, unsigned char value, size_t count, CUstream stream) {
    return fill(address, value, 1, count, stream);
}

EXPORT CUresult cuMemsetD16Async(CUdeviceptr address, unsigned short value, size_t count, CUstream stream) {
    return fill(address, value, 2, count, stream);
}

EXPORT CUresult cuMemsetD32Async(CUdeviceptr address, unsigned value, size_t count, CUstream stream) {
    return fill(address, value, 4, count, stream);
}

EXPORT CUresult cuMemsetD8_v2(CUdeviceptr address, unsigned char value, size_t count) {
    CUresult refused = refuse_while_capturing();
    return refused ? refused : fill(address, value, 1, count, nullptr);
}

EXPORT CUresult cuMemsetD32_v2(CUdeviceptr address, unsigned value, size_t count) {
    CUresult refused = refuse_while_capturing();
    return refused ? refused : fill(address, value, 4, count, nullptr);
}

// ---- pointers

EXPORT CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    Allocation allocation;
    if (!find_allocation(pointer, 1, &allocation)) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    switch (attribute) {
        case CU_POINTER_ATTRIBUTE_CONTEXT:
            *static_cast<CUcontext*>(value) = allocation.device;
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
            *static_cast<unsigned*>(value) = allocation.device == nullptr ? 1 : 2;
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
            *static_cast<CUdeviceptr*>(value) = pointer;
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_HOST_POINTER:
            *static_cast<void**>(value) = allocation.device == nullptr ? pointer_of(pointer) : nullptr;
            return allocation.device == nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
        case CU_POINTER_ATTRIBUTE_IS_MANAGED:
            *static_cast<unsigned char*>(value) = 0;
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
            *static_cast<int*>(value) = allocation.device == nullptr ? 0 : allocation.device->ordinal;
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
            *static_cast<CUdeviceptr*>(value) = allocation.address;
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
            *static_cast<size_t*>(value) = allocation.bytes;
            return CUDA_SUCCESS;
    }
    return CUDA_ERROR_NOT_SUPPORTED;
}

EXPORT CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* bytes, CUdeviceptr pointer) {
    Allocation allocation;
    if (!find_allocation(pointer, 1, &allocation)) {
        return CUDA_ERROR_NOT_FOUND;
    }
    if (base != nullptr) {
        *base = allocation.address;
    }
    if (bytes != nullptr) {
        *bytes = allocation.bytes;
    }
    return CUDA_SUCCESS;
}
