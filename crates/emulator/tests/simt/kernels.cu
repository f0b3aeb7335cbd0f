// Kernels that use every meeting point once, for tests of the emulator itself.
#include "device.cuh"

static const i32 THREADS = 96;

// out[i] = sum of the block's numbers; the barriers are needed in every order of threads.
KERNEL(96, 1, test_barriers, (const u32* in, u32* out, u32* votes)) {
    __shared__ u32 numbers[THREADS];
    numbers[threadIdx.x] = in[blockIdx.x * THREADS + threadIdx.x];
    __syncthreads();
    u32 sum = 0;
    for (i32 i = 0; i < THREADS; i++) {
        sum += numbers[i];
    }
    __syncthreads();
    numbers[THREADS - 1 - threadIdx.x] = sum + threadIdx.x;
    __syncthreads();
    out[blockIdx.x * THREADS + threadIdx.x] = numbers[threadIdx.x];
    u32 count = static_cast<u32>(__syncthreads_count(threadIdx.x % 3 == 0));
    u32 any = static_cast<u32>(__syncthreads_or(threadIdx.x == 50));
    u32 none = static_cast<u32>(__syncthreads_or(0));
    u32 all = static_cast<u32>(__syncthreads_and(1));
    u32 not_all = static_cast<u32>(__syncthreads_and(threadIdx.x != 50));
    votes[blockIdx.x * THREADS + threadIdx.x] = count << 4 | any << 3 | none << 2 | all << 1 | not_all;
}

// Half of the threads return before the barrier; the others exchange through shared memory after it.
KERNEL(96, 1, test_early_return, (u32* out)) {
    u32* shared = dynamic_shared<u32>();
    if (threadIdx.x % 2 == 1) {
        return;
    }
    shared[threadIdx.x] = threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = shared[94 - threadIdx.x];
}

// Ten words for each lane: what every shuffle and vote gives.
KERNEL(64, 1, test_shuffles, (u32* out)) {
    u32 lane = threadIdx.x % 32;
    u32* mine = out + threadIdx.x * 10;
    mine[0] = __shfl_sync(FULL_WARP, lane * 10, 7);
    mine[1] = __shfl_sync(FULL_WARP, lane * 10, 3, 8);
    mine[2] = __shfl_up_sync(FULL_WARP, lane, 5);
    mine[3] = __shfl_down_sync(FULL_WARP, lane, 5);
    mine[4] = __shfl_xor_sync(FULL_WARP, lane, 9);
    mine[5] = static_cast<u32>(__shfl_xor_sync(FULL_WARP, static_cast<u64>(lane) << 40, 1) >> 40);
    mine[6] = __ballot_sync(FULL_WARP, lane % 4 == 1);
    mine[7] = static_cast<u32>(__any_sync(FULL_WARP, lane == 9) * 2 + __all_sync(FULL_WARP, lane != 9));
    // The halves of the warp go separate ways.
    if (lane < 16) {
        mine[8] = __shfl_xor_sync(0x0000ffffu, lane, 1);
    } else {
        mine[8] = __ballot_sync(0xffff0000u, 1);
    }
    __syncwarp();
    mine[9] = static_cast<u32>(__shfl_xor_sync(FULL_WARP, static_cast<float>(lane), 16));
}

// c[16×8] += a[16×16] · b[16×8]; b is given by columns, as a row-major [8][16].
KERNEL(32, 1, test_mma, (const u32* a, const u32* b, float* c)) {
    u32 group = threadIdx.x / 4, pair = threadIdx.x % 4;
    float sums[4] = {c[group * 8 + pair * 2], c[group * 8 + pair * 2 + 1], c[(group + 8) * 8 + pair * 2],
                     c[(group + 8) * 8 + pair * 2 + 1]};
    mma_bf16(sums, a[group * 8 + pair], a[(group + 8) * 8 + pair], a[group * 8 + pair + 4], a[(group + 8) * 8 + pair + 4],
             b[group * 8 + pair], b[group * 8 + pair + 4]);
    c[group * 8 + pair * 2] = sums[0];
    c[group * 8 + pair * 2 + 1] = sums[1];
    c[(group + 8) * 8 + pair * 2] = sums[2];
    c[(group + 8) * 8 + pair * 2 + 1] = sums[3];
}

