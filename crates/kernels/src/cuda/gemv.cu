// Matrix products for 1 to 8 rows of x, alone or added along the reduction tree. Bound by the bandwidth of the weights: these go
// through a ring in shared memory, so that much is on its way without taking registers, and a multiprocessor has warps enough. Blocks
// stay: a block's weights keep coming while it turns from one tile to the next, and the first of them before the step's kernels that
// it must wait for have ended.
//
// gemv_FORMAT(panels, count, tiles, segments, x, rows, x_cols, out, out_cols): column-parallel,
//   out[row·out_cols + panel.out_offset + i].   FORMAT is bf16, int8, int4 or fp8.
// gemv_partials_FORMAT(panels, program, outputs, tiles, segments, x, rows, x_cols): row-parallel. Panels are the units in order,
//   all of the same n; each unit's product is a leaf of the tree; outputs.out[j] f32 [rows][n].
//
// Grid: any number of blocks, best as many as there is room for. Block: 32 threads × warps, 1 to 8, which share a tile's segments;
// warps beyond their number would idle. Dynamic shared memory: segments × rows × 64 bytes, then the warps' rings: 4 KiB each, int8
// 5 KiB, int4 3 KiB.
//
//   panels: by value, see weights.cuh; out_offset matters to gemv_FORMAT alone. program, outputs: by value, see tree.cuh.
//   count: panels. tiles: of 16 weight rows, of the largest panel. segments: of 512 k, of the largest panel, or for partials of all.
//   x: bf16 [rows][x_cols], aligned to 16 bytes, x_cols % 8 == 0 and panel.x_offset % 8 == 0. rows: 1..8.
#include "tree.cuh"
#include "weights.cuh"

static constexpr i32 AHEAD = 2;  // steps of a warp's weights that are on their way

struct Input {
    const u16* x;
    i32 rows;
    i32 cols;
};

// What is shared out among the grid's blocks: tiles of panels, or, where panels are SUMMED, tiles of all of them together.
template <bool SUMMED> struct Items {
    const Panels& panels;
    i32 count;  // panels
    i32 tiles;  // of the largest panel
};

// One of a block's items.
template <bool SUMMED> struct Item {
    i32 tile;
    i32 panel;  // its first

    // The block's first.
    __device__ __forceinline__ explicit Item(const Items<SUMMED>& items) : tile(blockIdx.x), panel(0) {
        settle(items);
    }

    __device__ __forceinline__ void advance(const Items<SUMMED>& items) {
        tile += gridDim.x;
        settle(items);
    }

    __device__ __forceinline__ bool exists(const Items<SUMMED>& items) const {
        return SUMMED ? tile < items.tiles : panel < items.count;
    }

    __device__ __forceinline__ bool is(const Item& other) const {
        return tile == other.tile && (SUMMED || panel == other.panel);
    }

  private:
    // Goes on to a tile that the panel has.
    __device__ __forceinline__ void settle(const Items<SUMMED>& items) {
        while (!SUMMED && panel < items.count) {
            if (tile >= items.tiles) {
                tile -= items.tiles;
                panel++;
            } else if (tile * TILE_ROWS >= items.panels.panel[panel].n) {
                tile += gridDim.x;
            } else {
                return;
            }
        }
    }
};

// Where a warp is: at a segment of one of its block's items, or at the end of all.
template <bool SUMMED> struct Place {
    Item<SUMMED> item;
    i32 panel;
    i32 k;  // its first

    // The warp's first segment.
    __device__ __forceinline__ explicit Place(const Items<SUMMED>& items) : item(items) {
        enter();
        settle(items);
    }

    // Goes on by so many segments.
    __device__ __forceinline__ void advance(const Items<SUMMED>& items, i32 segments) {
        k += segments * SEGMENT_K;
        settle(items);
    }

  private:
    __device__ __forceinline__ void enter() {
        panel = item.panel;
        k = static_cast<i32>(threadIdx.x) / 32 * SEGMENT_K;
    }

    // From k, which may be beyond the panel's end, to the segment that it means.
    __device__ __forceinline__ void settle(const Items<SUMMED>& items) {
        while (item.exists(items)) {
            i32 end = round_up(items.panels.panel[panel].k, SEGMENT_K);
            if (k < end) {
                return;
            }
            k -= end;
            panel++;
            if (!SUMMED || panel == items.count) {
                item.advance(items);
                enter();
            }
        }
    }
};

