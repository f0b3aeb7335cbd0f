// The emulated GPUs, and which of them is the calling thread's current one.
#pragma once

#include <atomic>
#include <cstddef>
#include <mutex>
#include <set>

#include "cuda.h"

namespace emulator {

struct Device {
    int ordinal = 0;
    size_t total_bytes = 0;
    std::atomic<size_t> used_bytes{0};
    std::mutex peers_mutex;
    std::set<const Device*> peers;  // whose memory it may access

    // Takes bytes of the device's memory; false if they are not there.
    bool reserve(size_t bytes);
    void give_back(size_t bytes);
};

// PHALANX_EMULATOR_DEVICES; by default what was configured, else 1.
int device_count();
void configure_devices(int count);
// Whether memory can be shared with other processes: unless PHALANX_EMULATOR_SHARES is 0.
bool shares_memory();
// Null if there is none of this number, or before cuInit.
Device* find_device(CUdevice ordinal);
// Null if the calling thread has none.
Device* current_device();

}  // namespace emulator