// Copies `tiles` times 32 × 16 bytes through two buffers of shared memory; every second tile as zeros.
KERNEL(32, 1, test_copies, (const uint4* in, uint4* out, i32 tiles)) {
    uint4* shared = dynamic_shared<uint4>();
    cp_async16(&shared[threadIdx.x], &in[threadIdx.x], true);
    cp_async_commit();
    for (i32 tile = 0; tile < tiles; tile++) {
        if (tile + 1 < tiles) {
            i32 next = tile + 1;
            cp_async16(&shared[next % 2 * 32 + threadIdx.x], &in[next * 32 + threadIdx.x], next % 2 == 0);
        }
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        out[tile * 32 + threadIdx.x] = shared[tile % 2 * 32 + (threadIdx.x + 1) % 32];
        __syncthreads();
    }
}

// Two blocks' worth of threads in different launches wait for each other: the flag of `peer` becomes `round`.
KERNEL(32, 1, test_handshake, (u32* mine, const u32* peer, u32 rounds)) {
    for (u32 round = 1; round <= rounds; round++) {
        if (threadIdx.x == 0) {
            store_release_system(mine, round);
            while (load_acquire_system(peer) < round) {
                spin_pause();
            }
        }
        __syncwarp();
    }
}

KERNEL(256, 1, test_add, (float* x, float value, i32 count)) {
    i32 i = static_cast<i32>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < count) {
        x[i] += value;
    }
}

// Mistakes, each of which must end the process with a sentence.

KERNEL(64, 1, wrong_divergence, (u32* out)) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        out[threadIdx.x] = static_cast<u32>(__syncthreads_or(1));
    }
}

KERNEL(32, 1, wrong_deadlock, (u32* out)) {
    if (threadIdx.x < 8) {
        __syncthreads();
    } else {
        out[threadIdx.x] = __shfl_xor_sync(FULL_WARP, threadIdx.x, 1);
    }
}

KERNEL(32, 1, wrong_alignment, (u32* out)) {
    store16(out + 1, make_uint4(0, 0, 0, 0));
}

KERNEL(32, 1, wrong_address, (u32* out)) {
    out[threadIdx.x == 5 ? 1024 : 0] = 1;
}

KERNEL(32, 1, wrong_index, (u32* out)) {
    u32 numbers[4] = {1, 2, 3, 4};
    out[0] = numbers[4 + out[0]];
}

KERNEL(32, 1, wrong_sum, (u32* out)) {
    i32 sum = 0x7fffffff + static_cast<i32>(threadIdx.x);
    out[threadIdx.x] = sum > 0 ? 1 : 2;
}

KERNEL(32, 1, wrong_shared_overrun, (u32* out)) {
    out[0] = dynamic_shared<u32>()[64 + threadIdx.x];
}

static __attribute__((noinline)) u32 descend(u32 depth, const u32* out) {
    u32 page[256];
    for (u32 i = 0; i < 256; i++) {
        page[i] = depth + i + out[0];
    }
    return depth == 0 ? page[7] : descend(depth - 1, out) + page[out[0] % 256];
}

KERNEL(32, 1, wrong_stack, (u32* out)) {
    out[0] = descend(1000, out);
}

// Lacks a barrier: the result depends on the order of the threads.
KERNEL(64, 1, wrong_missing_barrier, (u32* out)) {
    __shared__ u32 numbers[64];
    numbers[threadIdx.x] = blockIdx.x * 64 + threadIdx.x;
    out[blockIdx.x * 64 + threadIdx.x] = numbers[63 - threadIdx.x];
}