// A warp's weights in one step, each lane's for itself alone: two pieces of each line, and of a grouped format the scales of the
// lane's rows g and g + 8 (x, y), and zeros (z).
template <class Format> struct Lines {
    static constexpr i32 COUNT = Format::STEP_K / Format::LINE_K;
    uint4 piece[2 * COUNT + (Format::GROUPED ? 1 : 0)][32];
};

// Where a lane finds the weights of a segment.
template <class Format> struct Source {
    const u8* weights;
    i32 panel;
    i32 group;  // the segment's first, of the panel's in their order in memory
    i32 steps;  // to the end of the panel; 0 where there is no segment

    template <bool SUMMED> __device__ __forceinline__ Source(const Items<SUMMED>& items, const Place<SUMMED>& place) {
        weights = nullptr;
        panel = group = steps = 0;
        if (!place.item.exists(items)) {
            return;
        }
        panel = place.panel;
        const Panel& source = items.panels.panel[panel];
        i32 lane = threadIdx.x % 32;
        weights = source.weights + place.item.tile * tile_bytes<Format>(source.k) + place.k / Format::LINE_K * LINE_BYTES + lane * 16;
        steps = ceil_div(source.k - place.k, Format::STEP_K);
        if constexpr (Format::GROUPED) {
            group = place.item.tile * ceil_div(source.k, GROUP_K) + place.k / GROUP_K;
        }
    }

    // A step that there is not has nothing, but is counted too.
    __device__ __forceinline__ void begin(const Panels& panels, i32 step, Lines<Format>& lines) const {
        if (step < steps) {
            i32 lane = threadIdx.x % 32;
#pragma unroll
            for (i32 i = 0; i < Lines<Format>::COUNT; i++) {
                const u8* line = weights + (step * Lines<Format>::COUNT + i) * LINE_BYTES;
                cp_async16(&lines.piece[2 * i][lane], line, true);
                cp_async16(&lines.piece[2 * i + 1][lane], line + LINE_BYTES / 2, true);
            }
            if constexpr (Format::GROUPED) {
                uint4& to = lines.piece[2 * Lines<Format>::COUNT][lane];
                i32 row = (group + step) * TILE_ROWS;
                cp_async_small<8>(&to.x, panels.panel[panel].scales + row + lane / 4 * 2);
                cp_async_small<4>(&to.z, panels.panel[panel].zeros + row + lane / 8 * 4);
            }
        }
        cp_async_commit();
    }
};

// sum += the step's weights · x, where this lane's row of x has `left` values from `x` on; all of them if it is WHOLE.
template <class Format, bool WHOLE>
static __device__ __forceinline__ void multiply_step(float (&sum)[4], const Lines<Format>& lines, u32 zeros, const u16* x, i32 left) {
    constexpr i32 LINE_BLOCKS = Format::LINE_K / 32;
    i32 lane = threadIdx.x % 32;
    Offsets offsets = {0, 0};
    if constexpr (Format::GROUPED) {
        zeros >>= lane / 4 % 2 * 16;
        offsets = {Format::offset(zeros & 0xff), Format::offset(zeros >> 8 & 0xff)};
    }
#pragma unroll
    for (i32 line = 0; line < Lines<Format>::COUNT; line++) {
        uint4 pieces[2] = {load16(&lines.piece[2 * line][lane]), load16(&lines.piece[2 * line + 1][lane])};
#pragma unroll
        for (i32 block = 0; block < LINE_BLOCKS; block++) {
            i32 k = line * Format::LINE_K + block * 32;
            uint4 tokens = WHOLE || k < left ? load16(x + k) : make_uint4(0, 0, 0, 0);
            multiply_block(sum, Format::fragment(pieces, block, offsets), tokens);
        }
    }
}

