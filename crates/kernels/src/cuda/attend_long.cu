// Attention of slices of many rows (reading prompts, whole or in chunks).
//
// attend_long_d{16,32,64,128}(attention, tiles, scale, out)
//   grid (tiles, units), block 128, dynamic shared memory 640·D bytes: 3 tiles [64][D] bf16 of keys or values, and the
//   total outputs [64][D] f32 (D = 128: 81920 bytes, 2 blocks on a multiprocessor of an A100 or H100).
//   attention: see attend.cuh.
//   tiles: u32 pairs (slice, first row): 64 rows of the slice, (token, head) as attend.cuh numbers them; first row is a
//     multiple of 64. A slice of tokens · group rows has ⌈tokens · group / 64⌉ tiles. Tiles of many keys first.
//   scale: of the scores, f32, positive.
//   out: bf16 [T, units · group · D].
//
// Each of the 4 warps has 16 rows. Blocks of keys and values pass through a ring of three tiles in shared memory, for each
// sub-span K₀ K₁ V₀ V₁: K₁ and V₀ are on their way while K₀ is worked on, V₁ with K₁, the next K₀ with V₀ and V₁.
#include "attend.cuh"

static constexpr i32 WARPS = 4;
static constexpr i32 THREADS = 32 * WARPS;
static constexpr i32 TILES = 3;

// Pieces of a tile that a thread copies.
template <i32 D> static constexpr i32 COPIES = BLOCK_KEYS * D / 8 / THREADS;

// A tile in shared memory is rows of pieces of 16 bytes: K is [64][D / 8], V transposed [D][8]. A warp reads a *quarter* c, pieces
// 4c..4c+3, of rows in pairs (even, odd) at once; in odd rows quarters 2i and 2i+1 change places, so that the pair falls
// into different banks. (K with D = 32 needs no exchange; K with D = 16 is read in halves of pieces, two lanes to a bank.)
template <i32 ROW_PIECES> static __device__ __forceinline__ i32 swizzled(i32 row, i32 piece) {
    return 8 * (row * ROW_PIECES + (ROW_PIECES >= 8 ? piece ^ (row % 2 * 4) : piece));
}

// Begins to copy a block's keys, of which `count` (perhaps none or less) are wanted; the others become zeros.
template <i32 D> static __device__ __forceinline__ void copy_keys(u16* tile, const u16* keys, i32 count) {
    i32 row = static_cast<i32>(threadIdx.x) / (D / 8);
    u16* to = tile + swizzled<D / 8>(row, static_cast<i32>(threadIdx.x) % (D / 8));
    const u16* from = keys + 8 * threadIdx.x;
#pragma unroll
    for (i32 i = 0; i < COPIES<D>; i++) {
        cp_async16(to + i * 8 * THREADS, from + i * 8 * THREADS, row + i * THREADS / (D / 8) < count);
    }
    cp_async_commit();
}

// Likewise, values; whole pieces.
template <i32 D> static __device__ __forceinline__ void copy_values(u16* tile, const u16* values, i32 count) {
    i32 piece = static_cast<i32>(threadIdx.x) % 8;
    u16* to = tile + swizzled<8>(static_cast<i32>(threadIdx.x) / 8, piece);
    const u16* from = values + 8 * threadIdx.x;
#pragma unroll
    for (i32 i = 0; i < COPIES<D>; i++) {
        cp_async16(to + i * 8 * THREADS, from + i * 8 * THREADS, 8 * piece < count);
    }
    cp_async_commit();
}

// Where the wanted values end inside a piece, makes zeros of its rest: of this thread's own pieces, which have landed.
template <i32 D> static __device__ __forceinline__ void clear_values(u16* tile, i32 count) {
    i32 piece = static_cast<i32>(threadIdx.x) % 8;
    count -= 8 * piece;
    if (count > 0 && count < 8) {
        u16* own = tile + swizzled<8>(static_cast<i32>(threadIdx.x) / 8, piece);
#pragma unroll 1
        for (i32 i = 0; i < COPIES<D>; i++) {
            store16(own, keep_first(load16(own), count));
            own += 8 * THREADS;
        }
    }
}

