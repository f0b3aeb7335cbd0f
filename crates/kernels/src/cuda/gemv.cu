// Matrix products for 1 to 8 rows of x, alone or added along the reduction tree. Bound by the bandwidth of the weights, so
// they go from memory to registers, several steps ahead of their use, and a block's warps share the segments of k.
//
// gemv_FORMAT(panels, x, rows, x_cols, out, out_cols): column-parallel, out[row·out_cols + panel.out_offset + i].
//   grid (⌈largest n / 16⌉, panels); FORMAT is bf16, int8, int4 or fp8.
// gemv_partials_FORMAT(panels, program, outputs, x, rows, x_cols): row-parallel. Panels are the units in order, all of the same
//   n; each unit's product is a leaf of the tree; outputs.out[j] f32 [rows][n].   grid ⌈n / 16⌉
//
// Block: 32 threads × warps, any number from 1 to 16. Dynamic shared memory: 512 bytes × segments, where segments is the largest
// ⌈panel.k / 512⌉, or for partials their sum over the units (above 48 KiB the function's attribute must be set). Warps beyond the
// number of segments would idle. Best for the speed: ⌈segments / ⌈segments / 8⌉⌉ warps, with 16 in place of 8 where there are
// fewer than two blocks for each multiprocessor.
//
//   panels: by value, see weights.cuh; out_offset matters to gemv_FORMAT alone. program, outputs: by value, see tree.cuh.
//   x: bf16 [rows][x_cols], aligned to 16 bytes, x_cols % 8 == 0 and panel.x_offset % 8 == 0. rows: 1..8.
#include "tree.cuh"
#include "weights.cuh"

static constexpr i32 TOKENS = 8;  // rows of x
static constexpr i32 TILE = TILE_ROWS * TOKENS;
static constexpr i32 AHEAD = 4;  // steps of weights under way

struct Input {
    const u16* x;
    i32 rows;
    i32 cols;
};

// A segment, or the end.
struct Place {
    i32 panel;
    i32 k;  // its first

    // Goes on by so many segments, through the panels before `last`.
    __device__ __forceinline__ void advance(const Panels& panels, i32 last, i32 segments) {
        k += segments * SEGMENT_K;
        while (panel < last) {
            i32 end = round_up(panels.panel[panel].k, SEGMENT_K);
            if (k < end) {
                break;
            }
            k -= end;
            panel++;
        }
    }
};

// A lane's weights in one step.
template <class Format> struct Step {
    static constexpr i32 LINES = Format::STEP_K / Format::LINE_K;
    uint4 lines[LINES][2];
    float2 scale;  // of rows g and g + 8
    u32 zeros;     // likewise, in the lowest two bytes
};

// Where a lane finds the weights of a segment.
template <class Format> struct Source {
    const u8* weights;
    const float* scales;
    const u8* zeros;
    i32 steps;  // to the end of the panel; 0 where there is no segment

    __device__ __forceinline__ Source(const Panels& panels, Place place, i32 last) {
        weights = zeros = nullptr;
        scales = nullptr;
        steps = 0;
        if (place.panel >= last) {
            return;
        }
        const Panel& panel = panels.panel[place.panel];
        i32 lane = threadIdx.x % 32;
        weights = panel.weights + blockIdx.x * tile_bytes<Format>(panel.k) + place.k / Format::LINE_K * LINE_BYTES + lane * 16;
        steps = ceil_div(panel.k - place.k, Format::STEP_K);
        if constexpr (Format::GROUPED) {
            i64 group = static_cast<i64>(blockIdx.x) * ceil_div(panel.k, GROUP_K) + place.k / GROUP_K;
            scales = panel.scales + group * TILE_ROWS + lane / 4 * 2;
            zeros = panel.zeros + group * TILE_ROWS + lane / 4 * 2;
        }
    }

    __device__ __forceinline__ void load(i32 step, Step<Format>& to) const {
        constexpr i32 LINES = Step<Format>::LINES;
        if (step >= steps) {
            return;
        }
#pragma unroll
        for (i32 i = 0; i < LINES; i++) {
            to.lines[i][0] = load_stream16(weights + (step * LINES + i) * LINE_BYTES);
            to.lines[i][1] = load_stream16(weights + (step * LINES + i) * LINE_BYTES + LINE_BYTES / 2);
        }
        if constexpr (Format::GROUPED) {
            to.scale = *reinterpret_cast<const float2*>(scales + step * TILE_ROWS);
            to.zeros = *reinterpret_cast<const u16*>(zeros + step * TILE_ROWS);
        }
    }
};

// sum += the step's weights · x, where this lane's row of x has `left` values from `x` on.
template <class Format>
static __device__ __forceinline__ void multiply_step(float (&sum)[4], const Step<Format>& step, const u16* x, i32 left) {
    constexpr i32 LINE_BLOCKS = Format::LINE_K / 32;
    Offsets offsets = {0, 0};
    if constexpr (Format::GROUPED) {
        offsets = {Format::offset(step.zeros & 0xff), Format::offset(step.zeros >> 8)};
    }
#pragma unroll
    for (i32 block = 0; block < Format::STEP_K / 32; block++) {
        uint4 tokens = block * 32 < left ? load16(x + block * 32) : make_uint4(0, 0, 0, 0);
        multiply_block(sum, Format::fragment(step.lines[block / LINE_BLOCKS], block % LINE_BLOCKS, offsets), tokens);
    }
}

