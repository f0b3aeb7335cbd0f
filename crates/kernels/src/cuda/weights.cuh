// Weights on the device: the formats, and how a lane turns its bytes into operands of the matrix instruction.
//
// A matrix is [n][k], one unit's, cut into tiles of 16 rows (n padded) and each tile into *lines* of LINE_K columns (k padded to
// PADDED_K). A line of a tile is 1 KiB: [2 pieces][32 lanes][16 bytes], so that a warp reads it in two instructions of 512 bytes
// side by side. Line l of tile i begins at byte (i · k_padded / LINE_K + l) · 1024. Lane 4g + t holds columns 8t..8t+7 of each
// *block* of 32 columns of rows g and g + 8, the columns being counted from the line's first:
//
//   format  LINE_K  PADDED_K  piece p of lane 4g + t
//   bf16      32       64     both rows' columns 8t+4p..8t+4p+3: (g, first two) (g+8, first two) (g, last two) (g+8, last two),
//                             which is operand A of one matrix instruction as it stands: no register needs to move
//   int8      64      128     row g + 8p; byte 8·block + 4·((c%8)/4) + (0, 2, 1, 3)[c%4] is column c, block = c/32
//   fp8       64      128     likewise
//   int4     128      128     row g + 8p; nibble 8·block + (0, 4, 1, 5, 2, 6, 3, 7)[c%8] is column c, block = c/32; nibble 2b is
//                             the lower half of byte b
//
// So with r = row%16, c = column%LINE_K, t = c%32/8, in its line: bf16 value (r, c) is at byte
// 512·(c%8/4) + 16·(4·(r%8) + t) + 8·(c%4/2) + 4·(r/8) + 2·(c%2), and the byte or nibble of the others in the 16 bytes at
// 512·(r/8) + 16·(4·(r%8) + t). Padding columns are zeros for bf16 and fp8, and anything for int8 and int4 (x is zero there); rows
// beyond n are anything.
//
//   bf16: the value.
//   int4, int8: (q - z)·s, with a zero z and a scale s for each row and group of 128 columns. int4: q, z in 0..15. int8: q, z in
//         0..255, and the byte stored is q ^ 0x80. q - z is exact in bf16; s multiplies the group's sum, in f32.
//   fp8:  E4M3 (no NaN), exact in bf16, times a scale of the row, which multiplies the whole sum in f32.
//
// scales, int4 and int8: f32 [⌈n/16⌉][⌈k/128⌉][8][2], where row i's lies at [i/16][group][i%8][i%16/8]; zeros: u8, likewise.
// scales, fp8: f32 [n]. Pointers are aligned to 16 bytes.
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

// The operands A of a block's two matrix instructions: the first takes columns 8t..8t+3 of each lane, the second 8t+4..8t+7.
struct Fragment {
    uint4 first;
    uint4 second;
};

// What `fragment` needs of the zeros of rows g and g + 8.
struct Offsets {
    u32 top;
    u32 bottom;
};

// A format has: LINE_K; STEP_K, the columns of a step of the kernels' loops, which is also PADDED_K; GROUPED, ROW_SCALED;
// `fragment`, the operands of a block of a lane's two pieces of a line; and `offset` for a zero if it is grouped.
struct Bf16 {
    static constexpr i32 LINE_K = 32, STEP_K = 64;
    static constexpr bool GROUPED = false, ROW_SCALED = false;

    static __device__ __forceinline__ Fragment fragment(const uint4 (&pieces)[2], i32 block, Offsets offsets) {
        return {pieces[0], pieces[1]};
    }
};

// From the eight values of a block of rows g and g + 8.
static __device__ __forceinline__ Fragment interleave(uint4 top, uint4 bottom) {
    return {make_uint4(top.x, bottom.x, top.y, bottom.y), make_uint4(top.z, bottom.z, top.w, bottom.w)};
}

