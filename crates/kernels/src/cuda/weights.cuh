// Weights on the device: the formats, and how a lane turns its bytes into operands of the matrix instruction.
//
// A matrix is [n][k], one unit's. Each row lies by itself, as a run of *lines* of 64 bytes; rows follow each other without a
// gap. A line holds LINE_K values. In the matrix instruction, lane 4g + t works on row g (and g + 8) and takes *piece* t of
// the line, its bytes 16t..16t+15: for every *block* of 32 values of the line, the eight values 8t..8t+7. So
//
//   format  LINE_K  rows are padded to  where value (i, k) lies in row i
//   bf16      32    a multiple of 32    bytes 64·(k/32) + 2·(k%32) and the next
//   int8      64    a multiple of 128   byte 64·(k/64) + 16·((k%32)/8) + 8·((k%64)/32) + 4·((k%8)/4) + (0, 2, 1, 3)[k%4]
//   fp8       64    a multiple of 128   like int8
//   int4     128    a multiple of 128   nibble 128·(k/128) + 32·((k%32)/8) + 8·((k%128)/32) + (0, 4, 1, 5, 2, 6, 3, 7)[k%8],
//                                       nibble 2b being the lower half of byte b
//
// Padding is zeros for bf16 and fp8, and anything for int8 and int4 (x is taken as zero there).
//
//   bf16: the value.
//   int4, int8: (q - z)·s, with a zero z and a scale s for each row and group of 128 k. int4: q, z in 0..15. int8: q, z in
//         0..255, and the byte stored is q ^ 0x80. q - z is exact in bf16; s multiplies the group's sum, in f32.
//   fp8:  E4M3 (no NaN), exact in bf16, times a scale of the row, which multiplies the whole sum in f32.
//
// scales, int4 and int8: f32 [⌈n/16⌉][⌈k/128⌉][8][2], where row i's lies at [i/16][group][i%8][i%16/8]; zeros: u8, likewise.
// Rows beyond n have entries too (any). scales, fp8: f32 [n]. Pointers are aligned to 16 bytes.
#pragma once
#include "device.cuh"

// A dot product over k is summed in segments of so many from k = 0, each from a fresh accumulator, in one chain of matrix
// instructions in ascending order of k; then the segments are added in ascending order. In a segment of a grouped format each
// group is such a chain, and segment = fma(scale, group, segment). That fixes the bits for every number of rows.
static constexpr i32 SEGMENT_K = 512;
static constexpr i32 GROUP_K = 128;
static constexpr i32 MAX_PANELS = 64;

// What a sum starts from: the only number that leaves every other as it is when added to it, -0 too.
static constexpr float NOTHING = -0.0f;

// One unit's matrix. 48 bytes, aligned to 8.
struct Panel {
    const u8* weights;
    const float* scales;  // not bf16
    const u8* zeros;      // int4 and int8
    i64 out_offset;       // elements from `out` to the panel's first result
    i32 n;
    i32 k;                // k % 8 == 0
    i32 x_offset;         // first column of x
};

struct Panels {
    Panel panel[MAX_PANELS];
};

// A format has: LINE_K; STEP_K, the k of a step of the kernels' loops (whole steps are computed, beyond k with zeros);
// PADDED_K, what rows are padded to; GROUPED and ROW_SCALED; `widen`, the eight values of a piece that belong to `block`, as
// bf16; for grouped ones `offset`, what widen needs of the zero.
struct Bf16 {
    static constexpr i32 LINE_K = 32, STEP_K = 64, PADDED_K = 32;
    static constexpr bool GROUPED = false, ROW_SCALED = false;

    static __device__ __forceinline__ uint4 widen(uint4 piece, i32 block, u32 offset) {
        return piece;
    }
};

