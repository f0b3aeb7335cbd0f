// Brings weights from the order of a checkpoint into that of weights.cuh.
//
// pack_bf16(rows, n, k, weights), pack_int8(values, n, k, weights), pack_int4(values, n, k, weights): block 256,
//   grid ⌈bytes of the packed matrix / 16 / 256⌉.
//   rows: bf16 [n][k]; values: one a byte, u8 [n][k]. Aligned to 16 bytes, k % 8 == 0. Padding becomes zeros (of int8: 0x80).
// pack_fp8(rows, n, k, weights, scales): block 256, grid ⌈n/16⌉.
//   rows: bf16 [n][k], as above. A row's scale is its largest magnitude / 448, the largest number of E4M3, and 1 for a row of zeros;
//   the values are those of the quotients, rounded to nearest even. A row with a number that is not finite gets such a scale.
#include "weights.cuh"

static constexpr i32 THREADS = 256;

// The row and the first column of 16 bytes of a packed matrix, by their index, where a lane's pieces belong to one row each.
template <class Format> struct Place {
    i32 row;
    i32 col;

    __device__ __forceinline__ Place(i64 index, i32 k) {
        i32 lines = static_cast<i32>(tile_bytes<Format>(k) / LINE_BYTES);
        i32 lane = static_cast<i32>(index % 32);
        row = static_cast<i32>(index / (lines * 64)) * TILE_ROWS + static_cast<i32>(index / 32 % 2) * 8 + lane / 4;
        col = static_cast<i32>(index / 64 % lines) * Format::LINE_K + lane % 4 * 8;
    }
};

static __device__ __forceinline__ i64 thread_index() {
    return static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x;
}

// Columns of a row, 8 bytes of them; zeros beyond the matrix.
template <class T> static __device__ __forceinline__ uint2 load_columns(const T* rows, i32 row, i32 col, i32 n, i32 k) {
    if (row >= n || col >= k) {
        return make_uint2(0, 0);
    }
    return *reinterpret_cast<const uint2*>(rows + static_cast<i64>(row) * k + col);
}

KERNEL(256, 4, pack_bf16, (const u16* rows, i32 n, i32 k, u8* weights)) {
    i64 index = thread_index();
    i32 piece = static_cast<i32>(index / 32 % 2);
    Place<Bf16> place(index - piece * 32, k);  // that of the lane's first piece
    if (place.row - place.row % TILE_ROWS >= n) {
        return;
    }
    uint2 top = load_columns(rows, place.row, place.col + piece * 4, n, k);
    uint2 bottom = load_columns(rows, place.row + 8, place.col + piece * 4, n, k);
    store16(weights + index * 16, make_uint4(top.x, bottom.x, top.y, bottom.y));
}

// Four bytes in the order 0, 2, 1, 3.
static __device__ __forceinline__ u32 swap_middle(u32 bytes) {
    return __byte_perm(bytes, 0, 0x3120);
}

KERNEL(256, 4, pack_int8, (const u8* values, i32 n, i32 k, u8* weights)) {
    i64 index = thread_index();
    Place<Int8> place(index, k);
    if (place.row - place.row % TILE_ROWS >= n) {
        return;
    }
    uint2 first = load_columns(values, place.row, place.col, n, k);
    uint2 second = load_columns(values, place.row, place.col + 32, n, k);
    store16(weights + index * 16, make_uint4(swap_middle(first.x) ^ 0x80808080u, swap_middle(first.y) ^ 0x80808080u,
                                             swap_middle(second.x) ^ 0x80808080u, swap_middle(second.y) ^ 0x80808080u));
}

// The first and the third byte's nibbles, side by side.
static __device__ __forceinline__ u32 two_nibbles(u32 bytes) {
    bytes &= 0x000f000fu;
    return (bytes | bytes >> 12) & 0xffu;
}

static __device__ __forceinline__ u32 eight_nibbles(uint2 bytes) {
    return two_nibbles(bytes.x) | two_nibbles(bytes.y) << 8 | two_nibbles(bytes.x >> 8) << 16 | two_nibbles(bytes.y >> 8) << 24;
}

