// Attention of slices of at most 16 rows (decoding, mostly): spans are spread over blocks, and attend_merge folds them.
//
// attend_short_d{16,32,64,128}(attention, splits, scale, rows_per_item)
//   grid (X, units) with any X: block x works on spans x, x + X, …, so X does not bound the spans and a recorded launch stays
//   right as contexts grow; a few times the number of multiprocessors is good. Block 128, no dynamic shared memory.
//   attention, splits: see attend.cuh. A short slice has tokens · group ≤ rows_per_item ≤ 16 and ⌈(start + tokens) / 512⌉ spans;
//   one without spans (padding) is passed over.
//   scale: of the scores, f32, positive. rows_per_item: rows that `splits` has room for in each item, i32.
//
// A block takes one span of one slice and unit, each of its 4 warps one sub-span, from memory straight to registers.
#include "attend.cuh"

static constexpr i32 WARPS = SPAN_KEYS / SUB_SPAN_KEYS;

// The last of `count` ascending offsets that is at most `value`; offsets[0] is. The warp searches together.
static __device__ __forceinline__ i32 last_at_most(const u32* offsets, i32 count, u32 value, i32 lane) {
    i32 first = 0;
    while (count > 1) {
        i32 step = ceil_div(count, 32);
        bool within = lane * step < count && offsets[first + lane * step] <= value;
        i32 passed = (__popc(__ballot_sync(FULL_WARP, within)) - 1) * step;
        first += passed;
        count = min(step, count - passed);
    }
    return first;
}

// A lane's pieces of the keys and then of the values of a sub-span, in the order of their use. DEPTH of them are always under way.
// Keys past the slice's end are replaced by its last one (their scores are hidden), values past it by zeros.
template <i32 D> struct Pieces {
    static constexpr i32 COLUMN_TILES = D == 16 ? 2 : 4;  // that are worked on together
    static constexpr i32 KEY_PIECES = GROUPS * CHUNKS<D> * 4;
    static constexpr i32 PIECES = KEY_PIECES + D / 8 * GROUPS;
    static constexpr i32 DEPTH = 16;

    uint4 ring[DEPTH];
    const u16* keys[2];   // of the two blocks, at the lane's column
    i32 last[2];          // the last key in each
    i32 row;              // the lane's row of a group of keys, for tile 0
    const u16* values[GROUPS];
    i32 left;             // keys from the lane's first of group 0 to the end

    // `length` keys, at least 1, are in the sub-span and the slice; `table` has the sub-span's blocks.
    __device__ __forceinline__ Pieces(const Attention& attention, const u32* table, i32 unit, i32 length, i32 lane) {
        i32 t = lane % 4;
        i32 q = lane / 4;
        u32 block = table[0];
        u32 next = length > BLOCK_KEYS ? table[1] : block;
        const u16* base[2] = {keys_of<D>(attention, block, unit), keys_of<D>(attention, next, unit)};
        row = 8 * (q / 2) + q % 2;
        left = length - 8 * t;
#pragma unroll
        for (i32 half = 0; half < 2; half++) {
            last[half] = min(max(length - BLOCK_KEYS * half, 1), BLOCK_KEYS) - 1;
            keys[half] = base[half] + (D == 16 ? 4 : 8) * t;
#pragma unroll
            for (i32 part = 0; part < 2; part++) {
                i32 key = min(GROUP_KEYS * part + 8 * t, last[half] / 8 * 8);
                values[2 * half + part] = base[half] + (BLOCK_KEYS * D + q * BLOCK_KEYS + key);
            }
        }
#pragma unroll
        for (i32 i = 0; i < DEPTH; i++) {
            ring[i] = load(i);
        }
    }

    __device__ __forceinline__ uint4 load(i32 i) const {
        if (i < KEY_PIECES) {
            i32 group = i / (4 * CHUNKS<D>), chunk = i / 4 % CHUNKS<D>, tile = i % 4;
            i32 key = min(GROUP_KEYS * (group % 2) + 2 * tile + row, last[group / 2]);
            const u16* at = keys[group / 2] + key * D;
            if constexpr (D == 16) {
                uint2 half = *reinterpret_cast<const uint2*>(at);
                return make_uint4(half.x, half.y, 0, 0);
            } else {
                return load_stream16(at + 32 * chunk);
            }
        }
        i -= KEY_PIECES;
        i32 columns = i / (GROUPS * COLUMN_TILES), group = i / COLUMN_TILES % GROUPS, tile = i % COLUMN_TILES;
        return load_stream16(values[group] + 8 * BLOCK_KEYS * (columns * COLUMN_TILES + tile));
    }

    __device__ __forceinline__ uint4 take(i32 i) {
        uint4 piece = ring[i % DEPTH];
        if (i + DEPTH < PIECES) {
            ring[i % DEPTH] = load(i + DEPTH);
        }
        return piece;
    }

    __device__ __forceinline__ uint4 take_keys(i32 group, i32 chunk, i32 tile) {
        return take((group * CHUNKS<D> + chunk) * 4 + tile);
    }

    // Of the tile's columns, `columns` being its COLUMN_TILES tiles.
    __device__ __forceinline__ uint4 take_values(i32 columns, i32 group, i32 tile) {
        uint4 piece = take(KEY_PIECES + (columns * GROUPS + group) * COLUMN_TILES + tile);
        i32 count = left - GROUP_KEYS * group;
        return count < 8 ? keep_first(piece, count) : piece;
    }
};

// The states of a block's four sub-spans.
template <i32 D> struct SubSpans {
    static constexpr i32 STRIDE = D + 8;  // so that a warp's rows fall into different banks

    float outputs[WARPS][TILE_ROWS][STRIDE];
    State states[WARPS][TILE_ROWS];
};

