// The reduction tree over the units, as a program for a stack machine: adding sums of units, in order, into sums of sub-trees.
//
// The host writes the program out of its `Tree`: unit after unit, the unit's value is pushed, then the two values on top are
// added (left + right) merges[i] times, then the value on top leaves for output store[i], unless that is -1. Every sub-tree
// that a rank holds whole is one output.
#pragma once
#include "device.cuh"

static constexpr i32 MAX_UNITS = 64;
static constexpr i32 MAX_OUTPUTS = 16;  // a run of leaves of a balanced tree of 64 is at most 10 whole sub-trees
static constexpr i32 STACK_DEPTH = 7;   // a leaf of a tree of 64 and the left siblings above it
static constexpr i32 FOUR = 4;          // elements that a thread adds at a time

// 132 bytes, aligned to 4.
struct FoldProgram {
    i32 count;
    u8 merges[MAX_UNITS];
    signed char store[MAX_UNITS];
};

// 512 bytes.
struct Parts {
    const float* part[MAX_UNITS];
};

// 128 bytes.
struct Outputs {
    float* out[MAX_OUTPUTS];
};

// `WIDTH` stacks side by side, in registers: values move, so that all indexes are constants.
template <i32 WIDTH> struct FoldStack {
    float value[STACK_DEPTH][WIDTH];

    __device__ __forceinline__ FoldStack() {
#pragma unroll
        for (i32 i = 0; i < STACK_DEPTH; i++) {
#pragma unroll
            for (i32 lane = 0; lane < WIDTH; lane++) {
                value[i][lane] = 0.0f;
            }
        }
    }

    __device__ __forceinline__ void push(const float (&top)[WIDTH]) {
#pragma unroll
        for (i32 lane = 0; lane < WIDTH; lane++) {
#pragma unroll
            for (i32 i = STACK_DEPTH - 1; i > 0; i--) {
                value[i][lane] = value[i - 1][lane];
            }
            value[0][lane] = top[lane];
        }
    }

    __device__ __forceinline__ void pop() {
#pragma unroll
        for (i32 lane = 0; lane < WIDTH; lane++) {
#pragma unroll
            for (i32 i = 0; i + 1 < STACK_DEPTH; i++) {
                value[i][lane] = value[i + 1][lane];
            }
        }
    }

    // Replaces the two values on top by their sum, `times` times.
    __device__ __forceinline__ void merge(i32 times) {
#pragma unroll 1
        for (; times > 0; times--) {
            float sum[WIDTH];
#pragma unroll
            for (i32 lane = 0; lane < WIDTH; lane++) {
                sum[lane] = value[1][lane] + value[0][lane];
            }
            pop();
#pragma unroll
            for (i32 lane = 0; lane < WIDTH; lane++) {
                value[0][lane] = sum[lane];
            }
        }
    }
};

// Four elements from `first` on, of which those from `count` on do not exist (zeros). The address is a multiple of 16.
static __device__ __forceinline__ void read_four(const float* part, i64 first, i64 count, float (&value)[FOUR]) {
    if (first + FOUR <= count) {
        uint4 four = load16(part + first);
        value[0] = __uint_as_float(four.x);
        value[1] = __uint_as_float(four.y);
        value[2] = __uint_as_float(four.z);
        value[3] = __uint_as_float(four.w);
        return;
    }
#pragma unroll
    for (i32 i = 0; i < FOUR; i++) {
        value[i] = first + i < count ? part[first + i] : 0.0f;
    }
}

static __device__ __forceinline__ void write_four(float* out, i64 first, i64 count, const float (&value)[FOUR]) {
    if (first + FOUR <= count) {
        store16(out + first, make_uint4(__float_as_uint(value[0]), __float_as_uint(value[1]), __float_as_uint(value[2]),
                                        __float_as_uint(value[3])));
        return;
    }
#pragma unroll
    for (i32 i = 0; i < FOUR; i++) {
        if (first + i < count) {
            out[first + i] = value[i];
        }
    }
}