KERNEL(256, 4, pack_int4, (const u8* values, i32 n, i32 k, u8* weights)) {
    i64 index = thread_index();
    Place<Int4> place(index, k);
    if (place.row - place.row % TILE_ROWS >= n) {
        return;
    }
    u32 words[4];
#pragma unroll
    for (i32 block = 0; block < 4; block++) {
        words[block] = eight_nibbles(load_columns(values, place.row, place.col + block * 32, n, k));
    }
    store16(weights + index * 16, make_uint4(words[0], words[1], words[2], words[3]));
}

// The magnitude of E4M3 next to x ≥ 0, at most the largest.
static __device__ __forceinline__ u32 round_to_e4m3(float x) {
    if (x < 0.015625f) {
        // Below 2^-6 numbers are 2^-9 apart, as f32 are from 2^14 on.
        return __float_as_uint(x + 16384.0f) - __float_as_uint(16384.0f);
    }
    u32 bits = __float_as_uint(x);
    bits = (bits + 0x7ffffu + (bits >> 20 & 1)) >> 20;  // sign, 8 bits of exponent, 3 of mantissa
    return min(bits - ((127 - 7) << 3), 0x7eu);
}

static __device__ __forceinline__ u32 to_e4m3(u32 bf16_bits, float scale) {
    float x = __uint_as_float(bf16_bits << 16 & 0x7fff0000u);
    return round_to_e4m3(x / scale) | (bf16_bits >> 8 & 0x80u);
}

// Four columns of a row.
static __device__ __forceinline__ u32 four_e4m3(uint2 values, float scale) {
    return to_e4m3(values.x & 0xffffu, scale) | to_e4m3(values.y & 0xffffu, scale) << 8 | to_e4m3(values.x >> 16, scale) << 16 |
           to_e4m3(values.y >> 16, scale) << 24;
}

// The larger magnitude of two bf16, as bits; NaN is the largest of all.
static __device__ __forceinline__ u32 largest(u32 pair) {
    return max(pair & 0x7fffu, pair >> 16 & 0x7fffu);
}

KERNEL(256, 4, pack_fp8, (const u16* rows, i32 n, i32 k, u8* weights, float* scales)) {
    __shared__ float tile_scales[TILE_ROWS];
    constexpr i32 ROW_THREADS = THREADS / TILE_ROWS;
    i32 row = blockIdx.x * TILE_ROWS + threadIdx.x / ROW_THREADS;
    u32 most = 0;
    if (row < n) {
        for (i32 col = threadIdx.x % ROW_THREADS * 8; col < k; col += ROW_THREADS * 8) {
            uint4 values = load16(rows + static_cast<i64>(row) * k + col);
            most = max(most, max(max(largest(values.x), largest(values.y)), max(largest(values.z), largest(values.w))));
        }
    }
#pragma unroll
    for (i32 distance = ROW_THREADS / 2; distance > 0; distance /= 2) {
        most = max(most, __shfl_xor_sync(FULL_WARP, most, distance));
    }
    if (threadIdx.x % ROW_THREADS == 0) {
        float scale = most == 0 ? 1.0f : __uint_as_float(most << 16) / 448.0f;
        tile_scales[threadIdx.x / ROW_THREADS] = scale;
        if (row < n) {
            scales[row] = scale;
        }
    }
    __syncthreads();
    i32 pieces = static_cast<i32>(tile_bytes<Fp8>(k) / 16);
#pragma unroll 1
    for (i32 i = threadIdx.x; i < pieces; i += THREADS) {
        i64 index = static_cast<i64>(blockIdx.x) * pieces + i;
        Place<Fp8> place(index, k);
        float scale = tile_scales[place.row % TILE_ROWS];
        u32 words[4];
#pragma unroll
        for (i32 word = 0; word < 4; word++) {
            words[word] = four_e4m3(load_columns(rows, place.row, place.col + word / 2 * 32 + word % 2 * 4, n, k), scale);
        }
        store16(weights + index * 16, make_uint4(words[0], words[1], words[2], words[3]));
    }
}