// Adds a step to a segment's sums when its weights are there. `left`: values of the segment from `x` on, if it is not WHOLE.
template <class Format, bool WHOLE>
static __device__ __forceinline__ void take_step(float (&segment)[4], const Lines<Format>& lines, const u16* x, i32 left) {
    cp_async_wait<AHEAD - 1>();
    if (!WHOLE && left <= 0) {
        return;
    }
    left -= threadIdx.x % 4 * 8;
    if constexpr (Format::GROUPED) {
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        uint4 group = load16(&lines.piece[2 * Lines<Format>::COUNT][threadIdx.x % 32]);
        multiply_step<Format, WHOLE>(sum, lines, group.z, x, left);
        add_group(segment, __uint_as_float(group.x), __uint_as_float(group.y), sum);
    } else {
        multiply_step<Format, WHOLE>(segment, lines, 0, x, left);
    }
}

// A segment's sums. Each step makes room for the one that comes AHEAD steps later: when those of this segment are on their way,
// `source` turns to the following one.
template <class Format, class TurnToFollowing>
static __device__ __forceinline__ void multiply_segment(const Panels& panels, float (&segment)[4], Lines<Format>* ring,
                                                        const Source<Format>& source, const TurnToFollowing& turn_to_following,
                                                        const u16* x, i32 left) {
    constexpr i32 STEPS = SEGMENT_K / Format::STEP_K;
    auto make_room = [&](i32 step) {
        if (step == STEPS - AHEAD) {
            turn_to_following();
        }
        source.begin(panels, (step + AHEAD) % STEPS, ring[step % AHEAD]);
    };
    if (left >= SEGMENT_K) {
#pragma unroll 2
        for (i32 step = 0; step < STEPS; step++) {
            take_step<Format, true>(segment, ring[step % AHEAD], x + step * Format::STEP_K, 0);
            make_room(step);
        }
    } else {
#pragma unroll 1
        for (i32 step = 0; step < STEPS; step++) {
            take_step<Format, false>(segment, ring[step % AHEAD], x + step * Format::STEP_K, left - step * Format::STEP_K);
            make_room(step);
        }
    }
}

// The panel's result for a weight row: its segments, in ascending order.
template <class Format>
static __device__ __forceinline__ float add_segments(const Panel& panel, i32 weight_row, const float* sums, i32 stride) {
    float total = NOTHING;
    for (i32 k = 0; k < panel.k; k += SEGMENT_K) {
        total += *sums;
        sums += stride;
    }
    if constexpr (Format::ROW_SCALED) {
        total *= panel.scales[weight_row];
    }
    return total;
}

