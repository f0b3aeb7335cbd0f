// Attention of slices of many rows (reading prompts, whole or in chunks).
//
// attend_long_d{16,32,64,128}(attention, tiles, scale, out)
//   grid (tiles, units), block 128, dynamic shared memory 640·D bytes: 3 tiles [64][D] bf16 of keys or values, and the
//   total outputs [64][D] f32 (D = 128: 81920 bytes, 2 blocks on a multiprocessor of an A100 or H100).
//   attention: see attend.cuh.
//   tiles: u32 pairs (slice, first row): rows first row..first row + 63 of the slice, each (token, head), see attend.cuh; first row
//     is a multiple of 64. A slice of tokens · group rows has ⌈tokens · group / 64⌉ tiles. Slice 0xffffffff: nothing to do.
//     Tiles of many keys first. Aligned to 8 bytes.
//   scale: of the scores, f32, positive.
//   out: bf16 [T, units · group · D].
//
// Each of the 4 warps has 16 rows. Blocks of keys and values pass through a ring in shared memory, in the order K₀ K₁ V₀ V₁ for
// each sub-span: while one is worked on, the next two are on their way.
#include "attend.cuh"

static constexpr i32 WARPS = 4;
static constexpr i32 THREADS = 32 * WARPS;
static constexpr i32 STAGES = 3;
static constexpr u32 NO_SLICE = 0xffffffffu;

// A tile in shared memory is rows of pieces of 16 bytes: K is [64][D / 8], V transposed [D][8]. A warp reads a *quarter* c, pieces
// 4c..4c+3, of rows in pairs (even, odd) at once; in odd rows quarters 2i and 2i+1 change places, so that the pair falls
// into different banks. (K with D = 32 needs no exchange; K with D = 16 is read in halves of pieces, two lanes to a bank.)
template <i32 ROW_PIECES> static __device__ __forceinline__ i32 swizzled(i32 row, i32 piece) {
    return 8 * (row * ROW_PIECES + (ROW_PIECES >= 8 ? piece ^ (row % 2 * 4) : piece));
}

// The ring, and what a thread knows of it.
template <i32 D> struct Ring {
    static constexpr i32 ELEMENTS = BLOCK_KEYS * D;

    u16* tiles;
    i32 filling;  // the stage that is filled next
    i32 reading;  // and the one that is read next

    __device__ __forceinline__ u16* next(i32& stage) {
        u16* tile = tiles + stage * ELEMENTS;
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        return tile;
    }

    // Begins to copy a block's keys, of which `count` (perhaps none or less) are wanted; the others become zeros.
    __device__ __forceinline__ void fill_keys(const u16* keys, i32 count) {
        i32 row = static_cast<i32>(threadIdx.x) / (D / 8);
        u16* to = next(filling) + swizzled<D / 8>(row, static_cast<i32>(threadIdx.x) % (D / 8));
        const u16* from = keys + 8 * threadIdx.x;
#pragma unroll
        for (i32 i = 0; i < ELEMENTS / 8 / THREADS; i++) {
            cp_async16(to + i * 8 * THREADS, from + i * 8 * THREADS, row + i * THREADS / (D / 8) < count);
        }
        cp_async_commit();
    }

    // Likewise, values; whole pieces.
    __device__ __forceinline__ void fill_values(const u16* values, i32 count) {
        i32 piece = static_cast<i32>(threadIdx.x) % 8;
        u16* to = next(filling) + swizzled<8>(static_cast<i32>(threadIdx.x) / 8, piece);
        const u16* from = values + 8 * threadIdx.x;
#pragma unroll
        for (i32 i = 0; i < ELEMENTS / 8 / THREADS; i++) {
            cp_async16(to + i * 8 * THREADS, from + i * 8 * THREADS, 8 * piece < count);
        }
        cp_async_commit();
    }

    // The oldest tile, when all of it is there; then what was read before it may be overwritten.
    __device__ __forceinline__ const u16* take_keys() {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        return next(reading);
    }

    // Likewise. In the piece where the wanted values end, the rest becomes zeros: each thread's own pieces, before others see them.
    __device__ __forceinline__ const u16* take_values(i32 count) {
        cp_async_wait<STAGES - 2>();
        u16* tile = next(reading);
        i32 piece = static_cast<i32>(threadIdx.x) % 8;
        if (count - 8 * piece > 0 && count - 8 * piece < 8) {
            u16* own = tile + swizzled<8>(static_cast<i32>(threadIdx.x) / 8, piece);
#pragma unroll 1
            for (i32 i = 0; i < ELEMENTS / 8 / THREADS; i++) {
                store16(own, keep_first(load16(own), count - 8 * piece));
                own += 8 * THREADS;
            }
        }
        __syncthreads();
        return tile;
    }
};

