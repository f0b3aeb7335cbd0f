// Brings weights from the order of a checkpoint into that of weights.cuh.
//
// pack_bf16(rows, n, k, weights): grid ⌈⌈n/16⌉ · ⌈k/64⌉ · 128 / 256⌉, block 256.
//   rows: bf16 [n][k], aligned to 16 bytes, k % 8 == 0. weights: ⌈n/16⌉ · ⌈k/64⌉ · 2048 bytes; padding becomes zeros. Parts of a
//   matrix that begin at a multiple of 16 rows can be packed one after the other.
#include "weights.cuh"

static constexpr i32 THREADS = 256;

// Four columns of a row.
static __device__ __forceinline__ uint2 four_columns(const u16* rows, i32 row, i32 col, i32 n, i32 k) {
    if (row >= n || col >= k) {
        return make_uint2(0, 0);
    }
    return *reinterpret_cast<const uint2*>(rows + static_cast<i64>(row) * k + col);
}

KERNEL(256, 4, pack_bf16, (const u16* rows, i32 n, i32 k, u8* weights)) {
    i64 index = static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x;  // of 16 bytes
    i32 lines = ceil_div(k, Bf16::STEP_K) * (Bf16::STEP_K / Bf16::LINE_K);
    i32 tile = static_cast<i32>(index / (lines * 64));
    if (tile * TILE_ROWS >= n) {
        return;
    }
    i32 line = static_cast<i32>(index / 64 % lines);
    i32 piece = static_cast<i32>(index / 32 % 2);
    i32 lane = static_cast<i32>(index % 32);
    i32 row = tile * TILE_ROWS + lane / 4;
    i32 col = line * Bf16::LINE_K + lane % 4 * 8 + piece * 4;
    uint2 top = four_columns(rows, row, col, n, k);
    uint2 bottom = four_columns(rows, row + 8, col, n, k);
    store16(weights + index * 16, make_uint4(top.x, bottom.x, top.y, bottom.y));
}