// Has `finish` take each item when its sums[segment][row of x][weight row], of all segments of its panels, are in shared memory.
template <class Format, bool SUMMED, class Finish>
static __device__ __forceinline__ void multiply(const Items<SUMMED>& items, i32 segments, Input input, const Finish& finish) {
    i32 warps = blockDim.x / 32;
    i32 warp = threadIdx.x / 32;
    i32 g = threadIdx.x % 32 / 4;
    i32 t = threadIdx.x % 4;
    i32 stride = input.rows * TILE_ROWS;
    float* sums = dynamic_shared<float>();
    Lines<Format>* ring = reinterpret_cast<Lines<Format>*>(sums + segments * stride) + warp * AHEAD;
    Place<SUMMED> place(items);
    Source<Format> source(items, place);
#pragma unroll
    for (i32 step = 0; step < AHEAD; step++) {
        source.begin(items.panels, step, ring[step]);
    }
    after_previous();
    // Rows that there are not may be any: their results are not used.
    const u16* x = input.x + static_cast<i64>(min(g, input.rows - 1)) * input.cols + 8 * t;
    Item<SUMMED> item(items);
#pragma unroll 1
    while (item.exists(items)) {
#pragma unroll 1
        for (i32 index = warp; place.item.is(item); index += warps) {
            const Panel& panel = items.panels.panel[place.panel];
            i32 left = panel.k - place.k;
            const u16* from = x + panel.x_offset + place.k;
            float segment[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            auto turn_to_following = [&]() {
                place.advance(items, warps);
                source = Source<Format>(items, place);
            };
            multiply_segment(items.panels, segment, ring, source, turn_to_following, from, left);
            float* out = sums + index * stride + 2 * t * TILE_ROWS + g;
            if (2 * t < input.rows) {
                out[0] = segment[0];
                out[8] = segment[2];
            }
            if (2 * t + 1 < input.rows) {
                out[TILE_ROWS] = segment[1];
                out[TILE_ROWS + 8] = segment[3];
            }
        }
        __syncthreads();
        for (i32 i = threadIdx.x; i < stride; i += blockDim.x) {
            finish(item.panel, item.tile * TILE_ROWS + i % TILE_ROWS, i / TILE_ROWS, sums + i, stride);
        }
        __syncthreads();
        item.advance(items);
    }
}

template <class Format>
static __device__ __forceinline__ void gemv(const Panels& panels, i32 count, i32 tiles, i32 segments, Input input, float* out,
                                            i32 out_cols) {
    auto finish = [&](i32 index, i32 col, i32 row, const float* sums, i32 stride) {
        const Panel& panel = panels.panel[index];
        if (col < panel.n) {
            out[static_cast<i64>(row) * out_cols + panel.out_offset + col] = add_segments<Format>(panel, col, sums, stride);
        }
    };
    multiply<Format>(Items<false>{panels, count, tiles}, segments, input, finish);
}

template <class Format>
static __device__ __forceinline__ void gemv_partials(const Panels& panels, const FoldProgram& program, const Outputs& outputs, i32 tiles,
                                                     i32 segments, Input input) {
    i32 n = panels.panel[0].n;
    auto finish = [&](i32, i32 col, i32 row, const float* sums, i32 stride) {
        if (col >= n) {
            return;
        }
        FoldStack<1> stack;
#pragma unroll 1
        for (i32 unit = 0; unit < program.count; unit++) {
            const Panel& panel = panels.panel[unit];
            float total[1] = {add_segments<Format>(panel, col, sums, stride)};
            sums += ceil_div(panel.k, SEGMENT_K) * stride;
            stack.push(total);
            stack.merge(program.merges[unit]);
            i32 output = program.store[unit];
            if (output >= 0) {
                outputs.out[output][static_cast<i64>(row) * n + col] = stack.value[0][0];
                stack.pop();
            }
        }
    };
    multiply<Format>(Items<true>{panels, program.count, tiles}, segments, input, finish);
}

// Registers are kept to what leaves room for so many blocks of 8 warps; one more, and the compiler spills a few.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
static constexpr i32 INT4_BLOCKS = 3;
#else
static constexpr i32 INT4_BLOCKS = 4;
#endif

#define GEMV(name, Format, BLOCKS, PARTIALS_BLOCKS)                                                                          \
    KERNEL(256, BLOCKS, gemv_##name,                                                                                        \
           (const __grid_constant__ Panels panels, i32 count, i32 tiles, i32 segments, const u16* x, i32 rows, i32 x_cols,  \
            float* out, i32 out_cols)) {                                                                                    \
        gemv<Format>(panels, count, tiles, segments, Input{x, rows, x_cols}, out, out_cols);                                \
    }                                                                                                                       \
    KERNEL(256, PARTIALS_BLOCKS, gemv_partials_##name,                                                                      \
           (const __grid_constant__ Panels panels, const __grid_constant__ FoldProgram program,                             \
            const __grid_constant__ Outputs outputs, i32 tiles, i32 segments, const u16* x, i32 rows, i32 x_cols)) {        \
        gemv_partials<Format>(panels, program, outputs, tiles, segments, Input{x, rows, x_cols});                           \
    }

GEMV(bf16, Bf16, 4, 4)
GEMV(int8, Int8, 4, 3)
GEMV(int4, Int4, INT4_BLOCKS, INT4_BLOCKS)
GEMV(fp8, Fp8, 4, 4)
