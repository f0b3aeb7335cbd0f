// Memory in steps: made, given an address, mapped there, opened to devices, and shared with other processes as a file
// descriptor. It is a file in memory, so kernels of several processes read and write the same bytes.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "memory.h"
#include "stream.h"

using namespace emulator;

namespace {

const size_t GRANULARITY = size_t(2) << 20;
const char FILE_NAME[] = "emulator-memory";

// What cuMemCreate makes, as long as a handle or a mapping knows it. Of another process's, `device` is null.
struct Physical {
    int file = -1;
    size_t bytes = 0;
    Device* device = nullptr;
    bool shared = false;  // made to be exported

    ~Physical() {
        if (file >= 0) {
            close(file);
        }
        if (device != nullptr) {
            device->give_back(bytes);
        }
    }
};

// A run of addresses, and what is mapped there (at its beginning, or nothing).
struct Reservation {
    size_t bytes = 0;
    void* pages = nullptr;  // with the guard pages
    size_t pages_bytes = 0;
    std::shared_ptr<Physical> mapped;
    size_t mapped_bytes = 0;
};

std::mutex mutex;
unsigned long long next_handle = 1;

std::map<CUmemGenericAllocationHandle, std::shared_ptr<Physical>>& physicals() {
    static auto* all = new std::map<CUmemGenericAllocationHandle, std::shared_ptr<Physical>>();
    return *all;
}

std::map<CUdeviceptr, Reservation>& reservations() {
    static auto* all = new std::map<CUdeviceptr, Reservation>();
    return *all;
}

CUmemGenericAllocationHandle add(std::shared_ptr<Physical> physical) {
    physicals()[next_handle] = std::move(physical);
    return next_handle++;
}

// All bytes 0xFF, as all memory here.
bool fill(int file, size_t bytes) {
    if (ftruncate(file, static_cast<off_t>(bytes)) != 0) {
        return false;
    }
    void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (pages == MAP_FAILED) {
        return false;
    }
    std::memset(pages, 0xff, bytes);
    return munmap(pages, bytes) == 0;
}

// The size of memory that cuMemCreate made, here or in another process; 0 for any other file.
size_t size_of_shared(int file) {
    char link[64], name[64];
    std::snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, name, sizeof name - 1);
    struct stat status;
    if (length < 0 || fstat(file, &status) != 0) {
        return 0;
    }
    name[length] = '\0';
    return std::strstr(name, FILE_NAME) != nullptr ? static_cast<size_t>(status.st_size) : 0;
}

}  // namespace