// One warp's sub-span, from key `first`.
template <i32 D>
static __device__ __forceinline__ void attend_sub_span(const Attention& attention, const SliceUnit& slice, i32 first,
                                                       float exponent, SubSpans<D>& results, i32 warp, i32 lane) {
    i32 length = min(slice.start + slice.tokens - first, SUB_SPAN_KEYS);
    Pieces<D> pieces(attention, slice.table + first / BLOCK_KEYS, slice.unit, length, lane);
    Queries<D> queries;
    queries.load(attention, slice, 0, lane);
    Scores scores;
    clear(scores.tile);
#pragma unroll
    for (i32 group = 0; group < GROUPS; group++) {
#pragma unroll
        for (i32 chunk = 0; chunk < CHUNKS<D>; chunk++) {
#pragma unroll
            for (i32 tile = 0; tile < 4; tile++) {
                add_scores<D>(scores.tile[4 * group + tile], queries, chunk, pieces.take_keys(group, chunk, tile));
            }
        }
    }
    i32 row = lane / 4;
    hide_keys(scores, slice.seen(row, attention.group) - first, slice.seen(row + 8, attention.group) - first, lane);
    Weights weights;
    State low, high;
    softmax(scores, exponent, weights, low, high);
    if (lane % 4 == 0) {
        results.states[warp][row] = low;
        results.states[warp][row + 8] = high;
    }
    constexpr i32 TILES = Pieces<D>::COLUMN_TILES;
#pragma unroll
    for (i32 columns = 0; columns < D / 8 / TILES; columns++) {
        float o[TILES][4];
        clear(o);
#pragma unroll
        for (i32 group = 0; group < GROUPS; group++) {
#pragma unroll
            for (i32 tile = 0; tile < TILES; tile++) {
                add_values(o[tile], weights, group, pieces.take_values(columns, group, tile));
            }
        }
#pragma unroll
        for (i32 tile = 0; tile < TILES; tile++) {
            i32 column = 8 * (columns * TILES + tile) + 2 * (lane % 4);
            *reinterpret_cast<float2*>(&results.outputs[warp][row][column]) = make_float2(o[tile][0], o[tile][1]);
            *reinterpret_cast<float2*>(&results.outputs[warp][row + 8][column]) = make_float2(o[tile][2], o[tile][3]);
        }
    }
}

// Folds the block's sub-spans and writes the span's state; `item` counts rows of `splits`. 8 threads work on a row.
template <i32 D>
static __device__ __forceinline__ void write_span(const SubSpans<D>& results, i32 sub_spans, i32 rows, i64 item, float exponent,
                                                  const Splits& splits) {
    i32 row = threadIdx.x / 8;
    if (row >= rows) {
        return;
    }
    State state = empty_state();
    Fold folds[WARPS];
#pragma unroll
    for (i32 warp = 0; warp < WARPS; warp++) {
        if (warp < sub_spans) {
            folds[warp] = fold_states(state, results.states[warp][row], exponent);
        }
    }
    if (threadIdx.x % 8 == 0) {
        *reinterpret_cast<float2*>(splits.states + 2 * (item + row)) = make_float2(state.m, state.l);
    }
    for (i32 column = 4 * (threadIdx.x % 8); column < D; column += 32) {
        float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (i32 warp = 0; warp < WARPS; warp++) {
            if (warp < sub_spans) {
                float4 later = *reinterpret_cast<const float4*>(&results.outputs[warp][row][column]);
                o.x = fold_output(o.x, later.x, folds[warp]);
                o.y = fold_output(o.y, later.y, folds[warp]);
                o.z = fold_output(o.z, later.z, folds[warp]);
                o.w = fold_output(o.w, later.w, folds[warp]);
            }
        }
        *reinterpret_cast<float4*>(splits.outputs + (item + row) * D + column) = o;
    }
}

template <i32 D>
static __device__ __forceinline__ void attend_short(const Attention& attention, const Splits& splits, float scale,
                                                    i32 rows_per_item, SubSpans<D>& results) {
    i32 lane = threadIdx.x % 32;
    i32 warp = threadIdx.x / 32;
    i32 unit = static_cast<i32>(blockIdx.y);
    float exponent = exponent_of(scale);
    i32 count = static_cast<i32>(*splits.count);
    u32 spans = splits.span_offset[count];
    for (u32 span = blockIdx.x; span < spans; span += gridDim.x) {
        i32 index = last_at_most(splits.span_offset, count, span, lane);
        SliceUnit slice = SliceUnit::at(attention, splits.slices[index], unit);
        i32 first = static_cast<i32>(span - splits.span_offset[index]) * SPAN_KEYS;
        i32 sub_spans = min(ceil_div(slice.start + slice.tokens - first, SUB_SPAN_KEYS), WARPS);
        if (warp < sub_spans) {
            attend_sub_span<D>(attention, slice, first + warp * SUB_SPAN_KEYS, exponent, results, warp, lane);
        }
        __syncthreads();
        i64 item = (static_cast<i64>(span) * attention.units + unit) * rows_per_item;
        write_span<D>(results, sub_spans, slice.tokens * attention.group, item, exponent, splits);
        __syncthreads();
    }
}

#define ATTEND_SHORT(D)                                                                                          \
    KERNEL(128, 2, attend_short_d##D, (Attention attention, Splits splits, float scale, i32 rows_per_item)) { \
        __shared__ SubSpans<D> results;                                                                          \
        attend_short<D>(attention, splits, scale, rows_per_item, results);                                       \
    }

ATTEND_SHORT(16)
ATTEND_SHORT(32)
ATTEND_SHORT(64)
ATTEND_SHORT(128)