// Products of the block's 16 weight rows in panels first..last with x, segment after segment of all panels:
// sums[segment][row of x][weight row] in shared memory. A warp takes every warps-th segment.
template <class Format>
static __device__ __forceinline__ void multiply_segments(const Panels& panels, i32 first, i32 last, Input input, float* sums) {
    constexpr i32 STEPS = SEGMENT_K / Format::STEP_K;
    i32 warps = blockDim.x / 32;
    i32 warp = threadIdx.x / 32;
    i32 g = threadIdx.x % 32 / 4;
    i32 t = threadIdx.x % 4;
    Place place = {first, 0};
    place.advance(panels, last, warp);
    Source<Format> source(panels, place, last);
    Step<Format> ring[AHEAD];
#pragma unroll
    for (i32 step = 0; step < AHEAD; step++) {
        source.load(step, ring[step]);
    }
#pragma unroll 1
    for (i32 index = warp; place.panel < last; index += warps) {
        const Panel& panel = panels.panel[place.panel];
        i32 left = panel.k - place.k;
        const u16* x = input.x + static_cast<i64>(g) * input.cols + panel.x_offset + place.k + 8 * t;
        i32 x_left = g < input.rows ? left - 8 * t : 0;
        place.advance(panels, last, warps);
        Source<Format> following(panels, place, last);
        float segment[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (i32 step = 0; step < STEPS; step++) {
            Step<Format>& slot = ring[step % AHEAD];
            i32 k = step * Format::STEP_K;
            if (k < left) {
                if constexpr (Format::GROUPED) {
                    float group[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                    multiply_step(group, slot, x + k, x_left - k);
                    add_group(segment, slot.scale.x, slot.scale.y, group);
                } else {
                    multiply_step(segment, slot, x + k, x_left - k);
                }
            }
            if (step + AHEAD < STEPS) {
                source.load(step + AHEAD, slot);
            } else {
                following.load(step + AHEAD - STEPS, slot);
            }
        }
        float* out = sums + index * TILE;
        out[2 * t * TILE_ROWS + g] = segment[0];
        out[(2 * t + 1) * TILE_ROWS + g] = segment[1];
        out[2 * t * TILE_ROWS + g + 8] = segment[2];
        out[(2 * t + 1) * TILE_ROWS + g + 8] = segment[3];
        source = following;
    }
    __syncthreads();
}

// The panel's result for a weight row: its segments, in ascending order.
template <class Format>
static __device__ __forceinline__ float add_segments(const Panel& panel, i32 weight_row, const float* sums) {
    float total = NOTHING;
    for (i32 k = 0; k < panel.k; k += SEGMENT_K) {
        total += *sums;
        sums += TILE;
    }
    if constexpr (Format::ROW_SCALED) {
        total *= panel.scales[weight_row];
    }
    return total;
}

template <class Format>
static __device__ __forceinline__ void gemv(const Panels& panels, Input input, float* out, i32 out_cols) {
    float* sums = dynamic_shared<float>();
    const Panel& panel = panels.panel[blockIdx.y];
    if (static_cast<i32>(blockIdx.x) * TILE_ROWS >= panel.n) {
        return;
    }
    multiply_segments<Format>(panels, blockIdx.y, blockIdx.y + 1, input, sums);
    for (i32 i = threadIdx.x; i < TILE; i += blockDim.x) {
        i32 row = i / TILE_ROWS;
        i32 col = blockIdx.x * TILE_ROWS + i % TILE_ROWS;
        if (row < input.rows && col < panel.n) {
            out[static_cast<i64>(row) * out_cols + panel.out_offset + col] = add_segments<Format>(panel, col, sums + i);
        }
    }
}

template <class Format>
static __device__ __forceinline__ void gemv_partials(const Panels& panels, const FoldProgram& program, const Outputs& outputs,
                                                     Input input) {
    float* sums = dynamic_shared<float>();
    multiply_segments<Format>(panels, 0, program.count, input, sums);
    i32 n = panels.panel[0].n;
    for (i32 i = threadIdx.x; i < TILE; i += blockDim.x) {
        i32 row = i / TILE_ROWS;
        i32 col = blockIdx.x * TILE_ROWS + i % TILE_ROWS;
        if (row >= input.rows || col >= n) {
            continue;
        }
        FoldStack<1> stack;
        const float* unit_sums = sums + i;
#pragma unroll 1
        for (i32 unit = 0; unit < program.count; unit++) {
            const Panel& panel = panels.panel[unit];
            float total[1] = {add_segments<Format>(panel, col, unit_sums)};
            unit_sums += ceil_div(panel.k, SEGMENT_K) * TILE;
            stack.push(total);
            stack.merge(program.merges[unit]);
            i32 output = program.store[unit];
            if (output >= 0) {
                outputs.out[output][static_cast<i64>(row) * n + col] = stack.value[0][0];
                stack.pop();
            }
        }
    }
}

#define GEMV(name, Format)                                                                                                  \
    KERNEL(512, 1, gemv_##name,                                                                                             \
           (const __grid_constant__ Panels panels, const u16* x, i32 rows, i32 x_cols, float* out, i32 out_cols)) {         \
        gemv<Format>(panels, Input{x, rows, x_cols}, out, out_cols);                                                        \
    }                                                                                                                       \
    KERNEL(512, 1, gemv_partials_##name,                                                                                    \
           (const __grid_constant__ Panels panels, const __grid_constant__ FoldProgram program,                             \
            const __grid_constant__ Outputs outputs, const u16* x, i32 rows, i32 x_cols)) {                                 \
        gemv_partials<Format>(panels, program, outputs, Input{x, rows, x_cols});                                            \
    }

GEMV(bf16, Bf16)
GEMV(int8, Int8)
GEMV(int4, Int4)
GEMV(fp8, Fp8)