// Scores of one block of keys, `half` 0 or 1 of the sub-span. `queries` are those of chunk 0, before and after: each chunk's are
// read again, mostly from L1, while the one before is worked on, for there is no room for all of them in registers.
template <i32 D>
static __device__ __forceinline__ void score_block(Scores& scores, const QueryRows<D>& rows, Queries& queries, const u16* tile,
                                                   i32 half, i32 lane) {
    i32 odd = lane / 4 % 2;
    const u16* row = tile + (8 * (lane / 8) + odd) * D + (D == 16 ? 4 : 8) * (lane % 4);
#pragma unroll 1
    for (i32 chunk = 0; chunk < CHUNKS<D>; chunk++) {
        const u16* quarter = D < 64 ? row : row + 32 * (chunk ^ odd);
        Queries next = rows.load(chunk + 1 < CHUNKS<D> ? chunk + 1 : 0);
#pragma unroll
        for (i32 i = 0; i < 8; i++) {
            i32 key = GROUP_KEYS * (i / 4) + 2 * (i % 4);
            add_scores<D>(scores.tile[8 * half + i], queries, load_piece<D>(quarter + key * D, 0, 0));
        }
        queries = next;
    }
}

// Folds a sub-span into the outputs of a span: the weighted values of its two blocks, a few columns after the other.
template <i32 D>
static __device__ __forceinline__ void fold_values(float (&span)[D / 8][4], const Weights& weights, const u16* tile0,
                                                   const u16* tile1, Fold low, Fold high, i32 lane) {
    constexpr i32 TOGETHER = D == 16 ? 2 : 4;
    static_assert(D / 8 % TOGETHER == 0, "columns come in full");
    i32 odd = lane / 4 % 2;
    i32 row = lane / 4 * BLOCK_KEYS + 8 * (lane % 4);
    const u16* groups[GROUPS] = {tile0 + row + 32 * odd, tile0 + row + 32 * (1 - odd), tile1 + row + 32 * odd,
                                 tile1 + row + 32 * (1 - odd)};
#pragma unroll
    for (i32 columns = 0; columns < D / 8; columns += TOGETHER) {
        float o[TOGETHER][4];
        clear(o);
#pragma unroll
        for (i32 group = 0; group < GROUPS; group++) {
#pragma unroll
            for (i32 i = 0; i < TOGETHER; i++) {
                add_values(o[i], weights, group, load16(groups[group] + (columns + i) * 8 * BLOCK_KEYS));
            }
        }
#pragma unroll
        for (i32 i = 0; i < TOGETHER; i++) {
            float(&into)[4] = span[columns + i];
            into[0] = fold_output(into[0], o[i][0], low);
            into[1] = fold_output(into[1], o[i][1], low);
            into[2] = fold_output(into[2], o[i][2], high);
            into[3] = fold_output(into[3], o[i][3], high);
        }
    }
}

// Writes one of the lane's two rows, if the slice has it.
template <i32 D, i32 HIGH>
static __device__ __forceinline__ void write_row(const Attention& attention, const SliceUnit& slice, i32 first_row,
                                                 const float4* total, float factor, u16* out) {
    i32 row = first_row + static_cast<i32>(threadIdx.x % 32 / 4) + 8 * HIGH;
    if (row >= slice.tokens * attention.group) {
        return;
    }
    u16* to = out + slice.place<D>(row, attention) + 2 * (threadIdx.x % 4);
#pragma unroll
    for (i32 i = 0; i < D / 8; i++) {
        float4 o = total[i * THREADS];
        float even = normalised(HIGH ? o.z : o.x, factor);
        float odd = normalised(HIGH ? o.w : o.y, factor);
        *reinterpret_cast<u32*>(to + 8 * i) = pack_bf16x2(even, odd);
    }
}

