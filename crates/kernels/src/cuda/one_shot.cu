// Collectives of ranks that see each other's memory: every rank writes what it has into its own mailbox, tells so, waits for the
// others, and reads theirs. One exchange, so few bytes travel fastest; longer messages go in rounds of 1024 elements of a block.
//
// one_shot_reduce(group, own, program, leaves, out, count): adds the sub-trees of all ranks along the reduction tree.
//   own: this rank's sub-trees, 64 pointers by value, `group.parts` of them used; f32, `count` elements, aligned to 16 bytes.
//   program, leaves: how the sub-trees of all ranks are added (tree.cuh), and where each comes from.
//   out: f32, `count` elements, aligned to 16 bytes. All ranks get the same bits.
// one_shot_gather(group, x, columns, rows, out, longest): puts the ranks' columns side by side on rank `columns.root`.
//   x: f32 [rows, columns.count[rank]], aligned to 16 bytes; out: f32 [rows, Σ count], used on the root alone.
//   longest: elements of the largest x (i64); rows · Σ count < 2^31.
// Both: grid min(16, ⌈count or longest / 1024⌉), the same on all ranks; block 256, no dynamic shared memory. The blocks of all
// ranks run at the same time: they wait for each other.
//
// A mailbox, in the memory of its rank's device, its first 4096 bytes zeroed before the first call:
//   word 0: not 0 once a wait of this rank failed: what is begun later ends at once;
//   word 32 · (1 + block): rounds that the block has written. It counts on from launch to launch, so a recorded launch can be
//     replayed; each is in a cache line of its own;
//   from byte 4096 on: f32 [2][16 blocks][16 parts][1024], rounds in turn. Two are enough: before a block writes round n + 2 it
//     has seen that the others wrote n + 1, which they do after they read n.
// The board, page-locked memory of the host that all processes of the group share, words: [16] abort, raised by any thread of the host; [16] left, raised when a rank has
//   gone for good; [16] outcome, which the kernel leaves: 0, or ABORTED, or LEFT or LATE with the rank that was waited for above bit 8.
#include "tree.cuh"

static constexpr i32 THREADS = 256;
static constexpr i32 CHUNK = THREADS * FOUR;
static constexpr i32 MAX_RANKS = 16;
static constexpr i32 MAX_BLOCKS = 16;
static constexpr i32 LETTERS_BYTE = 4096;
static constexpr i32 LINE_WORDS = 32;
// The board is on the other side of the bus: it is looked at once in so many turns of a wait.
static constexpr u32 TURNS_PER_LOOK = 1024;

static constexpr u32 ABORTED = 1;
static constexpr u32 LEFT = 2;
static constexpr u32 LATE = 3;

// 160 bytes.
struct Group {
    u8* mailbox[MAX_RANKS];
    u32* board;
    u64 patience;  // nanoseconds that a rank waits for another
    i32 rank;
    i32 size;
    i32 parts;
    i32 unused;
};

// 128 bytes: rank and number of sub-tree of every leaf of the program.
struct Leaves {
    u8 rank[MAX_UNITS];
    u8 part[MAX_UNITS];
};

// 72 bytes: columns of every rank.
struct Columns {
    i32 count[MAX_RANKS];
    i32 root;
    i32 unused;
};

static __device__ __forceinline__ u32* failed_word(const Group& group) {
    return reinterpret_cast<u32*>(group.mailbox[group.rank]);
}

// Rounds that this block has written on `rank`.
static __device__ __forceinline__ u32* written(const Group& group, i32 rank) {
    return reinterpret_cast<u32*>(group.mailbox[rank]) + LINE_WORDS * (1 + static_cast<i32>(blockIdx.x));
}

// This thread's four elements of a part, in a round of this block on `rank`.
static __device__ __forceinline__ float* letter(const Group& group, i32 rank, u32 round, i32 part) {
    float* letters = reinterpret_cast<float*>(group.mailbox[rank] + LETTERS_BYTE);
    i32 index = (static_cast<i32>(round & 1) * MAX_BLOCKS + static_cast<i32>(blockIdx.x)) * MAX_OUTPUTS + part;
    return letters + index * CHUNK + static_cast<i32>(threadIdx.x) * FOUR;
}

static __device__ void fail(const Group& group, u32 why) {
    u32* outcome = group.board + 2 * MAX_RANKS + group.rank;
    if (load_acquire_system(outcome) == 0) {
        store_release_system(outcome, why);
    }
    store_release_system(failed_word(group), 1);
}

