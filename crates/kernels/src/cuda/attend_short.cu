// Attention of slices of at most 16 rows (decoding, mostly): spans are spread over blocks, and attend_merge folds them.
//
// attend_short_d{16,32,64,128}(attention, splits, scale, rows_per_item)
//   grid (X, units) with any X: block x works on spans x, x + X, …, so X does not bound the spans and a recorded launch stays
//   right as contexts grow; as many as there is room for at once are good. Block 128, 66048 bytes of dynamic shared memory.
//   attention, splits: see attend.cuh. A short slice has tokens · group ≤ rows_per_item ≤ 16 and ⌈(start + tokens) / 512⌉
//   spans; one without spans (padding) is passed over.
//   scale: of the scores, f32, positive. rows_per_item: rows that `splits` has room for in each item, i32.
//
// A block takes one span of one slice and unit, each of its 4 warps one sub-span. Keys and values pass through a ring in shared
// memory in which every lane has places of its own, so that much is on its way without taking registers.
#include "attend.cuh"

static constexpr i32 WARPS = SPAN_KEYS / SUB_SPAN_KEYS;
// A multiple of GROUPS, so that a place has the same group of keys in every chunk.
static constexpr i32 RING_QUADS = 2 * GROUPS;

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

// Of a warp: its ring, then the state of its sub-span.
template <i32 D> struct SubSpan {
    static constexpr i32 STRIDE = D + 8;  // so that a warp's rows fall into different banks

    union {
        uint4 ring[RING_QUADS][4][32];
        float outputs[TILE_ROWS][STRIDE];
    };
    State states[TILE_ROWS];
};

// A lane's way to its pieces of keys and values. They come in quads: of keys, the four tiles of a group in a chunk; of values,
// four times 8 columns in a group. As many quads as the ring has places are on their way, and are taken in the order in which
// they were begun, number after number: first the keys, chunk after chunk. What a lane copies it alone reads, so no barrier is
// needed.
template <i32 D> struct Pieces {
    static constexpr i32 KEY_QUADS = CHUNKS<D> * GROUPS;
    static constexpr i32 VALUE_QUADS = D / 8;

    uint4 (*ring)[4][32];
    i32 lane;
    const u16* keys[2];  // of the two blocks, at the lane's row of a tile 0, and column
    const u16* values[2];

    // `length` keys, at least 1, are in the sub-span and the slice; `table` has the sub-span's blocks. If there is but one it is
    // read twice: the second time it is hidden, and costs no memory traffic.
    __device__ __forceinline__ Pieces(SubSpan<D>& shared, const Attention& attention, const u32* table, i32 unit, i32 length,
                                      i32 lane) : ring(shared.ring), lane(lane) {
        i32 t = lane % 4;
        i32 q = lane / 4;
#pragma unroll
        for (i32 half = 0; half < 2; half++) {
            const u16* block = keys_of<D>(attention, table[length > BLOCK_KEYS ? half : 0], unit);
            keys[half] = block + (8 * (q / 2) + q % 2) * D + 8 * (D == 16 ? t / 2 : t);
            values[half] = block + BLOCK_KEYS * D + q * BLOCK_KEYS + 8 * t;
        }
    }

    static __device__ __forceinline__ constexpr i32 value_group(i32 quad, i32 i) {
        return (4 * quad + i) / (D / 8);
    }
    static __device__ __forceinline__ constexpr i32 value_tile(i32 quad, i32 i) {
        return (4 * quad + i) % (D / 8);
    }

    // Begins with a quad. Beyond the last one nothing, so that the number of quads under way is always the same.
    __device__ __forceinline__ void begin(i32 number) {
        uint4 (*place)[32] = ring[number % RING_QUADS];
        i32 quad = number - KEY_QUADS;
        if (quad < 0) {
            i32 group = number % GROUPS;
            const u16* from = keys[group / 2] + GROUP_KEYS * (group % 2) * D + number / GROUPS * 32;
#pragma unroll
            for (i32 i = 0; i < 4; i++) {
                // The other chunks of these rows are next.
                cp_async16_from<256>(&place[i][lane], from + 2 * i * D);
            }
        } else if (quad < VALUE_QUADS) {
#pragma unroll
            for (i32 i = 0; i < 4; i++) {
                i32 group = value_group(quad, i);
                const u16* from = values[group / 2] + GROUP_KEYS * (group % 2) + 8 * BLOCK_KEYS * value_tile(quad, i);
                cp_async16_from<128>(&place[i][lane], from);
            }
        }
        cp_async_commit();
    }

    // Waits for a quad, and makes room for the one that comes a ring later.
    __device__ __forceinline__ void take(i32 number, uint4 (&pieces)[4]) {
        cp_async_wait<RING_QUADS - 1>();
#pragma unroll
        for (i32 i = 0; i < 4; i++) {
            const uint4* piece = &ring[number % RING_QUADS][i][lane];
            if (D == 16 && number < KEY_QUADS) {  // two lanes have copies of the same piece, and use a half each
                uint2 half = reinterpret_cast<const uint2*>(piece)[lane % 2];
                pieces[i] = make_uint4(half.x, half.y, 0, 0);
            } else {
                pieces[i] = load16(piece);
            }
        }
        begin(number + RING_QUADS);
    }
};

