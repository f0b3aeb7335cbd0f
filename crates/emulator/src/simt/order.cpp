// In which order threads run and copies land: PHALANX_EMULATOR_ORDER = forward, reverse or shuffled; by default each block takes
// one of these by chance. What depends on it lacks a barrier or a wait.
#include <cstdlib>
#include <cstring>
#include <utility>

#include "fault.h"
#include "machine.h"

namespace emulator {

// The one that the environment asks for, if it does.
static bool find_asked(Order* asked) {
    const char* name = std::getenv("PHALANX_EMULATOR_ORDER");
    if (name == nullptr) {
        return false;
    }
    if (std::strcmp(name, "forward") == 0) {
        *asked = Order::Forward;
    } else if (std::strcmp(name, "reverse") == 0) {
        *asked = Order::Reverse;
    } else if (std::strcmp(name, "shuffled") == 0) {
        *asked = Order::Shuffled;
    } else {
        fail("PHALANX_EMULATOR_ORDER is `%s`, not forward, reverse or shuffled", name);
    }
    return true;
}

// The same numbers in every run of a program (splitmix64).
static u64 random_number() {
    static thread_local u64 state = 0;
    u64 z = state += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

Order choose_order() {
    static Order asked;
    static const bool is_asked = find_asked(&asked);
    const Order all[] = {Order::Forward, Order::Reverse, Order::Shuffled};
    return is_asked ? asked : all[random_number() % 3];
}

void fill_order(std::vector<u32>& ranks, u32 count, Order order) {
    ranks.resize(count);
    for (u32 i = 0; i < count; i++) {
        ranks[i] = order == Order::Reverse ? count - 1 - i : i;
    }
    if (order == Order::Shuffled) {
        for (u32 i = count; i > 1; i--) {
            std::swap(ranks[i - 1], ranks[random_number() % i]);
        }
    }
}

bool lands_at_once(Order order) {
    switch (order) {
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
