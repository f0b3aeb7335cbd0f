// Where the lanes of a warp meet: barrier, shuffles, votes, and the matrix multiplication. The last lane that arrives does
// the work for all.
#include "fault.h"
#include "machine.h"

namespace emulator {

// c += a · b. The products of two bf16 are exact in f32; they are added to c one after the other in ascending k, each sum
// rounded to nearest. (Real tensor cores add in another order and truncate: results differ there in the last bits, by
// design of the hardware and not of the kernel.)
static void multiply(MmaOperands& operands) {
    typedef float Row __attribute__((vector_size(32)));
    typedef u32 Pairs __attribute__((vector_size(32)));
    const u32 upper = 0xffff0000u;
    const Pairs high = {upper, upper, upper, upper, upper, upper, upper, upper};

    Row b[16];
    for (u32 pair = 0; pair < 8; pair++) {
        Pairs rows = *reinterpret_cast<const Pairs*>(&operands.b[pair / 4][pair % 4 * 8]);
        b[2 * pair] = reinterpret_cast<Row>(rows << 16);
        b[2 * pair + 1] = reinterpret_cast<Row>(rows & high);
    }
    for (u32 half = 0; half < 2; half++) {
        Row sums[8];
        for (u32 row = 0; row < 8; row++) {
            sums[row] = *reinterpret_cast<const Row*>(operands.c[half * 8 + row]);
        }
#pragma GCC unroll 8
        for (u32 pair = 0; pair < 8; pair++) {
            const u32* column = &operands.a[half + pair / 4 * 2][pair % 4];
#pragma GCC unroll 8
            for (u32 row = 0; row < 8; row++) {
                u32 word = column[row * 4];
                Pairs both = {word, word, word, word, word, word, word, word};
                sums[row] += reinterpret_cast<Row>(both << 16) * b[2 * pair];
                sums[row] += reinterpret_cast<Row>(both & high) * b[2 * pair + 1];
            }
        }
        for (u32 row = 0; row < 8; row++) {
            *reinterpret_cast<Row*>(operands.c[half * 8 + row]) = sums[row];
        }
    }
}

// Others than `lanes` may not have read their last result yet: theirs must stay.
template <class F> static void for_each_lane(u32 lanes, F f) {
    for (u32 left = lanes; left != 0; left &= left - 1) {
        f(static_cast<u32>(__builtin_ctz(left)));
    }
}

void complete(Warp& warp, WarpMeeting& meeting) {
    u32 lanes = meeting.arrived;
    switch (meeting.kind) {
        case Meeting::Shuffle:
            for_each_lane(lanes, [&](u32 lane) {
                u32 source = warp.source[lane];
                // The value of a lane that takes no part is undefined: all ones, a NaN.
                warp.result[lane] = lanes >> source & 1 ? warp.value[source] : ~0ull;
            });
            break;
        case Meeting::Ballot: {
            u32 votes = 0;
            for_each_lane(lanes, [&](u32 lane) { votes |= static_cast<u32>(warp.value[lane] != 0) << lane; });
            for_each_lane(lanes, [&](u32 lane) { warp.result[lane] = static_cast<u64>(lanes) << 32 | votes; });
            break;
        }
        case Meeting::Mma:
            if (lanes != ~0u) {
                fail("mma_bf16 needs all 32 lanes of a warp, but only the lanes %08x are there", lanes);
            }
            multiply(warp.mma);
            break;
        default:
            break;
    }
    meeting.arrived = 0;
    warp.pending--;
    warp.ready |= lanes;
}

// The meeting of the lanes in `mask`, or a free one for it. Nearly always it is the first: that of the whole warp.
static WarpMeeting& find_meeting(Warp& warp, u32 mask) {
    WarpMeeting* free = nullptr;
    for (WarpMeeting& meeting : warp.meetings) {
        if (meeting.arrived != 0 && meeting.mask == mask) {
            return meeting;
        }
        if (meeting.arrived == 0 && free == nullptr) {
            free = &meeting;
            if (warp.pending == 0) {
                break;
            }
        }
    }
    return *free;  // there are as many as lanes, and the calling lane is in none
}

void meet_warp(Meeting kind, u32 mask, Place place) {
    Thread& self = *here();
    Warp& warp = *self.warp;
    u32 lane = 1u << self.lane;
    if (!(mask & lane)) {
        fail_at(place, "%s with the mask %08x, which does not name the lane that calls (%u)", name_of(kind), mask, self.lane);
    }
    WarpMeeting& meeting = find_meeting(warp, mask);
    if (meeting.arrived == 0) {
        meeting.kind = kind;
        meeting.mask = mask;
        warp.pending++;
    } else if (meeting.kind != kind) {
        fail_at(place, "%s with the mask %08x, but other lanes of this mask are at %s", name_of(kind), mask,
                name_of(meeting.kind));
    }
    meeting.arrived |= lane;
    self.place = place;
    if (meeting.arrived != (mask & warp.live)) {
        self.waits_for = kind;
        warp.ready &= ~lane;
        run_from(self, self.next);
        self.waits_for = Meeting::None;
        return;
    }
    complete(warp, meeting);
    run_from(self, warp.first);
}

}  // namespace emulator