EXPORT CUresult cuMemGetAllocationGranularity(size_t* granularity, const CUmemAllocationProp* properties, int) {
    *granularity = GRANULARITY;
    return find_device(properties->location.id) != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

EXPORT CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t bytes, const CUmemAllocationProp* properties,
                            unsigned long long flags) {
    Device* device = find_device(properties->location.id);
    bool shared = (properties->handle_types & CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) != 0;
    if (bytes == 0 || bytes % GRANULARITY != 0 || properties->type != CU_MEM_ALLOCATION_TYPE_PINNED || flags != 0 ||
        properties->location.type != CU_MEM_LOCATION_TYPE_DEVICE || device == nullptr) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (shared && !shares_memory()) {
        return CUDA_ERROR_NOT_SUPPORTED;
    }
    if (CUresult refused = refuse_while_capturing()) {
        return refused;
    }
    if (!device->reserve(bytes)) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    auto physical = std::make_shared<Physical>();
    physical->bytes = bytes;
    physical->device = device;
    physical->shared = shared;
    physical->file = memfd_create(FILE_NAME, MFD_CLOEXEC);
    if (physical->file < 0 || !fill(physical->file, bytes)) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    std::lock_guard<std::mutex> lock(mutex);
    *handle = add(std::move(physical));
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    std::lock_guard<std::mutex> lock(mutex);
    return physicals().erase(handle) != 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuMemExportToShareableHandle(void* file, CUmemGenericAllocationHandle handle, int type, unsigned long long) {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = physicals().find(handle);
    if (found == physicals().end() || type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR || !found->second->shared) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    int copy = fcntl(found->second->file, F_DUPFD_CLOEXEC, 0);
    std::memcpy(file, &copy, sizeof copy);
    return copy >= 0 ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

EXPORT CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* handle, void* file, int type) {
    int number = static_cast<int>(reinterpret_cast<intptr_t>(file));
    size_t bytes = type == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR ? size_of_shared(number) : 0;
    if (bytes == 0) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    auto physical = std::make_shared<Physical>();
    physical->bytes = bytes;
    physical->shared = true;
    physical->file = fcntl(number, F_DUPFD_CLOEXEC, 0);
    std::lock_guard<std::mutex> lock(mutex);
    *handle = add(std::move(physical));
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemAddressReserve(CUdeviceptr* address, size_t bytes, size_t, CUdeviceptr, unsigned long long flags) {
    if (bytes == 0 || bytes % GRANULARITY != 0 || flags != 0) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    Reservation reservation;
    reservation.bytes = bytes;
    // A guard behind, and one before, so large that the addresses between them can be aligned.
    reservation.pages_bytes = bytes + 3 * GRANULARITY;
    reservation.pages = mmap(nullptr, reservation.pages_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reservation.pages == MAP_FAILED) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    *address = (reinterpret_cast<CUdeviceptr>(reservation.pages) / GRANULARITY + 2) * GRANULARITY;
    std::lock_guard<std::mutex> lock(mutex);
    reservations()[*address] = reservation;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemAddressFree(CUdeviceptr address, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = reservations().find(address);
    if (found == reservations().end() || found->second.bytes != bytes || found->second.mapped != nullptr) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    munmap(found->second.pages, found->second.pages_bytes);
    reservations().erase(found);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemMap(CUdeviceptr address, size_t bytes, size_t offset, CUmemGenericAllocationHandle handle,
                         unsigned long long flags) {
    std::lock_guard<std::mutex> lock(mutex);
    auto reserved = reservations().find(address);
    auto physical = physicals().find(handle);
    if (reserved == reservations().end() || physical == physicals().end() || reserved->second.mapped != nullptr ||
        bytes == 0 || bytes % GRANULARITY != 0 || bytes > reserved->second.bytes || bytes > physical->second->bytes ||
        offset != 0 || flags != 0) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    // Not to be touched before `cuMemSetAccess`.
    if (mmap(reinterpret_cast<void*>(address), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, physical->second->file, 0) == MAP_FAILED) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    reserved->second.mapped = physical->second;
    reserved->second.mapped_bytes = bytes;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemSetAccess(CUdeviceptr address, size_t bytes, const CUmemAccessDesc* accesses, size_t count) {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = reservations().find(address);
    if (found == reservations().end() || found->second.mapped == nullptr || found->second.mapped_bytes != bytes) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    for (size_t i = 0; i < count; i++) {
        Device* device = find_device(accesses[i].location.id);
        if (accesses[i].location.type != CU_MEM_LOCATION_TYPE_DEVICE || device == nullptr ||
            accesses[i].flags != CU_MEM_ACCESS_FLAGS_PROT_READWRITE) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        Allocation allocation;
        allocation.address = address;
        allocation.bytes = bytes;
        allocation.device = found->second.mapped->device != nullptr ? found->second.mapped->device : device;
        allocation.mapping = found->second.pages;
        allocation.mapping_bytes = found->second.pages_bytes;
        allocation.mapped = true;
        if (mprotect(reinterpret_cast<void*>(address), bytes, PROT_READ | PROT_WRITE) != 0) {
            return CUDA_ERROR_OUT_OF_MEMORY;
        }
        add_mapped(allocation);
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemUnmap(CUdeviceptr address, size_t bytes) {
    if (CUresult refused = refuse_while_capturing()) {
        return refused;
    }
    std::shared_ptr<Physical> unmapped;
    std::lock_guard<std::mutex> lock(mutex);
    auto found = reservations().find(address);
    if (found == reservations().end() || found->second.mapped == nullptr || found->second.mapped_bytes != bytes) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    remove_mapped(address);
    mmap(reinterpret_cast<void*>(address), bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    unmapped.swap(found->second.mapped);
    return CUDA_SUCCESS;
}