template <i32 D>
static __device__ __forceinline__ void attend_long(const Attention& attention, const u32* tiles, float scale, u16* out) {
    i32 tile_row = static_cast<i32>(tiles[2 * blockIdx.x + 1]);
    i32 lane = threadIdx.x % 32;
    i32 unit = static_cast<i32>(blockIdx.y);
    float exponent = exponent_of(scale);
    SliceUnit slice = SliceUnit::at(attention, tiles[2 * blockIdx.x], unit);
    i32 rows = slice.tokens * attention.group;
    i32 first_row = tile_row + TILE_ROWS * (static_cast<i32>(threadIdx.x) / 32);
    // Keys that the tile's last row sees.
    i32 keys = slice.seen(min(tile_row + WARPS * TILE_ROWS, rows) - 1, attention.group);
    i32 seen_low = slice.seen(first_row + lane / 4, attention.group);
    i32 seen_high = slice.seen(first_row + lane / 4 + 8, attention.group);
    // The block that has key `first`, or one that exists where none has: then no key of it is wanted.
    auto block = [&](i32 first) { return keys_of<D>(attention, slice.table[min(first, keys - 1) / BLOCK_KEYS], unit); };

    // The tiles of a sub-span: K₀ in place 0, K₁ in 1, V₀ in 2, V₁ in 0 again, and the next K₀ in 1.
    i32 turn = 0;
    auto tile = [&](i32 place) {
        i32 index = turn + place;
        return dynamic_shared<u16>() + (index < TILES ? index : index - TILES) * (BLOCK_KEYS * D);
    };
    copy_keys<D>(tile(0), block(0), keys);

    QueryRows<D> query_rows(attention, slice, first_row + lane / 4, lane % 4);
    Queries queries = query_rows.load(0);
    // The total outputs: of each tile of 8 columns, this thread's four numbers side by side.
    float4* total = dynamic_shared<float4>() + TILES * BLOCK_KEYS * D / 8 + threadIdx.x;
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
        Scores scores;
        clear(scores.tile);
        cp_async_wait<0>();
        __syncthreads();
        copy_keys<D>(tile(1), block(first + BLOCK_KEYS), left - BLOCK_KEYS);
        copy_values<D>(tile(2), block(first) + BLOCK_KEYS * D, left);
        score_block<D>(scores, query_rows, queries, tile(0), 0, lane);
        cp_async_wait<1>();
        __syncthreads();
        copy_values<D>(tile(0), block(first + BLOCK_KEYS) + BLOCK_KEYS * D, left - BLOCK_KEYS);
        score_block<D>(scores, query_rows, queries, tile(1), 1, lane);
        hide_keys(scores, seen_low - first, seen_high - first, lane);
        Weights weights;
        State low, high;
        softmax(scores, exponent, weights, low, high);
        Fold fold_low = fold_states(span_low, low, exponent);
        Fold fold_high = fold_states(span_high, high, exponent);
        cp_async_wait<0>();
        clear_values<D>(tile(2), left);
        clear_values<D>(tile(0), left - BLOCK_KEYS);
        __syncthreads();
        copy_keys<D>(tile(1), block(first + SUB_SPAN_KEYS), left - SUB_SPAN_KEYS);
        fold_values<D>(span_o, weights, tile(2), tile(0), fold_low, fold_high, lane);
        turn = turn + 1 < TILES ? turn + 1 : 0;

        if ((first + SUB_SPAN_KEYS) % SPAN_KEYS == 0 || left <= SUB_SPAN_KEYS) {
            fold_low = fold_states(total_low, span_low, exponent);
            fold_high = fold_states(total_high, span_high, exponent);
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

    // Read again: registers are scarce above.
    slice = SliceUnit::at(attention, tiles[2 * blockIdx.x], unit);
    first_row = static_cast<i32>(tiles[2 * blockIdx.x + 1]) + TILE_ROWS * (static_cast<i32>(threadIdx.x) / 32);
    write_row<D, 0>(attention, slice, first_row, total, normaliser(total_low), out);
    write_row<D, 1>(attention, slice, first_row, total, normaliser(total_high), out);
}

// No least number of blocks is asked for: given one, the compiler fills the registers that it leaves, and spills.
#define ATTEND_LONG(D)                                                                                 \
    KERNEL(128, 0, attend_long_d##D, (Attention attention, const u32* tiles, float scale, u16* out)) { \
        attend_long<D>(attention, tiles, scale, out);                                                  \
    }

ATTEND_LONG(16)
ATTEND_LONG(32)
ATTEND_LONG(64)
ATTEND_LONG(128)
