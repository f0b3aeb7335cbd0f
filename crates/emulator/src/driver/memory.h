// Memory of the emulated GPUs, and page-locked memory of the host: plain memory of the process with guard pages around it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

struct Device;

// A piece of memory as it was asked for.
struct Allocation {
    uintptr_t address = 0;
    size_t bytes = 0;      // as asked for
    size_t reserved = 0;   // what it takes of the device's memory
    Device* device = nullptr;  // null for the host's
    void* mapping = nullptr;   // with the guard pages
    size_t mapping_bytes = 0;
    bool mapped = false;       // by cuMemMap, so `release` has no part in it
};

// Memory whose end (rounded up to 256 bytes) is the beginning of a page that cannot be touched; all bytes are 0xFF, which
// makes every bf16 and f32 a NaN. Null if there is none left, of the device's or of the process's.
void* allocate(Device* device, size_t bytes);

// False if `address` is not the beginning of an allocation of `host` or device memory.
bool release(uintptr_t address, bool host);

// Memory that cuMemMap made accessible, until it is taken out again.
void add_mapped(const Allocation& allocation);
void remove_mapped(uintptr_t address);

// The allocation that holds all of `bytes` bytes from `address` on, by value. False if there is none.
bool find_allocation(uintptr_t address, size_t bytes, Allocation* found);

// Host memory that was registered counts as page-locked.
bool register_host(uintptr_t address, size_t bytes);
bool unregister_host(uintptr_t address);

// May the GPU read and write it while the host goes on?
bool is_page_locked(const void* address, size_t bytes);

}  // namespace emulator