// Scores of one block of keys, `half` 0 or 1 of the sub-span.
template <i32 D>
static __device__ __forceinline__ void score_block(Scores& scores, const Queries<D>& queries, const u16* tile, i32 half, i32 lane) {
    i32 odd = lane / 4 % 2;
    const u16* row = tile + (8 * (lane / 8) + odd) * D + 8 * (lane % 4);
    const u16* quarters[2] = {row + 32 * odd, row + 32 * (1 - odd)};
#pragma unroll
    for (i32 part = 0; part < 2; part++) {
#pragma unroll
        for (i32 chunk = 0; chunk < CHUNKS<D>; chunk++) {
#pragma unroll
            for (i32 i = 0; i < 4; i++) {
                i32 key = GROUP_KEYS * part + 2 * i;
                uint4 keys;
                if constexpr (D == 16) {
                    keys = Queries<D>::piece(row + (key * D - 4 * (lane % 4)), 0, 0);
                } else if constexpr (D == 32) {
                    keys = load16(row + key * D);
                } else {
                    keys = load16(quarters[chunk % 2] + key * D + 64 * (chunk / 2));
                }
                add_scores<D>(scores.tile[4 * (2 * half + part) + i], queries, chunk, keys);
            }
        }
    }
}

// Adds one block of weighted values.
template <i32 D>
static __device__ __forceinline__ void add_block(float (&o)[D / 8][4], const Weights& weights, const u16* tile, i32 half, i32 lane) {
    constexpr i32 TOGETHER = D == 16 ? 2 : 4;
    i32 odd = lane / 4 % 2;
    const u16* row = tile + lane / 4 * BLOCK_KEYS + 8 * (lane % 4);
    const u16* quarters[2] = {row + 32 * odd, row + 32 * (1 - odd)};
#pragma unroll
    for (i32 columns = 0; columns < D / 8; columns += TOGETHER) {
#pragma unroll
        for (i32 part = 0; part < 2; part++) {
#pragma unroll
            for (i32 i = 0; i < TOGETHER; i++) {
                uint4 values = load16(quarters[part] + (columns + i) * 8 * BLOCK_KEYS);
                add_values(o[columns + i], weights, 2 * half + part, values);
            }
        }
    }
}

// Folds the outputs of later keys into those of earlier ones.
template <i32 D>
static __device__ __forceinline__ void fold_outputs(float (&into)[D / 8][4], const float (&later)[D / 8][4], Fold low, Fold high) {
#pragma unroll
    for (i32 i = 0; i < D / 8; i++) {
        into[i][0] = fold_output(into[i][0], later[i][0], low);
        into[i][1] = fold_output(into[i][1], later[i][1], low);
        into[i][2] = fold_output(into[i][2], later[i][2], high);
        into[i][3] = fold_output(into[i][3], later[i][3], high);
    }
}