// Waits until this block of rank `peer` has written `round`. False if that is not to be.
static __device__ bool arrives(const Group& group, i32 peer, u32 round) {
    const u32* rounds = written(group, peer);
    u64 deadline = 0;
    bool left = false;
    for (u32 turn = 1;; turn++) {
        // They are counted modulo 2^32.
        if (static_cast<i32>(load_acquire_system(rounds) - round) >= 0) {
            return true;
        }
        if (left) {  // and it had not written it before it left
            fail(group, LEFT | static_cast<u32>(peer) << 8);
            return false;
        }
        if (turn % TURNS_PER_LOOK == 0) {
            if (load_acquire_system(group.board + group.rank) != 0) {
                fail(group, ABORTED);
                return false;
            }
            u64 now = global_nanoseconds();
            if (deadline == 0) {
                deadline = now + group.patience;
            }
            if (now > deadline) {
                fail(group, LATE | static_cast<u32>(peer) << 8);
                return false;
            }
            left = load_acquire_system(group.board + MAX_RANKS + peer) != 0;
        }
        spin_pause();
    }
}

// Rounds that this block wrote before this launch. Nothing is to be done where an earlier wait failed: false.
static __device__ bool begin(const Group& group, u32& round) {
    round = *written(group, group.rank);
    return !__syncthreads_or(threadIdx.x == 0 && load_acquire_system(failed_word(group)) != 0);
}

// Tells that this block's letters of `round` are written, and waits for everybody's. False if the wait failed.
static __device__ bool exchange(const Group& group, u32 round) {
    __syncthreads();
    i32 peer = static_cast<i32>(threadIdx.x);
    if (peer == 0) {
        store_release_system(written(group, group.rank), round);
    }
    bool missing = peer < group.size && peer != group.rank && !arrives(group, peer, round);
    return !__syncthreads_or(missing);
}

KERNEL(256, 2, one_shot_reduce,
       (const __grid_constant__ Group group, const __grid_constant__ Parts own, const __grid_constant__ FoldProgram program,
        const __grid_constant__ Leaves leaves, float* out, i64 count)) {
    u32 round;
    if (!begin(group, round)) {
        return;
    }
    for (i64 chunk = blockIdx.x; chunk * CHUNK < count; chunk += gridDim.x) {
        i64 first = chunk * CHUNK + static_cast<i32>(threadIdx.x) * FOUR;
        round++;
        float next[FOUR];
#pragma unroll 1
        for (i32 part = 0; part < group.parts; part++) {
            read_four(own.part[part], first, count, next);
            write_four(letter(group, group.rank, round, part), 0, FOUR, next);
        }
        if (!exchange(group, round)) {
            return;
        }
        FoldStack<FOUR> stack;
        read_four(letter(group, leaves.rank[0], round, leaves.part[0]), 0, FOUR, next);
#pragma unroll 1
        for (i32 leaf = 0; leaf < program.count; leaf++) {
            stack.push(next);
            if (leaf + 1 < program.count) {  // on its way while this one is added
                read_four(letter(group, leaves.rank[leaf + 1], round, leaves.part[leaf + 1]), 0, FOUR, next);
            }
            stack.merge(program.merges[leaf]);
        }
        write_four(out, first, count, stack.value[0]);
    }
}

KERNEL(256, 2, one_shot_gather,
       (const __grid_constant__ Group group, const float* x, const __grid_constant__ Columns columns, i32 rows, float* out,
        i64 longest)) {
    u32 round;
    if (!begin(group, round)) {
        return;
    }
    i32 all = 0;
    for (i32 rank = 0; rank < group.size; rank++) {
        all += columns.count[rank];
    }
    for (i64 chunk = blockIdx.x; chunk * CHUNK < longest; chunk += gridDim.x) {
        i32 first = static_cast<i32>(chunk) * CHUNK + static_cast<i32>(threadIdx.x) * FOUR;
        round++;
        float four[FOUR];
        read_four(x, first, rows * columns.count[group.rank], four);
        write_four(letter(group, group.rank, round, 0), 0, FOUR, four);
        if (!exchange(group, round)) {
            return;
        }
        if (group.rank != columns.root) {
            continue;
        }
        i32 before = 0;
        for (i32 rank = 0; rank < group.size; rank++) {
            i32 count = columns.count[rank];
            if (first < rows * count) {
                read_four(letter(group, rank, round, 0), 0, FOUR, four);
#pragma unroll
                for (i32 i = 0; i < FOUR; i++) {
                    i32 element = first + i;
                    if (element < rows * count) {
                        out[static_cast<i64>(element / count) * all + before + element % count] = four[i];
                    }
                }
            }
            before += count;
        }
    }
}
