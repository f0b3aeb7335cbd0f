// Memory of the emulated GPUs, and page-locked memory of the host.
#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

#include "../simt/fault.h"
#include "device.h"

namespace emulator {

static const size_t GRANULARITY = 256;
// Larger allocations do not get pages of their own until they are written: see `map_pattern`.
static const size_t PATTERN_BYTES = 16 << 20;

static std::mutex mutex;

// All allocations by the address of their first byte.
static std::map<uintptr_t, Allocation>& allocations() {
    static std::map<uintptr_t, Allocation> all;
    return all;
}

static std::map<uintptr_t, size_t>& registered() {
    static std::map<uintptr_t, size_t> all;
    return all;
}

static size_t round_up(size_t bytes, size_t unit) {
    return (bytes + unit - 1) / unit * unit;
}

// A file in memory of PATTERN_BYTES bytes 0xFF; negative if it cannot be made.
static int pattern_file() {
    static const int file = [] {
        int created = memfd_create("emulator-pattern", MFD_CLOEXEC);
        if (created < 0 || ftruncate(created, static_cast<off_t>(PATTERN_BYTES)) != 0) {
            return -1;
        }
        void* pages = mmap(nullptr, PATTERN_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, created, 0);
        if (pages == MAP_FAILED) {
            return -1;
        }
        std::memset(pages, 0xff, PATTERN_BYTES);
        munmap(pages, PATTERN_BYTES);
        return created;
    }();
    return file;
}

// Puts pages that read as 0xFF at `start`. They share the pattern's memory until they are written, so a pool of gigabytes
// of which little is used costs little.
static bool map_pattern(char* start, size_t bytes) {
    for (size_t done = 0; done < bytes; done += PATTERN_BYTES) {
        size_t part = std::min(PATTERN_BYTES, bytes - done);
        if (mmap(start + done, part, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, pattern_file(), 0) ==
            MAP_FAILED) {
            return false;
        }
    }
    return true;
}

static bool map_filled(char* start, size_t bytes) {
    if (bytes > PATTERN_BYTES && pattern_file() >= 0) {
        return map_pattern(start, bytes);
    }
    if (mprotect(start, bytes, PROT_READ | PROT_WRITE) != 0) {
        return false;
    }
    std::memset(start, 0xff, bytes);
    return true;
}

// For the message of a kernel that used a bad address.
static bool describe_address(const void* address, char* text, size_t bytes) {
    std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
    uintptr_t place = reinterpret_cast<uintptr_t>(address);
    for (auto entry = allocations().begin(); lock.owns_lock() && entry != allocations().end(); ++entry) {
        const Allocation& allocation = entry->second;
        uintptr_t mapping = reinterpret_cast<uintptr_t>(allocation.mapping);
        if (place >= mapping && place < mapping + allocation.mapping_bytes) {
            std::snprintf(text, bytes, "byte %td of an allocation of %zu",
                          static_cast<std::ptrdiff_t>(place - allocation.address), allocation.bytes);
            return true;
        }
    }
    return false;
}

void* allocate(Device* device, size_t bytes) {
    ask_about_addresses(describe_address);
    if (bytes > SIZE_MAX / 2) {
        return nullptr;
    }
    size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    Allocation allocation;
    allocation.bytes = bytes;
    allocation.reserved = round_up(bytes, GRANULARITY);
    allocation.device = device;
    if (device != nullptr && !device->reserve(allocation.reserved)) {
        return nullptr;
    }
    size_t inner = round_up(allocation.reserved, page);
    allocation.mapping_bytes = inner + 2 * page;
    void* mapping = mmap(nullptr, allocation.mapping_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char* first = static_cast<char*>(mapping) + page;
    if (mapping == MAP_FAILED || !map_filled(first, inner)) {
        if (mapping != MAP_FAILED) {
            munmap(mapping, allocation.mapping_bytes);
        }
        if (device != nullptr) {
            device->give_back(allocation.reserved);
        }
        return nullptr;
    }
    allocation.mapping = mapping;
    char* start = first + inner - allocation.reserved;
    allocation.address = reinterpret_cast<uintptr_t>(start);
    std::lock_guard<std::mutex> lock(mutex);
    allocations()[allocation.address] = allocation;
    return start;
}

bool release(uintptr_t address, bool host) {
    Allocation allocation;
    {
        std::lock_guard<std::mutex> lock(mutex);
        auto found = allocations().find(address);
        if (found == allocations().end() || (found->second.device == nullptr) != host || found->second.mapped) {
            return false;
        }
        allocation = found->second;
        allocations().erase(found);
    }
    munmap(allocation.mapping, allocation.mapping_bytes);
    if (allocation.device != nullptr) {
        allocation.device->give_back(allocation.reserved);
    }
    return true;
}

void add_mapped(const Allocation& allocation) {
    ask_about_addresses(describe_address);
    std::lock_guard<std::mutex> lock(mutex);
    allocations()[allocation.address] = allocation;
}

void remove_mapped(uintptr_t address) {
    std::lock_guard<std::mutex> lock(mutex);
    allocations().erase(address);
}

bool find_allocation(uintptr_t address, size_t bytes, Allocation* found) {
    std::lock_guard<std::mutex> lock(mutex);
    auto after = allocations().upper_bound(address);
    if (after == allocations().begin()) {
        return false;
    }
    const Allocation& allocation = std::prev(after)->second;
    size_t offset = address - allocation.address;
    if (offset > allocation.bytes || bytes > allocation.bytes - offset) {
        return false;
    }
    *found = allocation;
    return true;
}

bool register_host(uintptr_t address, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    return registered().emplace(address, bytes).second;
}

bool unregister_host(uintptr_t address) {
    std::lock_guard<std::mutex> lock(mutex);
    return registered().erase(address) != 0;
}

bool is_page_locked(const void* address, size_t bytes) {
    uintptr_t start = reinterpret_cast<uintptr_t>(address);
    Allocation allocation;
    if (find_allocation(start, bytes, &allocation)) {
        return true;
    }
    std::lock_guard<std::mutex> lock(mutex);
    auto after = registered().upper_bound(start);
    return after != registered().begin() && start - std::prev(after)->first + bytes <= std::prev(after)->second;
}

}  // namespace emulator
