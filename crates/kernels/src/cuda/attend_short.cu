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
template <i32 D> struct Pieces {
    static constexpr i32 COLUMN_TILES = D == 16 ? 2 : 4;  // that are worked on together
    static constexpr i32 KEY_PIECES = GROUPS * CHUNKS<D> * 4;
    static constexpr i32 PIECES = KEY_PIECES + D / 8 * GROUPS;
    static constexpr i32 DEPTH = 16;

    uint4 ring[DEPTH];
    const u16* keys[2];  // of the two blocks, at the lane's row of a tile 0, and column
    const u16* values[2];

    // `length` keys, at least 1, are in the sub-span and the slice; `table` has the sub-span's blocks. If there is but one it is
    // read twice: the second time it is hidden, and costs no memory traffic.
    __device__ __forceinline__ Pieces(const Attention& attention, const u32* table, i32 unit, i32 length, i32 lane) {
        i32 t = lane % 4;
        i32 q = lane / 4;
#pragma unroll
        for (i32 half = 0; half < 2; half++) {
            const u16* block = keys_of<D>(attention, table[length > BLOCK_KEYS ? half : 0], unit);
            keys[half] = block + (8 * (q / 2) + q % 2) * D + (D == 16 ? 4 : 8) * t;
            values[half] = block + BLOCK_KEYS * D + q * BLOCK_KEYS + 8 * t;
        }
#pragma unroll
        for (i32 i = 0; i < DEPTH; i++) {
            ring[i] = load(i);
        }
    }

    __device__ __forceinline__ uint4 load(i32 i) const {
        if (i < KEY_PIECES) {
            i32 group = i / (4 * CHUNKS<D>), chunk = i / 4 % CHUNKS<D>, tile = i % 4;
            const u16* key = keys[group / 2] + (GROUP_KEYS * (group % 2) + 2 * tile) * D;
            if constexpr (D == 16) {
                return load_piece<D>(key, 0, 0);
            } else {
                return load_stream16(key + 32 * chunk);
            }
        }
        i -= KEY_PIECES;
        i32 columns = i / (GROUPS * COLUMN_TILES), group = i / COLUMN_TILES % GROUPS, tile = i % COLUMN_TILES;
        return load_stream16(values[group / 2] + GROUP_KEYS * (group % 2) + 8 * BLOCK_KEYS * (columns * COLUMN_TILES + tile));
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

    // Instead of taking those of the second block.
    __device__ __forceinline__ void skip_second_keys() {
#pragma unroll
        for (i32 i = KEY_PIECES; i < KEY_PIECES + DEPTH && i < PIECES; i++) {
            ring[i % DEPTH] = load(i);
        }
    }

    __device__ __forceinline__ uint4 take_values(i32 columns, i32 group, i32 tile) {
        return take(KEY_PIECES + (columns * GROUPS + group) * COLUMN_TILES + tile);
    }
};

// A span: of which slice, and its first key.
struct Span {
    SliceUnit slice;
    i32 first;

    // Its sub-spans that have keys, at most 4 of them.
    __device__ __forceinline__ i32 sub_spans() const {
        return min(ceil_div(slice.start + slice.tokens - first, SUB_SPAN_KEYS), WARPS);
    }
};

// What the warps of a block share: spans (this one and the next in turns), and the states of the four sub-spans.
template <i32 D> struct Shared {
    static constexpr i32 STRIDE = D + 8;  // so that a warp's rows fall into different banks

    Span spans[2];
    float outputs[WARPS][TILE_ROWS][STRIDE];
    State states[WARPS][TILE_ROWS];
};

// The scores of block `HALF` of a sub-span.
template <i32 D, i32 HALF>
static __device__ __forceinline__ void score_block(Scores& scores, const Queries<D>& queries, Pieces<D>& pieces) {
#pragma unroll
    for (i32 group = 2 * HALF; group < 2 * HALF + 2; group++) {
#pragma unroll
        for (i32 chunk = 0; chunk < CHUNKS<D>; chunk++) {
#pragma unroll
            for (i32 tile = 0; tile < 4; tile++) {
                add_scores<D>(scores.tile[4 * group + tile], queries, chunk, pieces.take_keys(group, chunk, tile));
            }
        }
    }
}

// The weighted values of a warp's sub-span. Unless it is WHOLE, its values from key `length` on are replaced by zeros.
template <i32 D, bool WHOLE>
static __device__ __forceinline__ void weigh_values(Pieces<D>& pieces, const Weights& weights, i32 length,
                                                    float (*outputs)[Shared<D>::STRIDE], i32 lane) {
    constexpr i32 TILES = Pieces<D>::COLUMN_TILES;
#pragma unroll
    for (i32 columns = 0; columns < D / 8 / TILES; columns++) {
        float o[TILES][4];
        clear(o);
#pragma unroll
        for (i32 group = 0; group < GROUPS; group++) {
#pragma unroll
            for (i32 tile = 0; tile < TILES; tile++) {
                uint4 values = pieces.take_values(columns, group, tile);
                if (!WHOLE) {
                    values = keep_first(values, length - GROUP_KEYS * group - 8 * (lane % 4));
                }
                add_values(o[tile], weights, group, values);
            }
        }
#pragma unroll
        for (i32 tile = 0; tile < TILES; tile++) {
            i32 column = 8 * (columns * TILES + tile) + 2 * (lane % 4);
            *reinterpret_cast<float2*>(&outputs[lane / 4][column]) = make_float2(o[tile][0], o[tile][1]);
            *reinterpret_cast<float2*>(&outputs[lane / 4 + 8][column]) = make_float2(o[tile][2], o[tile][3]);
        }
    }
}

// One warp's sub-span, from key `first`.
template <i32 D>
static __device__ __forceinline__ void attend_sub_span(const Attention& attention, const SliceUnit& slice, i32 first,
                                                       float exponent, Shared<D>& results, i32 warp, i32 lane) {
    i32 length = min(slice.start + slice.tokens - first, SUB_SPAN_KEYS);
    i32 row = lane / 4;
    Queries<D> queries;
    queries.load(attention, slice, 0, lane);
    Pieces<D> pieces(attention, slice.table + first / BLOCK_KEYS, slice.unit, length, lane);
    Scores scores;
    clear(scores.tile);
    score_block<D, 0>(scores, queries, pieces);
    if (length > BLOCK_KEYS) {
        score_block<D, 1>(scores, queries, pieces);
    } else {
        pieces.skip_second_keys();
    }
    hide_keys(scores, slice.seen(row, attention.group) - first, slice.seen(row + 8, attention.group) - first, lane);
    Weights weights;
    State low, high;
    softmax(scores, exponent, weights, low, high);
    if (lane % 4 == 0) {
        results.states[warp][row] = low;
        results.states[warp][row + 8] = high;
    }
    if (length == SUB_SPAN_KEYS) {
        weigh_values<D, true>(pieces, weights, length, results.outputs[warp], lane);
    } else {
        weigh_values<D, false>(pieces, weights, length, results.outputs[warp], lane);
    }
}

// Folds the block's sub-spans and writes the span's state; `item` counts rows of `splits`. 8 threads work on a row.
template <i32 D>
static __device__ __forceinline__ void write_span(const Shared<D>& results, i32 sub_spans, i32 rows, i64 item, float exponent,
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
                                                    i32 rows_per_item, Shared<D>& shared) {
    i32 lane = threadIdx.x % 32;
    i32 warp = threadIdx.x / 32;
    float exponent = exponent_of(scale);
    i32 turn = 0;
    for (u32 index = blockIdx.x;; index += gridDim.x) {
        i32 count = static_cast<i32>(*splits.count);
        if (index >= splits.span_offset[count]) {
            return;
        }
        turn ^= 1;
        if (warp == 0) {
            i32 place = last_at_most(splits.span_offset, count, index, lane);
            SliceUnit slice = SliceUnit::at(attention, splits.slices[place], static_cast<i32>(blockIdx.y));
            if (lane == 0) {
                shared.spans[turn] = Span{slice, static_cast<i32>(index - splits.span_offset[place]) * SPAN_KEYS};
            }
        }
        __syncthreads();
        if (warp < shared.spans[turn].sub_spans()) {
            Span span = shared.spans[turn];
            attend_sub_span<D>(attention, span.slice, span.first + warp * SUB_SPAN_KEYS, exponent, shared, warp, lane);
        }
        __syncthreads();
        Span span = shared.spans[turn];
        i64 item = (static_cast<i64>(index) * attention.units + span.slice.unit) * rows_per_item;
        write_span<D>(shared, span.sub_spans(), span.slice.tokens * attention.group, item, exponent, splits);
    }
}

#define ATTEND_SHORT(D)                                                                                          \
    KERNEL(128, 2, attend_short_d##D, (Attention attention, Splits splits, float scale, i32 rows_per_item)) { \
        __shared__ Shared<D> shared;                                                                             \
        attend_short<D>(attention, splits, scale, rows_per_item, shared);                                        \
    }

ATTEND_SHORT(16)
ATTEND_SHORT(32)
ATTEND_SHORT(64)
ATTEND_SHORT(128)
