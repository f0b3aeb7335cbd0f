// Devices and contexts: the driver's entry points for them, and what the emulated GPU says about itself (an H100 in small).
#include "device.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "stream.h"

namespace emulator {

static std::atomic<bool> initialised{false};
static thread_local Device* current = nullptr;
static size_t configured_devices = 1;

static size_t environment_number(const char* name, size_t otherwise) {
    const char* text = std::getenv(name);
    if (text == nullptr) {
        return otherwise;
    }
    char* end = nullptr;
    unsigned long long number = std::strtoull(text, &end, 10);
    if (*text == '\0' || *end != '\0') {
        std::fprintf(stderr, "emulator: %s is `%s`, not a number\n", name, text);
        std::abort();
    }
    return number;
}

static std::vector<std::unique_ptr<Device>>& devices() {
    static std::vector<std::unique_ptr<Device>> all = [] {
        std::vector<std::unique_ptr<Device>> made;
        size_t count = environment_number("PHALANX_EMULATOR_DEVICES", configured_devices);
        for (size_t i = 0; i < count; i++) {
            made.push_back(std::make_unique<Device>());
            made.back()->ordinal = static_cast<int>(i);
            made.back()->total_bytes = environment_number("PHALANX_EMULATOR_MEMORY", size_t(4) << 30);
        }
        return made;
    }();
    return all;
}

bool Device::reserve(size_t bytes) {
    size_t used = used_bytes.load();
    do {
        if (bytes > total_bytes - used) {
            return false;
        }
    } while (!used_bytes.compare_exchange_weak(used, used + bytes));
    return true;
}

void Device::give_back(size_t bytes) {
    used_bytes -= bytes;
}

void configure_devices(int count) {
    configured_devices = static_cast<size_t>(count);
}

bool shares_memory() {
    return environment_number("PHALANX_EMULATOR_SHARES", 1) != 0;
}

int device_count() {
    return static_cast<int>(devices().size());
}

Device* find_device(CUdevice ordinal) {
    bool known = initialised && ordinal >= 0 && ordinal < device_count();
    return known ? devices()[static_cast<size_t>(ordinal)].get() : nullptr;
}

Device* current_device() {
    return current;
}

// What it says it is: compute capability 9.0, with few multiprocessors so that grids made for all of them stay small.
static bool attribute_value(int attribute, int ordinal, int* value) {
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y:
            *value = 1024;
            return true;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z:
            *value = 64;
            return true;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X:
            *value = 0x7fffffff;
            return true;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z:
            *value = 65535;
            return true;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK:
            *value = 48 * 1024;
            return true;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
            *value = 227 * 1024;
            return true;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
            *value = 228 * 1024;
            return true;
        case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK:
            *value = 1024;
            return true;
        case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY:
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR:
            *value = 65536;
            return true;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR:
            *value = 32;
            return true;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR:
            *value = 2048;
            return true;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
            *value = 4;
            return true;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
            *value = 9;
            return true;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
            *value = 0;
            return true;
        case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
        case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
            *value = 1000000;
            return true;
        case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
            *value = 5120;
            return true;
        case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE:
            *value = 50 << 20;
            return true;
        case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID:
            *value = ordinal + 1;
            return true;
        case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
        case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
        case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT:
        case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
        case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED:
        case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED:
        case CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED:
            *value = 1;
            return true;
        case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED:
            *value = shares_memory();
            return true;
        default:
            // Other features (cooperative launches, managed memory, ...) are not there.
            *value = 0;
            return attribute > 0 && attribute < 200;
    }
}

}  // namespace emulator

using namespace emulator;

EXPORT CUresult cuInit(unsigned flags) {
    initialised = true;
    return flags == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuDriverGetVersion(int* version) {
    *version = 13000;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetCount(int* count) {
    *count = device_count();
    return initialised ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED;
}

EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    *device = ordinal;
    return find_device(ordinal) != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

EXPORT CUresult cuDeviceGetName(char* name, int bytes, CUdevice device) {
    std::snprintf(name, static_cast<size_t>(bytes), "Phalanx emulator");
    return find_device(device) != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

EXPORT CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
    std::memcpy(uuid->bytes, "phalanx-emulator", sizeof uuid->bytes);
    uuid->bytes[15] = static_cast<char>(device);
    return find_device(device) != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

EXPORT CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
    return cuDeviceGetUuid_v2(uuid, device);
}

EXPORT CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice ordinal) {
    const Device* device = find_device(ordinal);
    *bytes = device != nullptr ? device->total_bytes : 0;
    return device != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    if (find_device(device) == nullptr) {
        return CUDA_ERROR_INVALID_DEVICE;
    }
    return attribute_value(attribute, device, value) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    *context = find_device(device);
    return *context != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

// The context lives on: whoever was given one may still use it.
EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    return find_device(device) != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
    current = context;
    return initialised ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED;
}

EXPORT CUresult cuCtxGetCurrent(CUcontext* context) {
    *context = current;
    return initialised ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED;
}

EXPORT CUresult cuCtxGetDevice(CUdevice* device) {
    if (current == nullptr) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    *device = current->ordinal;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxSynchronize() {
    if (current == nullptr) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    if (CUresult refused = refuse_while_capturing()) {
        return refused;
    }
    finish_all(current);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxSetFlags(unsigned) {
    return current != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

EXPORT CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = -5;
    return current != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

EXPORT CUresult cuDeviceCanAccessPeer(int* possible, CUdevice device, CUdevice peer) {
    if (find_device(device) == nullptr || find_device(peer) == nullptr) {
        return CUDA_ERROR_INVALID_DEVICE;
    }
    *possible = device != peer;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxEnablePeerAccess(CUcontext peer, unsigned flags) {
    if (current == nullptr || peer == nullptr || peer == current) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    if (flags != 0) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    std::lock_guard<std::mutex> lock(current->peers_mutex);
    return current->peers.insert(peer).second ? CUDA_SUCCESS : CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED;
}

EXPORT CUresult cuCtxDisablePeerAccess(CUcontext peer) {
    if (current == nullptr) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    std::lock_guard<std::mutex> lock(current->peers_mutex);
    return current->peers.erase(peer) != 0 ? CUDA_SUCCESS : CUDA_ERROR_PEER_ACCESS_NOT_ENABLED;
}