static __device__ __forceinline__ u32 word_of(uint4 v, i32 i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

static constexpr u32 BF16X2_ONE = 0x3f803f80u;
static constexpr u32 BF16X2_128 = 0x43004300u;
static constexpr u32 BF16X2_MINUS_128 = 0xc300c300u;
static constexpr u32 BF16X2_MINUS_64 = 0xc280c280u;
static constexpr u32 BF16X2_2_TO_120 = 0x7b807b80u;

struct Int4 {
    static constexpr i32 LINE_K = 128, STEP_K = 128;
    static constexpr bool GROUPED = true, ROW_SCALED = false;

    // -(128 + zero): see `pair`.
    static __device__ __forceinline__ u32 offset(u32 zero) {
        return zero * 0x00010001u | BF16X2_MINUS_128;
    }

    // In 128..255 the last bit of a bf16 is worth 1: q put into the low bits of 128 is 128 + q.
    static __device__ __forceinline__ u32 pair(u32 nibbles, u32 offset) {
        return fma_bf16x2(and_or(nibbles, 0x000f000fu, BF16X2_128), BF16X2_ONE, offset);
    }

    static __device__ __forceinline__ uint4 widen(uint4 piece, i32 block, u32 offset) {
        u32 word = word_of(piece, block);
        return make_uint4(pair(word, offset), pair(word >> 4, offset), pair(word >> 8, offset), pair(word >> 12, offset));
    }

    static __device__ __forceinline__ Fragment fragment(const uint4 (&pieces)[2], i32 block, Offsets offsets) {
        return interleave(widen(pieces[0], block, offsets.top), widen(pieces[1], block, offsets.bottom));
    }
};

struct Int8 {
    static constexpr i32 LINE_K = 64, STEP_K = 128;
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

    static __device__ __forceinline__ Fragment fragment(const uint4 (&pieces)[2], i32 block, Offsets offsets) {
        return interleave(widen(pieces[0], block, offsets.top), widen(pieces[1], block, offsets.bottom));
    }
};

struct Fp8 {
    static constexpr i32 LINE_K = 64, STEP_K = 128;
    static constexpr bool GROUPED = false, ROW_SCALED = true;

    // E4M3's exponent and mantissa in place of bf16's are the value times 2^-120, subnormals too.
    static __device__ __forceinline__ u32 pair(u32 magnitude, u32 sign) {
        return fma_bf16x2(and_or(magnitude, 0x07f007f0u, sign & 0x80008000u), BF16X2_2_TO_120, 0);
    }

    static __device__ __forceinline__ uint4 widen(uint4 piece, i32 block) {
        u32 first = word_of(piece, 2 * block);
        u32 second = word_of(piece, 2 * block + 1);
        return make_uint4(pair(first << 4, first << 8), pair(first >> 4, first), pair(second << 4, second << 8),
                          pair(second >> 4, second));
    }

    static __device__ __forceinline__ Fragment fragment(const uint4 (&pieces)[2], i32 block, Offsets offsets) {
        return interleave(widen(pieces[0], block), widen(pieces[1], block));
    }
};

static __device__ __forceinline__ i32 round_up(i32 a, i32 b) {
    return ceil_div(a, b) * b;
}

static constexpr i32 TILE_ROWS = 16;
static constexpr i32 LINE_BYTES = 1024;

// Bytes of a tile.
template <class Format> static __device__ __forceinline__ i64 tile_bytes(i32 k) {
    return static_cast<i64>(ceil_div(k, Format::STEP_K)) * (Format::STEP_K / Format::LINE_K * LINE_BYTES);
}

// sum += weights · x over a block, with this lane's eight columns 8t..8t+7 of row g of x. Which columns the instruction takes for
// which does not matter to it, as long as both operands agree.
static __device__ __forceinline__ void multiply_block(float (&sum)[4], const Fragment& weights, uint4 x) {
    mma_bf16(sum, weights.first.x, weights.first.y, weights.first.z, weights.first.w, x.x, x.y);
    mma_bf16(sum, weights.second.x, weights.second.y, weights.second.z, weights.second.w, x.z, x.w);
}

// segment = fma(scale, group, segment), with the scales of rows g and g + 8.
static __device__ __forceinline__ void add_group(float (&segment)[4], float top_scale, float bottom_scale,
                                                 const float (&group)[4]) {
    segment[0] = fmaf(top_scale, group[0], segment[0]);
    segment[1] = fmaf(top_scale, group[1], segment[1]);
    segment[2] = fmaf(bottom_scale, group[2], segment[2]);
    segment[3] = fmaf(bottom_scale, group[3], segment[3]);
}