template <i32 D>
static __device__ __forceinline__ void attend_long(const Attention& attention, const uint2* tiles, float scale, u16* out) {
    uint2 work = tiles[blockIdx.x];
    if (work.x == NO_SLICE) {
        return;
    }
    i32 lane = threadIdx.x % 32;
    i32 unit = static_cast<i32>(blockIdx.y);
    float exponent = exponent_of(scale);
    SliceUnit slice = SliceUnit::at(attention, work.x, unit);
    i32 rows = slice.tokens * attention.group;
    i32 first_row = static_cast<i32>(work.y) + TILE_ROWS * (static_cast<i32>(threadIdx.x) / 32);
    // Keys that the tile's last row sees.
    i32 keys = slice.seen(min(static_cast<i32>(work.y) + WARPS * TILE_ROWS, rows) - 1, attention.group);
    i32 seen_low = slice.seen(first_row + lane / 4, attention.group);
    i32 seen_high = slice.seen(first_row + lane / 4 + 8, attention.group);
    i32 last_block = (keys - 1) / BLOCK_KEYS;

    Ring<D> ring = {dynamic_shared<u16>(), 0, 0};
    const u16* block[2] = {keys_of<D>(attention, slice.table[0], unit), keys_of<D>(attention, slice.table[min(1, last_block)], unit)};
    ring.fill_keys(block[0], keys);
    ring.fill_keys(block[1], keys - BLOCK_KEYS);

    Queries<D> queries;
    queries.load(attention, slice, first_row, lane);
    // The total outputs: of each tile of 8 columns, this thread's four numbers side by side.
    float4* total = dynamic_shared<float4>() + STAGES * Ring<D>::ELEMENTS / 8 + threadIdx.x;
#pragma unroll
    for (i32 i = 0; i < D / 8; i++) {
        total[i * THREADS] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    State total_low = empty_state(), total_high = empty_state();
    State span_low = empty_state(), span_high = empty_state();
    float span_o[D / 8][4];
    clear(span_o);

#pragma unroll 1
    for (i32 first = 0; first < keys; first += SUB_SPAN_KEYS) {
        i32 left = keys - first;
        i32 next_block = (first + SUB_SPAN_KEYS) / BLOCK_KEYS;
        u32 next[2] = {slice.table[min(next_block, last_block)], slice.table[min(next_block + 1, last_block)]};
        Scores scores;
        Weights weights;
        State low, high;

        const u16* tile = ring.take_keys();
        ring.fill_values(block[0] + BLOCK_KEYS * D, left);
        clear(scores.tile);
        score_block<D>(scores, queries, tile, 0, lane);

        tile = ring.take_keys();
        ring.fill_values(block[1] + BLOCK_KEYS * D, left - BLOCK_KEYS);
        score_block<D>(scores, queries, tile, 1, lane);
        hide_keys(scores, seen_low - first, seen_high - first, lane);
        softmax(scores, exponent, weights, low, high);

        tile = ring.take_values(left);
        block[0] = keys_of<D>(attention, next[0], unit);
        ring.fill_keys(block[0], left - SUB_SPAN_KEYS);
        float o[D / 8][4];
        clear(o);
        add_block<D>(o, weights, tile, 0, lane);

        tile = ring.take_values(left - BLOCK_KEYS);
        block[1] = keys_of<D>(attention, next[1], unit);
        ring.fill_keys(block[1], left - SUB_SPAN_KEYS - BLOCK_KEYS);
        add_block<D>(o, weights, tile, 1, lane);
        Fold fold_low = fold_states(span_low, low, exponent);
        Fold fold_high = fold_states(span_high, high, exponent);
        fold_outputs<D>(span_o, o, fold_low, fold_high);

        if ((first + SUB_SPAN_KEYS) % SPAN_KEYS == 0 || left <= SUB_SPAN_KEYS) {
            Fold fold_low = fold_states(total_low, span_low, exponent);
            Fold fold_high = fold_states(total_high, span_high, exponent);
#pragma unroll
            for (i32 i = 0; i < D / 8; i++) {
                float4 o = total[i * THREADS];
                o.x = fold_output(o.x, span_o[i][0], fold_low);
                o.y = fold_output(o.y, span_o[i][1], fold_low);
                o.z = fold_output(o.z, span_o[i][2], fold_high);
                o.w = fold_output(o.w, span_o[i][3], fold_high);
                total[i * THREADS] = o;
            }
            span_low = span_high = empty_state();
            clear(span_o);
        }
    }
    cp_async_wait<0>();

    float factor_low = normaliser(total_low), factor_high = normaliser(total_high);
#pragma unroll
    for (i32 half = 0; half < 2; half++) {
        i32 row = first_row + lane / 4 + 8 * half;
        float factor = half == 0 ? factor_low : factor_high;
        if (row < rows) {
            u16* to = out + slice.place<D>(row, attention) + 2 * (lane % 4);
#pragma unroll
            for (i32 i = 0; i < D / 8; i++) {
                float4 o = total[i * THREADS];
                float even = normalised(half == 0 ? o.x : o.z, factor);
                float odd = normalised(half == 0 ? o.y : o.w, factor);
                *reinterpret_cast<u32*>(to + 8 * i) = pack_bf16x2(even, odd);
            }
        }
    }
}

#define ATTEND_LONG(D)                                                                                     \
    KERNEL(128, 2, attend_long_d##D, (Attention attention, const uint2* tiles, float scale, u16* out)) { \
        attend_long<D>(attention, tiles, scale, out);                                                      \
    }

ATTEND_LONG(16)
ATTEND_LONG(32)
ATTEND_LONG(64)
ATTEND_LONG(128)
