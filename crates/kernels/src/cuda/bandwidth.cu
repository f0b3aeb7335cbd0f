// Reads memory and does nothing else: what decoding is measured against.
//
// read_memory(memory, count, out): `count` pieces of 16 bytes, aligned to 16. Every thread of the grid writes to `out` the exclusive or
//   of the words that it read; that of all of `out` is that of all the memory, which shows that nothing was left out.
//   Block 256, any grid, no dynamic shared memory.
#include "device.cuh"

static const i32 THREADS = 256;
// Loads that a thread has under way.
static const i32 AT_ONCE = 8;

static __device__ __forceinline__ u32 folded(uint4 v) {
    return v.x ^ v.y ^ v.z ^ v.w;
}

KERNEL(256, 4, read_memory, (const uint4* memory, i64 count, u32* out)) {
    i64 stride = static_cast<i64>(gridDim.x) * THREADS;
    i64 thread = static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x;
    i64 at = thread;
    u32 sum = 0;
    for (; at + (AT_ONCE - 1) * stride < count; at += AT_ONCE * stride) {
        uint4 pieces[AT_ONCE];
#pragma unroll
        for (i32 i = 0; i < AT_ONCE; i++) {
            pieces[i] = load_stream16(memory + at + i * stride);
        }
#pragma unroll
        for (i32 i = 0; i < AT_ONCE; i++) {
            sum ^= folded(pieces[i]);
        }
    }
    for (; at < count; at += stride) {
        sum ^= folded(load_stream16(memory + at));
    }
    out[thread] = sum;
}