// Adds a chunk's products to all scores.
template <i32 D>
static __device__ __forceinline__ void score_chunk(Scores& scores, const Queries& queries, Pieces<D>& pieces, i32 chunk) {
#pragma unroll
    for (i32 group = 0; group < GROUPS; group++) {
        uint4 keys[4];
        pieces.take(chunk * GROUPS + group, keys);
#pragma unroll
        for (i32 i = 0; i < 4; i++) {
            add_scores<D>(scores.tile[4 * group + i], queries, keys[i]);
        }
    }
}

// The weighted values of a sub-span. Unless it is WHOLE, its values from key `length` on are replaced by zeros.
template <i32 D, bool WHOLE>
static __device__ __forceinline__ void weigh_values(float (&o)[D / 8][4], const Weights& weights, Pieces<D>& pieces, i32 length) {
    clear(o);
#pragma unroll
    for (i32 quad = 0; quad < Pieces<D>::VALUE_QUADS; quad++) {
        uint4 values[4];
        pieces.take(Pieces<D>::KEY_QUADS + quad, values);
#pragma unroll
        for (i32 i = 0; i < 4; i++) {
            i32 group = Pieces<D>::value_group(quad, i);
            if (!WHOLE) {
                values[i] = keep_first(values[i], length - GROUP_KEYS * group - 8 * (pieces.lane % 4));
            }
            add_values(o[Pieces<D>::value_tile(quad, i)], weights, group, values[i]);
        }
    }
}

// One warp's sub-span, from key `first`.
template <i32 D>
static __device__ __forceinline__ void attend_sub_span(const Attention& attention, const SliceUnit& slice, i32 first,
                                                       float exponent, SubSpan<D>& shared, i32 lane) {
    i32 length = min(slice.start + slice.tokens - first, SUB_SPAN_KEYS);
    i32 row = lane / 4;
    Pieces<D> pieces(shared, attention, slice.table + first / BLOCK_KEYS, slice.unit, length, lane);
#pragma unroll
    for (i32 number = 0; number < RING_QUADS; number++) {
        pieces.begin(number);
    }
    QueryRows<D> rows(attention, slice, row, lane % 4);
    Scores scores;
    clear(scores.tile);
    Queries queries = rows.load(0);
#pragma unroll
    for (i32 chunk = 0; chunk + 1 < CHUNKS<D>; chunk++) {
        Queries next = rows.load(chunk + 1);
        score_chunk<D>(scores, queries, pieces, chunk);
        queries = next;
    }
    score_chunk<D>(scores, queries, pieces, CHUNKS<D> - 1);
    hide_keys(scores, slice.seen(row, attention.group) - first, slice.seen(row + 8, attention.group) - first, lane);
    Weights weights;
    State low, high;
    softmax(scores, exponent, weights, low, high);
    float o[D / 8][4];
    if (length == SUB_SPAN_KEYS) {
        weigh_values<D, true>(o, weights, pieces, length);
    } else {
        weigh_values<D, false>(o, weights, pieces, length);
    }
    __syncwarp();  // the outputs take the ring's place
    if (lane % 4 == 0) {
        shared.states[row] = low;
        shared.states[row + 8] = high;
    }
#pragma unroll
    for (i32 i = 0; i < D / 8; i++) {
        *reinterpret_cast<float2*>(&shared.outputs[row][8 * i + 2 * (lane % 4)]) = make_float2(o[i][0], o[i][1]);
        *reinterpret_cast<float2*>(&shared.outputs[row + 8][8 * i + 2 * (lane % 4)]) = make_float2(o[i][2], o[i][3]);
    }
}

