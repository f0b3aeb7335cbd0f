// Adds whole [T, n] results of units, or of sub-trees of several ranks, along the reduction tree.
//
// fold(parts, program, outputs, count): grid ⌈count / 1024⌉, block 256, no dynamic shared memory.
//   parts: the units' sums, 64 pointers by value, `program.count` of them used; f32, `count` elements, aligned to 16 bytes.
//   program, outputs: see tree.cuh; f32, `count` elements, aligned to 16 bytes. An output may be a part of its own sub-tree.
//   count: elements of a part (i64).
#include "tree.cuh"

static constexpr i32 THREADS = 256;
static constexpr i32 WIDTH = 4;

// 512 bytes.
struct Parts {
    const float* part[MAX_UNITS];
};

static __device__ __forceinline__ void read(const float* part, i64 first, i64 count, float (&value)[WIDTH]) {
    if (first + WIDTH <= count) {
        uint4 four = load16(part + first);
        value[0] = __uint_as_float(four.x);
        value[1] = __uint_as_float(four.y);
        value[2] = __uint_as_float(four.z);
        value[3] = __uint_as_float(four.w);
        return;
    }
#pragma unroll
    for (i32 i = 0; i < WIDTH; i++) {
        value[i] = first + i < count ? part[first + i] : 0.0f;
    }
}

static __device__ __forceinline__ void write(float* out, i64 first, i64 count, const float (&value)[WIDTH]) {
    if (first + WIDTH <= count) {
        store16(out + first, make_uint4(__float_as_uint(value[0]), __float_as_uint(value[1]), __float_as_uint(value[2]),
                                        __float_as_uint(value[3])));
        return;
    }
#pragma unroll
    for (i32 i = 0; i < WIDTH; i++) {
        if (first + i < count) {
            out[first + i] = value[i];
        }
    }
}

KERNEL(256, 3, fold,
       (const __grid_constant__ Parts parts, const __grid_constant__ FoldProgram program,
        const __grid_constant__ Outputs outputs, i64 count)) {
    i64 first = (static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x) * WIDTH;
    if (first >= count) {
        return;
    }
    FoldStack<WIDTH> stack;
    float next[WIDTH];
    read(parts.part[0], first, count, next);
#pragma unroll 1
    for (i32 unit = 0; unit < program.count; unit++) {
        stack.push(next);
        if (unit + 1 < program.count) {  // on its way while this one is added
            read(parts.part[unit + 1], first, count, next);
        }
        stack.merge(program.merges[unit]);
        i32 output = program.store[unit];
        if (output >= 0) {
            write(outputs.out[output], first, count, stack.value[0]);
            stack.pop();
        }
    }
}
