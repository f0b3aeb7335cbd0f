// Causal attention over the paged cache: what its kernels share, above all the arithmetic, which fixes the bits.
//
// The query rows of a slice and a unit (a KV head) are numbered row = token · group + head: the heads of a token share its
// keys. Keys fall in sub-spans of 128 and spans of 512, counted from position 0. A row's *state* over some keys is the greatest
// score m, the sum l of the weights 2^((score − m) · exponent), and the weighted sum o of the values, not divided by l.
//   sub-span: from fresh accumulators, by `add_scores`, `hide_keys`, `softmax`, `add_values`, each in ascending order of keys;
//   span: the left fold of its sub-spans, from an empty state, in ascending order; total: likewise, of the spans.
// The fold is `fold_states` and `fold_output` everywhere. Sub-spans of which a row sees nothing leave its state as it is. So the
// bits of a row depend on its query, its keys and its values, and on nothing else. The result is o / l, in bf16.
//
// A warp works on 16 rows with mma.m16n8k16; lane 4q + t has rows q and q + 8 (`low` and `high`), and 16 bytes are
// loaded at once, which hold operands of two instructions. So k is permuted inside each chunk of 32:
//   scores: A is Q, B is K with 8 keys. Lane t holds elements 8t..8t+7 of a chunk of 32 of the head dimension (of 16: 4t..4t+3).
//   values: A is the weights, B is V, 8 columns of it. Lane t holds keys 8t..8t+7 of a group of 32. So that the scores' results
//   are operands as they are, column n of tile i (0..3) of a group G stands for key 32G + 8·(n/2) + 2i + n%2.
//
// KV of a layer, block and unit: K [64][D], then V transposed [D][64], bf16. What lies there beyond a slice's end may be NaN:
// it is not multiplied by a weight of 0, it is left out or replaced.
#pragma once
#include "device.cuh"

static constexpr i32 BLOCK_KEYS = 64;
static constexpr i32 SUB_SPAN_KEYS = 128;
static constexpr i32 SPAN_KEYS = 512;
static constexpr i32 TILE_ROWS = 16;
static constexpr i32 GROUP_KEYS = 32;
static constexpr i32 GROUPS = SUB_SPAN_KEYS / GROUP_KEYS;

// Pieces of 16 bytes that a lane has of a row of Q or K (of 8 where D is 16).
template <i32 D> static constexpr i32 CHUNKS = D == 16 ? 1 : D / 32;

// What all slices share. 64 bytes. See the step's metadata: slice s has rows slice_row[s]..slice_row[s + 1], the first at
// position slice_start[s], and the KV blocks table[table_offset[s]..]. T rows, `units` KV heads of `group` query heads each.
struct Attention {
    const u16* q;  // bf16 [T, units · group · D]
    const u16* kv;
    const u32* slice_row;
    const i32* slice_start;
    const u32* table_offset;
    const u32* table;
    i32 layer;
    i32 blocks;  // of the cache, in each layer
    i32 units;
    i32 group;
};

// Slices of at most 16 rows, cut by span: where they are, and where their states go. 40 bytes.
struct Splits {
    const u32* slices;       // the short slices
    const u32* span_offset;  // [*count + 1]: spans of the short slices before this one
    const u32* count;        // short slices
    float* outputs;          // [span][unit][rows_per_item][D]: o
    float* states;           // [span][unit][rows_per_item][2]: m and l; aligned to 8 bytes
};

// One slice and one unit of it.
struct SliceUnit {
    i32 first_row;  // of the batch
    i32 start;      // position of that row
    i32 tokens;
    i32 unit;
    const u32* table;

    static __device__ __forceinline__ SliceUnit at(const Attention& attention, u32 slice, i32 unit) {
        SliceUnit found;
        found.first_row = static_cast<i32>(attention.slice_row[slice]);
        found.start = attention.slice_start[slice];
        found.tokens = static_cast<i32>(attention.slice_row[slice + 1]) - found.first_row;
        found.unit = unit;
        found.table = attention.table + attention.table_offset[slice];
        return found;
    }

    // Keys that `row` sees, from position 0; none if there is no such row.
    __device__ __forceinline__ i32 seen(i32 row, i32 group) const {
        return row < tokens * group ? start + row / group + 1 : 0;
    }

    // The elements before `row` of q and of the result.
    template <i32 D> __device__ __forceinline__ i64 place(i32 row, const Attention& attention) const {
        i64 token = first_row + row / attention.group;
        return ((token * attention.units + unit) * attention.group + row % attention.group) * D;
    }
};