static __device__ __forceinline__ u32 word_of(uint4 v, i32 i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

static constexpr u32 BF16X2_ONE = 0x3f803f80u;
static constexpr u32 BF16X2_128 = 0x43004300u;
static constexpr u32 BF16X2_MINUS_64 = 0xc280c280u;
static constexpr u32 BF16X2_2_TO_120 = 0x7b807b80u;

struct Int4 {
    static constexpr i32 LINE_K = 128, STEP_K = 128, PADDED_K = 128;
    static constexpr bool GROUPED = true, ROW_SCALED = false;

    static __device__ __forceinline__ u32 offset(u32 zero) {
        float x = -static_cast<float>(128 + zero);
        return pack_bf16x2(x, x);
    }

    // In 128..255 the last bit of a bf16 is worth 1: q put into the low bits of 128 is 128 + q.
    static __device__ __forceinline__ u32 pair(u32 nibbles, u32 offset) {
        return fma_bf16x2(and_or(nibbles, 0x000f000fu, BF16X2_128), BF16X2_ONE, offset);
    }

    static __device__ __forceinline__ uint4 widen(uint4 piece, i32 block, u32 offset) {
        u32 word = word_of(piece, block);
        return make_uint4(pair(word, offset), pair(word >> 4, offset), pair(word >> 8, offset), pair(word >> 12, offset));
    }
};

struct Int8 {
    static constexpr i32 LINE_K = 64, STEP_K = 128, PADDED_K = 128;
    static constexpr bool GROUPED = true, ROW_SCALED = false;

    static __device__ __forceinline__ u32 offset(u32 zero) {
        float x = -static_cast<float>(zero);
        return pack_bf16x2(x, x);
    }

    // With q = low + 128·(1 - top), `top` being the stored byte's: (128 + low) - z, then - 128·top. Both are exact.
    static __device__ __forceinline__ u32 pair(u32 low, u32 top, u32 offset) {
        u32 sum = fma_bf16x2(and_or(low, 0x007f007fu, BF16X2_128), BF16X2_ONE, offset);
        return fma_bf16x2(top & 0x40004000u, BF16X2_MINUS_64, sum);  // 0x4000 is 2
    }

    static __device__ __forceinline__ uint4 widen(uint4 piece, i32 block, u32 offset) {
        u32 first = word_of(piece, 2 * block);
        u32 second = word_of(piece, 2 * block + 1);
        return make_uint4(pair(first, first << 7, offset), pair(first >> 8, first >> 1, offset),
                          pair(second, second << 7, offset), pair(second >> 8, second >> 1, offset));
    }
};

struct Fp8 {
    static constexpr i32 LINE_K = 64, STEP_K = 128, PADDED_K = 128;
    static constexpr bool GROUPED = false, ROW_SCALED = true;

    // E4M3's exponent and mantissa in place of bf16's are the value times 2^-120, subnormals too.
    static __device__ __forceinline__ u32 pair(u32 magnitude, u32 sign) {
        return fma_bf16x2(and_or(magnitude, 0x07f007f0u, sign & 0x80008000u), BF16X2_2_TO_120, 0);
    }

    static __device__ __forceinline__ uint4 widen(uint4 piece, i32 block, u32 offset) {
        u32 first = word_of(piece, 2 * block);
        u32 second = word_of(piece, 2 * block + 1);
        return make_uint4(pair(first << 4, first << 8), pair(first >> 4, first), pair(second << 4, second << 8),
                          pair(second >> 4, second));
    }
};

static __device__ __forceinline__ i32 round_up(i32 a, i32 b) {
    return ceil_div(a, b) * b;
}

// Bytes of a row.
template <class Format> static __device__ __forceinline__ i32 row_bytes(i32 k) {
    return ceil_div(k, Format::PADDED_K) * (Format::PADDED_K / Format::LINE_K * 64);
}

// sum += weights · x over a block: 16 rows (this lane's eight values of rows g and g + 8) by 32 k by 8 rows of x (this lane's
// eight values of row g). Which k the instruction takes for which does not matter, as long as both operands agree.
static __device__ __forceinline__ void multiply_block(float (&sum)[4], uint4 top, uint4 bottom, uint4 x) {
    mma_bf16(sum, top.x, bottom.x, top.y, bottom.y, x.x, x.y);
    mma_bf16(sum, top.z, bottom.z, top.w, bottom.w, x.z, x.w);
}

// segment = fma(scale, group, segment), with the scales of rows g and g + 8.
static __device__ __forceinline__ void add_group(float (&segment)[4], float top_scale, float bottom_scale,
                                                 const float (&group)[4]) {
    segment[0] = fmaf(top_scale, group[0], segment[0]);
    segment[1] = fmaf(top_scale, group[1], segment[1]);
    segment[2] = fmaf(bottom_scale, group[2], segment[2]);
    segment[3] = fmaf(bottom_scale, group[3], segment[3]);
}
