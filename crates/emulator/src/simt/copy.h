// cp.async: copies to shared memory that land when they are waited for, or at once (see Order): whichever shows a missing
// wait or a missing barrier.
#pragma once

#include <cstring>

#include "fault.h"
#include "machine.h"

namespace emulator {

inline void land(const PendingCopy& copy) {
    if (copy.global != nullptr) {
        std::memcpy(copy.shared, copy.global, copy.bytes);
    } else {
        std::memset(copy.shared, 0, copy.bytes);
    }
}

// `global` null: zeros.
inline void start_copy(void* shared, const void* global, u32 bytes) {
    PendingCopy copy = {shared, global, bytes, here()->copy_group};
    if (lands_at_once(here()->block->order)) {
        land(copy);
    } else {
        here()->copies.push_back(copy);
    }
}

// Waits until at most `pending` of this thread's closed groups are under way. Copies whose group is still open stay.
inline void wait_for_copies(u32 pending) {
    Thread& thread = *here();
    size_t landed = 0;
    while (landed < thread.copies.size() && thread.copies[landed].group + pending < thread.copy_group) {
        land(thread.copies[landed++]);
    }
    thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

}  // namespace emulator
