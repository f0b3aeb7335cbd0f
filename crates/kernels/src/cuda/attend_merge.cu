// Folds the spans that attend_short left, in ascending order, and writes the result.
//
// attend_merge_d{16,32,64,128}(attention, splits, scale, rows_per_item, out)
//   grid (⌈S · rows_per_item · D / 128⌉, units) for any S ≥ the number of short slices, block 128, no dynamic shared memory.
//   attention, splits, scale, rows_per_item: as given to attend_short.
//   out: bf16 [T, units · group · D]. Rows of a short slice without spans (padding) become zeros.
//
// A thread takes one column of a row. It must wait for no load but the first: LOADS spans are under way.
#include "attend.cuh"

static constexpr i32 THREADS = 128;
static constexpr i32 LOADS = 32;

template <i32 D>
static __device__ __forceinline__ void attend_merge(const Attention& attention, const Splits& splits, float scale,
                                                    i32 rows_per_item, u16* out) {
    i32 place = static_cast<i32>(blockIdx.x) * (THREADS / D) + static_cast<i32>(threadIdx.x) / D;
    i32 column = static_cast<i32>(threadIdx.x) % D;
    i32 unit = static_cast<i32>(blockIdx.y);
    i32 index = place / rows_per_item;
    i32 row = place % rows_per_item;
    if (index >= static_cast<i32>(*splits.count)) {
        return;
    }
    SliceUnit slice = SliceUnit::at(attention, splits.slices[index], unit);
    if (row >= slice.tokens * attention.group) {
        return;
    }
    float exponent = exponent_of(scale);
    u32 first = splits.span_offset[index];
    i32 spans = static_cast<i32>(splits.span_offset[index + 1] - first);
    i64 stride = static_cast<i64>(attention.units) * rows_per_item;
    i64 item = first * stride + unit * rows_per_item + row;
    const float* outputs = splits.outputs + item * D + column;
    const float2* states = reinterpret_cast<const float2*>(splits.states) + item;

    float later_o[LOADS];
    float2 later[LOADS];
#pragma unroll
    for (i32 i = 0; i < LOADS; i++) {
        if (i < spans) {
            later_o[i] = outputs[i * stride * D];
            later[i] = states[i * stride];
        }
    }
    State state = empty_state();
    float o = 0.0f;
    for (i32 span = 0; span < spans; span += LOADS) {
        outputs += LOADS * stride * D;
        states += LOADS * stride;
#pragma unroll
        for (i32 i = 0; i < LOADS; i++) {
            if (span + i < spans) {
                Fold fold = fold_states(state, State{later[i].x, later[i].y}, exponent);
                o = fold_output(o, later_o[i], fold);
            }
            if (span + LOADS + i < spans) {
                later_o[i] = outputs[i * stride * D];
                later[i] = states[i * stride];
            }
        }
    }
    out[slice.place<D>(row, attention) + column] = float_to_bf16(normalised(o, normaliser(state)));
}

#define ATTEND_MERGE(D)                                                                                                  \
    KERNEL(128, 4, attend_merge_d##D, (Attention attention, Splits splits, float scale, i32 rows_per_item, u16* out)) { \
        after_previous();                                                                                                \
        attend_merge<D>(attention, splits, scale, rows_per_item, out);                                                   \
    }

ATTEND_MERGE(16)
ATTEND_MERGE(32)
ATTEND_MERGE(64)
ATTEND_MERGE(128)