// K of a block and unit; V comes after it.
template <i32 D>
static __device__ __forceinline__ const u16* keys_of(const Attention& attention, u32 block, i32 unit) {
    i64 index = (static_cast<i64>(attention.layer) * attention.blocks + block) * attention.units + unit;
    return attention.kv + index * (2 * BLOCK_KEYS * D);
}

// Piece t of a row of Q or K: 16 bytes, or 8 where D is 16.
template <i32 D> static __device__ __forceinline__ uint4 load_piece(const u16* row, i32 chunk, i32 t) {
    if constexpr (D == 16) {
        uint2 half = *reinterpret_cast<const uint2*>(row + 4 * t);
        return make_uint4(half.x, half.y, 0, 0);
    } else {
        return load16(row + 32 * chunk + 8 * t);
    }
}

// A warp's queries in one chunk, as operands.
struct Queries {
    uint4 a[2];
};

// The lane's two rows of q; zeros for a row that the slice does not have.
template <i32 D> struct QueryRows {
    const u16* low;
    const u16* high;
    u32 low_mask;
    u32 high_mask;
    i32 t;

    // `row` and 8 more.
    __device__ __forceinline__ QueryRows(const Attention& attention, const SliceUnit& slice, i32 row, i32 t) : t(t) {
        i32 last = slice.tokens * attention.group - 1;
        low = attention.q + slice.place<D>(min(row, last), attention);
        high = attention.q + slice.place<D>(min(row + 8, last), attention);
        low_mask = row <= last ? 0xffffffffu : 0;
        high_mask = row + 8 <= last ? 0xffffffffu : 0;
    }

    // The masking also puts the words in their order as operands. The compiler would do that again for each product.
    __device__ __forceinline__ Queries load(i32 chunk) const {
        uint4 l = load_piece<D>(low, chunk, t);
        uint4 h = load_piece<D>(high, chunk, t);
        return Queries{{make_uint4(l.x & low_mask, h.x & high_mask, l.y & low_mask, h.y & high_mask),
                        make_uint4(l.z & low_mask, h.z & high_mask, l.w & low_mask, h.w & high_mask)}};
    }
};

// A warp's scores against a sub-span: tile[4G + i] is tile i of group G.
struct Scores {
    float tile[4 * GROUPS][4];
};

// A warp's weights over a sub-span, in bf16, as operands: two for each group.
struct Weights {
    uint4 a[2 * GROUPS];
};

// Adds one chunk's products to a tile of scores; chunks come in ascending order.
template <i32 D> static __device__ __forceinline__ void add_scores(float (&tile)[4], const Queries& queries, uint4 keys) {
    mma_bf16(tile, queries.a[0].x, queries.a[0].y, queries.a[0].z, queries.a[0].w, keys.x, keys.y);
    if constexpr (D != 16) {
        mma_bf16(tile, queries.a[1].x, queries.a[1].y, queries.a[1].z, queries.a[1].w, keys.z, keys.w);
    }
}

// Adds one group's weighted values to 8 columns of the output; groups come in ascending order.
static __device__ __forceinline__ void add_values(float (&tile)[4], const Weights& weights, i32 group, uint4 values) {
    uint4 a = weights.a[2 * group];
    mma_bf16(tile, a.x, a.y, a.z, a.w, values.x, values.y);
    a = weights.a[2 * group + 1];
    mma_bf16(tile, a.x, a.y, a.z, a.w, values.z, values.w);
}

template <i32 TILES> static __device__ __forceinline__ void clear(float (&tiles)[TILES][4]) {
#pragma unroll
    for (i32 i = 0; i < TILES; i++) {
#pragma unroll
        for (i32 j = 0; j < 4; j++) {
            tiles[i][j] = 0.0f;
        }
    }
}

// Replaces the scores of keys that the row does not see by −∞, whatever they are; `low` and `high` are the keys of the sub-span
// that the lane's rows see.
static __device__ __forceinline__ void hide_keys(Scores& scores, i32 low, i32 high, i32 lane) {
    if (low >= SUB_SPAN_KEYS && high >= SUB_SPAN_KEYS) {
        return;
    }
    low -= 8 * (lane % 4);
    high -= 8 * (lane % 4);
#pragma unroll
    for (i32 i = 0; i < 4 * GROUPS; i++) {
#pragma unroll
        for (i32 j = 0; j < 2; j++) {
            i32 key = GROUP_KEYS * (i / 4) + 2 * (i % 4) + j;
            scores.tile[i][j] = key < low ? scores.tile[i][j] : NEGATIVE_INFINITY;
            scores.tile[i][2 + j] = key < high ? scores.tile[i][2 + j] : NEGATIVE_INFINITY;
        }
    }
}

