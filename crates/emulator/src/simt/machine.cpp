// Runs the blocks of a grid on fibers: which thread runs next, the block's barrier, how a thread begins and ends.
#include "machine.h"

#include <sched.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "fault.h"

namespace emulator {

static const size_t GUARD_BYTES = 64 * 1024;
static const size_t SHARED_BYTES = (MAX_SHARED_BYTES + GUARD_BYTES - 1) / GUARD_BYTES * GUARD_BYTES;

// All that an OS thread needs to run blocks; kept from launch to launch.
struct Machine {
    std::vector<Stack> stacks;
    std::vector<std::unique_ptr<Thread>> threads;
    Block block;
    Context host;
    void (*body)(void* const*) = nullptr;
    void* const* parameters = nullptr;
    u8* shared = nullptr;  // SHARED_BYTES between two areas that cannot be touched

    Machine() {
        void* memory = mmap(nullptr, SHARED_BYTES + 2 * GUARD_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        shared = static_cast<u8*>(memory) + GUARD_BYTES;
        if (memory == MAP_FAILED || mprotect(shared, SHARED_BYTES, PROT_READ | PROT_WRITE) != 0) {
            std::perror("emulator: no memory for a block's shared memory");
            std::abort();
        }
    }

    ~Machine() { munmap(shared - GUARD_BYTES, SHARED_BYTES + 2 * GUARD_BYTES); }
};

static Machine& machine() {
    static thread_local Machine of_this_thread;
    return of_this_thread;
}

// The machine that runs a grid on this OS thread.
static thread_local Machine* active = nullptr;

const Thread* running_thread() {
    return active != nullptr ? active->block.running : nullptr;
}

void run_from(Thread& self, Thread* start) {
    Thread* next = start;
    while (!next->ready()) {
        next = next->next;
        if (next == start) {
            fail_deadlock(*self.block);
        }
    }
    if (next != &self) {
        self.block->running = next;
        switch_context(self.context, next->context);
    }
}

void pause_thread() {
    sched_yield();
    Thread& self = *here();
    run_from(self, self.next);
}

u64 nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<u64>(now.tv_sec) * 1000000000ull + static_cast<u64>(now.tv_nsec);
}

// Lets all go on that wait at the block's barrier; every thread that has not returned is there.
static void open_barrier(Block& block) {
    switch (block.barrier) {
        case Meeting::BlockBarrierOr:
            block.result = block.votes != 0;
            break;
        case Meeting::BlockBarrierAnd:
            block.result = block.votes == block.waiting;
            break;
        default:
            block.result = block.votes;
    }
    block.waiting = 0;
    block.votes = 0;
    for (Warp& warp : block.warps) {
        warp.ready = warp.live;
    }
}

u32 meet_block(Meeting kind, bool vote, Place place) {
    Thread& self = *here();
    Block& block = *self.block;
    if (block.waiting == 0) {
        block.barrier = kind;
    } else if (block.barrier != kind) {
        fail_at(place, "%s, but other threads of the block are at %s", name_of(kind), name_of(block.barrier));
    }
    block.waiting++;
    block.votes += vote;
    self.place = place;
    self.waits_for = kind;
    self.warp->ready &= ~(1u << self.lane);
    if (block.waiting == block.live) {
        open_barrier(block);
        run_from(self, block.first);
    } else {
        run_from(self, self.next);
    }
    self.waits_for = Meeting::None;
    return block.result;
}

// The running thread has returned from the kernel.
[[noreturn]] static void leave() {
    Thread& self = *here();
    Warp& warp = *self.warp;
    Block& block = *self.block;
    u32 lane = 1u << self.lane;
    warp.live &= ~lane;
    warp.ready &= ~lane;
    block.live--;
    if (block.live == 0) {
        switch_context(self.context, machine().host);
    }
    // Others may have waited only for this one.
    for (WarpMeeting& meeting : warp.meetings) {
        if (warp.pending == 0) {
            break;
        }
        if (meeting.arrived != 0 && meeting.arrived == (meeting.mask & warp.live)) {
            complete(warp, meeting);
        }
    }
    if (block.waiting == block.live) {
        open_barrier(block);
    }
    run_from(self, self.next);
    std::abort();  // nobody goes on with a thread that returned
}

static void thread_main() {
    const Machine& m = machine();
    m.body(m.parameters);
    leave();
}

// Puts all threads of the block at the kernel's first instruction.
static void begin_block(Machine& m) {
    Block& block = m.block;
    u32 count = static_cast<u32>(block.size.count());
    block.live = count;
    block.waiting = 0;
    block.votes = 0;
    block.warps.resize((count + WARP - 1) / WARP);
    for (u32 i = 0; i < count; i++) {
        Thread& thread = *m.threads[i];
        prepare(thread.context, m.stacks[i], i, thread_main);
        thread.block = &block;
        thread.warp = &block.warps[i / WARP];
        thread.lane = i % WARP;
        thread.index = {i % block.size.x, i / block.size.x % block.size.y, i / block.size.x / block.size.y};
        thread.waits_for = Meeting::None;
        thread.copies.clear();
        thread.copy_group = 0;
    }

    static thread_local std::vector<u32> warps, lanes;
    block.order = choose_order();
    fill_order(warps, static_cast<u32>(block.warps.size()), block.order);
    Thread** link = &block.first;
    for (u32 w : warps) {
        u32 size = std::min(count - w * WARP, WARP);
        fill_order(lanes, size, block.order);
        Warp& warp = block.warps[w];
        warp.live = warp.ready = size == WARP ? ~0u : (1u << size) - 1;
        warp.first = m.threads[w * WARP + lanes[0]].get();
        for (u32 lane : lanes) {
            *link = m.threads[w * WARP + lane].get();
            link = &(*link)->next;
        }
    }
    *link = block.first;
    std::memset(block.shared, 0xff, block.shared_bytes);  // NaN: what was not written must not be read
}

void run_grid(const char* kernel, Dim3 grid, Dim3 size, u32 shared_bytes, void (*body)(void* const*),
              void* const* parameters) {
    report_signals();
    Machine& m = machine();
    while (m.threads.size() < size.count()) {
        m.stacks.emplace_back();
        m.threads.push_back(std::make_unique<Thread>());
        *m.stacks.back().word() = m.threads.back().get();
    }
    m.body = body;
    m.parameters = parameters;
    Block& block = m.block;
    block.kernel = kernel;
    block.grid = grid;
    block.size = size;
    // The end is at the area that cannot be touched.
    block.shared_bytes = (shared_bytes + 15) / 16 * 16;
    block.shared = m.shared + SHARED_BYTES - block.shared_bytes;
    active = &m;
    for (u32 z = 0; z < grid.z; z++) {
        for (u32 y = 0; y < grid.y; y++) {
            for (u32 x = 0; x < grid.x; x++) {
                block.index = {x, y, z};
                begin_block(m);
                block.running = block.first;
                switch_context(m.host, block.first->context);
            }
        }
    }
    active = nullptr;
}

const char* overrun_at(const void* address) {
    const Machine& m = machine();
    const u8* place = static_cast<const u8*>(address);
    if (place >= m.shared - GUARD_BYTES && place < m.shared + SHARED_BYTES + GUARD_BYTES) {
        return "outside the block's dynamic shared memory";
    }
    for (const Stack& stack : m.stacks) {
        if (stack.overflowed_at(address)) {
            return "the thread's stack is full";
        }
    }
    return nullptr;
}

}  // namespace emulator
