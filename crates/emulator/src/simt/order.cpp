// In which order threads run and copies land: PHALANX_EMULATOR_ORDER = forward (default), reverse or shuffled. What depends
// on it lacks a barrier or a wait.
#include <cstdlib>
#include <cstring>
#include <utility>

#include "fault.h"
#include "machine.h"

namespace emulator {

Order order() {
    static const Order chosen = [] {
        const char* name = std::getenv("PHALANX_EMULATOR_ORDER");
        if (name == nullptr || std::strcmp(name, "forward") == 0) {
            return Order::Forward;
        }
        if (std::strcmp(name, "reverse") == 0) {
            return Order::Reverse;
        }
        if (std::strcmp(name, "shuffled") == 0) {
            return Order::Shuffled;
        }
        fail("PHALANX_EMULATOR_ORDER is `%s`, not forward, reverse or shuffled", name);
    }();
    return chosen;
}

// The same numbers in every run of a program (splitmix64).
static u64 random_number() {
    static thread_local u64 state = 0;
    u64 z = state += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

void fill_order(std::vector<u32>& ranks, u32 count) {
    ranks.resize(count);
    for (u32 i = 0; i < count; i++) {
        ranks[i] = order() == Order::Reverse ? count - 1 - i : i;
    }
    if (order() == Order::Shuffled) {
        for (u32 i = count; i > 1; i--) {
            std::swap(ranks[i - 1], ranks[random_number() % i]);
        }
    }
}

bool lands_at_once() {
    switch (order()) {
        case Order::Forward:
            return false;
        case Order::Reverse:
            return true;
        case Order::Shuffled:
            return random_number() & 1;
    }
    return false;
}

}  // namespace emulator
