// The emulated multiprocessor: the threads of one block as fibers, their warps, and the points where they meet.
//
// Each OS thread that launches has a machine of its own; blocks run on it one after another. A thread runs until it waits
// for others (or pauses in a spin); then the next thread in the block's order that can run goes on. So the first warp in
// the order runs up to the block's barrier before the second one starts: a missing barrier shows.
#pragma once

#include <cstddef>
#include <vector>

#include "fiber.h"

namespace emulator {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

const u32 WARP = 32;
const u32 MAX_THREADS = 1024;
const u32 MAX_SHARED_BYTES = 227 * 1024;

struct Dim3 {
    u32 x = 1, y = 1, z = 1;

    u64 count() const { return static_cast<u64>(x) * y * z; }
};

// In which order the threads of a block run, and when a cp.async lands.
enum class Order {
    Forward,   // ascending; a copy lands when it is waited for
    Reverse,   // descending; a copy lands at once
    Shuffled,  // another order for each block; a copy lands at once or when it is waited for
};

// A place in a kernel's source, for messages. As a default argument it is the place of the call.
struct Place {
    const char* file = nullptr;
    int line = 0;

    Place() = default;
    Place(const char* f, int l) : file(f), line(l) {}
};
#define EMULATOR_PLACE ::emulator::Place(__builtin_FILE(), __builtin_LINE())

// What threads can meet for. Threads that meet for different things are an error.
enum class Meeting : u8 {
    None,
    WarpBarrier,
    Shuffle,
    Ballot,
    Mma,
    BlockBarrier,
    BlockBarrierOr,
    BlockBarrierAnd,
    BlockBarrierCount,
};

// A cp.async that has not landed.
struct PendingCopy {
    void* shared;
    const void* global;
    u32 bytes;
    u32 group;
};

struct Warp;
struct Block;

struct Thread {
    Context context;
    Thread* next = nullptr;  // in the block's order, a ring
    Warp* warp = nullptr;
    Block* block = nullptr;
    u32 lane = 0;
    Dim3 index;

    Meeting waits_for = Meeting::None;
    Place place;

    std::vector<PendingCopy> copies;
    u32 copy_group = 0;

    bool ready() const;
};

// The lanes that wait for one another with the same mask.
struct WarpMeeting {
    u32 arrived = 0;
    u32 mask = 0;
    Meeting kind = Meeting::None;
};

// Operands of mma_bf16 as the lanes hold them. In this order of lanes A and C are plain row-major matrices; B is kept with
// the lane's two coordinates exchanged, so that 8 neighbours are the 8 columns.
struct alignas(64) MmaOperands {
    u32 a[4][WARP];  // four 8×8 parts: rows 0-7 and 8-15 of columns 0-7, then of columns 8-15
    u32 b[2][WARP];  // pair of rows t (0-3) and 4 + t, then columns
    float c[16][8];
};

struct Warp {
    u32 live = 0;   // lanes that have not returned
    u32 ready = 0;  // lanes that can run
    Thread* first = nullptr;
    WarpMeeting meetings[WARP];
    u32 pending = 0;  // meetings at which lanes wait

    u64 value[WARP];   // what each lane brings to a shuffle or ballot
    u32 source[WARP];  // the lane whose value it wants
    u64 result[WARP];
    MmaOperands mma;
};

struct Block {
    const char* kernel = nullptr;
    Dim3 grid, size, index;
    u8* shared = nullptr;
    u32 shared_bytes = 0;
    Order order = Order::Forward;
    Thread* first = nullptr;
    Thread* running = nullptr;
    std::vector<Warp> warps;

    u32 live = 0;
    u32 waiting = 0;  // at the block's barrier
    Meeting barrier = Meeting::None;
    u32 votes = 0;
    u32 result = 0;
};

inline bool Thread::ready() const {
    return warp->ready >> lane & 1;
}

// The thread that calls this, which must be one of a kernel. Asked at every use of threadIdx, so it takes no thread-local
// variable but the word at the end of the thread's stack.
inline __attribute__((always_inline)) Thread* here() {
    return static_cast<Thread*>(Stack::own_word());
}

// The kernel's thread that runs on this OS thread, null if there is none. For callers that may be anywhere.
const Thread* running_thread();

// Waits until all threads of the warp that are named in `mask` and have not returned called this; does what `kind` says
// with what they left in the warp.
void meet_warp(Meeting kind, u32 mask, Place place);
// Waits for all threads of the block that have not returned; gives the vote's result.
u32 meet_block(Meeting kind, bool vote, Place place);
// Lets other threads of the block and other OS threads run.
void pause_thread();
// Of a clock that all threads share.
u64 nanoseconds();

// Runs `body` in every thread of every block of the grid, with the launch's parameters.
void run_grid(const char* kernel, Dim3 grid, Dim3 size, u32 shared_bytes, void (*body)(void* const*),
              void* const* parameters);

// The rest is used between the files of the machine.

// Does what the lanes met for and lets them go on.
void complete(Warp& warp, WarpMeeting& meeting);
// Goes on with the first thread that can run, from `start` on in the block's order; returns when `self` runs again.
void run_from(Thread& self, Thread* start);
// The order of the next block: PHALANX_EMULATOR_ORDER's, or else one by chance, the same in every run of a program.
Order choose_order();
// The numbers below `count`, in this order.
void fill_order(std::vector<u32>& ranks, u32 count, Order order);
// Does the copy that starts now land at once?
bool lands_at_once(Order order);
const char* name_of(Meeting kind);
// Where on this OS thread `address` would be an overrun: a sentence, or null.
const char* overrun_at(const void* address);

}  // namespace emulator