// m and l of a row; the empty state is (−∞, 0).
struct State {
    float m;
    float l;
};

static __device__ __forceinline__ State empty_state() {
    return State{NEGATIVE_INFINITY, 0.0f};
}

// What weights of a state are relative to: m, but for the empty state, where −∞ − −∞ would be NaN.
static __device__ __forceinline__ float base_of(float m) {
    return m == NEGATIVE_INFINITY ? 0.0f : m;
}

// Turns the scores of one of the lane's two rows (HIGH: the second) into weights; the four lanes of a row return its state.
template <bool HIGH> static __device__ __forceinline__ State softmax_row(Scores& scores, float exponent) {
    const i32 at = HIGH ? 2 : 0;
    float m = NEGATIVE_INFINITY;
#pragma unroll
    for (i32 i = 0; i < 4 * GROUPS; i++) {
        m = fmaxf(m, fmaxf(scores.tile[i][at], scores.tile[i][at + 1]));
    }
    m = fmaxf(m, __shfl_xor_sync(FULL_WARP, m, 1));
    m = fmaxf(m, __shfl_xor_sync(FULL_WARP, m, 2));
    float base = base_of(m);
    float l = 0.0f;
#pragma unroll
    for (i32 i = 0; i < 4 * GROUPS; i++) {
        float even = exp2_approximate((scores.tile[i][at] - base) * exponent);
        float odd = exp2_approximate((scores.tile[i][at + 1] - base) * exponent);
        l += even + odd;
        scores.tile[i][at] = even;
        scores.tile[i][at + 1] = odd;
    }
    l += __shfl_xor_sync(FULL_WARP, l, 1);
    l += __shfl_xor_sync(FULL_WARP, l, 2);
    return State{m, l};
}

// The weights of a sub-span and the states, less o, of the lane's two rows.
static __device__ __forceinline__ void softmax(Scores& scores, float exponent, Weights& weights, State& low, State& high) {
    low = softmax_row<false>(scores, exponent);
    high = softmax_row<true>(scores, exponent);
#pragma unroll
    for (i32 i = 0; i < 2 * GROUPS; i++) {
        const float(&first)[4] = scores.tile[2 * i];
        const float(&second)[4] = scores.tile[2 * i + 1];
        weights.a[i] = make_uint4(pack_bf16x2(first[0], first[1]), pack_bf16x2(first[2], first[3]),
                                  pack_bf16x2(second[0], second[1]), pack_bf16x2(second[2], second[3]));
    }
}

// What the outputs of two states are multiplied by when they are folded.
struct Fold {
    float earlier;
    float later;
};

// Folds the state of later keys into `into`. An empty state on either side leaves the other one as it is.
static __device__ __forceinline__ Fold fold_states(State& into, State later, float exponent) {
    float m = fmaxf(into.m, later.m);
    float base = base_of(m);
    Fold fold = {exp2_approximate((into.m - base) * exponent), exp2_approximate((later.m - base) * exponent)};
    into.l = fmaf(later.l, fold.later, into.l * fold.earlier);
    into.m = m;
    return fold;
}

static __device__ __forceinline__ float fold_output(float earlier, float later, Fold fold) {
    return fmaf(later, fold.later, earlier * fold.earlier);
}

// 1 / l, or 0 for a row that saw nothing (padding).
static __device__ __forceinline__ float normaliser(State state) {
    return state.l > 0.0f ? 1.0f / state.l : 0.0f;
}

// The result: never −0, which would show how many empty sub-spans were folded.
static __device__ __forceinline__ float normalised(float o, float factor) {
    return o * factor + 0.0f;
}

// Scores are in the units of q·k; weights are powers of two. `scale` is positive.
static __device__ __forceinline__ float exponent_of(float scale) {
    return scale * 1.44269504f;
}

// The first `count` (of 8) bf16 of a piece, then zeros.
static __device__ __forceinline__ uint4 keep_first(uint4 piece, i32 count) {
    u32 x = count > 1 ? piece.x : count == 1 ? piece.x & 0xffffu : 0;
    u32 y = count > 3 ? piece.y : count == 3 ? piece.y & 0xffffu : 0;
    u32 z = count > 5 ? piece.z : count == 5 ? piece.z & 0xffffu : 0;
    u32 w = count > 7 ? piece.w : count == 7 ? piece.w & 0xffffu : 0;
    return make_uint4(x, y, z, w);
}