// Folds the block's sub-spans and writes the span's state; `item` counts rows of `splits`. 8 threads work on a row.
template <i32 D>
static __device__ __forceinline__ void write_span(const SubSpan<D> (&shared)[WARPS], i32 sub_spans, i32 rows, i64 item,
                                                  float exponent, const Splits& splits) {
    i32 row = threadIdx.x / 8;
    if (row >= rows) {
        return;
    }
    State state = empty_state();
    Fold folds[WARPS];
#pragma unroll
    for (i32 warp = 0; warp < WARPS; warp++) {
        if (warp < sub_spans) {
            folds[warp] = fold_states(state, shared[warp].states[row], exponent);
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
                float4 later = *reinterpret_cast<const float4*>(&shared[warp].outputs[row][column]);
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
                                                    i32 rows_per_item, SubSpan<D> (&shared)[WARPS]) {
    i32 lane = threadIdx.x % 32;
    i32 warp = threadIdx.x / 32;
    i32 unit = static_cast<i32>(blockIdx.y);
    float exponent = exponent_of(scale);
    i32 count = static_cast<i32>(*splits.count);
    u32 spans = splits.span_offset[count];
    u32 span = blockIdx.x;
    SliceUnit slice;
    i32 first = 0;
    auto find = [&]() {
        if (span < spans) {
            i32 index = last_at_most(splits.span_offset, count, span, lane);
            slice = SliceUnit::at(attention, splits.slices[index], unit);
            first = static_cast<i32>(span - splits.span_offset[index]) * SPAN_KEYS;
        }
    };
    // The step's metadata is there before its first kernel.
    find();
    after_previous();
    for (; span < spans; span += gridDim.x, find()) {
        i32 sub_spans = min(ceil_div(slice.start + slice.tokens - first, SUB_SPAN_KEYS), WARPS);
        if (warp < sub_spans) {
            attend_sub_span<D>(attention, slice, first + warp * SUB_SPAN_KEYS, exponent, shared[warp], lane);
        }
        __syncthreads();
        i64 item = (static_cast<i64>(span) * attention.units + unit) * rows_per_item;
        write_span<D>(shared, sub_spans, slice.tokens * attention.group, item, exponent, splits);
        __syncthreads();
    }
}

// No least number of blocks is asked for: given one, the compiler fills the registers that it leaves, and spills.
#define ATTEND_SHORT(D)                                                                                       \
    KERNEL(128, 0, attend_short_d##D, (Attention attention, Splits splits, float scale, i32 rows_per_item)) { \
        SubSpan<D>(&shared)[WARPS] = *dynamic_shared<SubSpan<D>[WARPS]>();                                    \
        attend_short<D>(attention, splits, scale, rows_per_item, shared);                                     \
    }

ATTEND_SHORT(16)
ATTEND_SHORT(32)
ATTEND_SHORT(64)
ATTEND_SHORT(128)
