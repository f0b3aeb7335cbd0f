// Matrix products for more than 8 rows of x: tiles of weight rows × rows of x, steps of k on their way to shared memory while
// another is multiplied. Each tile goes through all of its k, segment after segment, so the bits are gemv's.
//
// gemm_FORMAT_tN(panels, x, rows, x_cols, out, out_cols): out[row·out_cols + panel.out_offset + i] f32, for
//   column-parallel matrices (out_offset = the panel's first column), and for the units of row-parallel ones (out_offset = the
//   unit's place in a scratch buffer, out_cols = n; `fold` then adds the units).
// Grid (⌈rows / N⌉ · ⌈largest panel.n / weight rows⌉, panels). Dynamic shared memory in bytes (above 48 KiB the function's
// attribute must be set):
//
//   kernel  rows of x (N)  weight rows  threads    bf16    int8    fp8     int4
//   _t16         16            64         128     40960   50432   49152   34048
//   _t32         32            64         128     49152   50112   49152   37824
//   _t64         64            64         128     65536   74688   73728   62400
//   _t128       128        64 (bf16 128)  256     98304  123840  122880  111552
//
//   panels: by value, see weights.cuh. x: bf16 [rows][x_cols], aligned to 16 bytes, x_cols % 8 == 0, panel.x_offset % 8 == 0.
//   Any N gives the same bits. N = 64 serves where a device has too little shared memory for N = 128.
#include "weights.cuh"

static constexpr i32 BAND = 16;  // tiles of rows of x that meet all weights together: their x stays in L2

// A kernel's shape: weight rows and rows of x of a block and of a warp, and how many steps of k are in shared memory.
template <i32 BLOCK_M, i32 BLOCK_N, i32 WARP_M, i32 WARP_N, i32 PIPELINE> struct Shape {
    static constexpr i32 ROWS = BLOCK_M, TOKENS = BLOCK_N, WARP_ROWS = WARP_M, WARP_TOKENS = WARP_N, STAGES = PIPELINE;
    static constexpr i32 THREADS = ROWS / WARP_ROWS * (TOKENS / WARP_TOKENS) * 32;
};

// One step of k in shared memory, as offsets in bytes: the weights' tiles as they lie in memory, x row by row, and for grouped
// formats the tiles' scales and zeros.
template <class Format, class S> struct Stage {
    static constexpr i32 LINES = Format::STEP_K / Format::LINE_K;
    static constexpr i32 TILE_BYTES = LINES * LINE_BYTES;
    static constexpr i32 X_BYTES = Format::STEP_K * 2;  // of a row
    static constexpr i32 X = S::ROWS / TILE_ROWS * TILE_BYTES;
    static constexpr i32 SCALES = X + S::TOKENS * X_BYTES;
    static constexpr i32 ZEROS = SCALES + (Format::GROUPED ? S::ROWS * 4 : 0);
    static constexpr i32 SIZE = ZEROS + (Format::GROUPED ? S::ROWS : 0);
};

// Where 16 bytes of a row of x lie. A quarter of a warp reads 64 bytes of two neighbouring rows: odd rows swap halves of 128
// bytes, so that these meet every bank once.
template <i32 BYTES> static __device__ __forceinline__ i32 place_of_x(i32 row, i32 chunk) {
    return row * BYTES + (chunk ^ (row % 2 * 4)) * 16;
}

// What a block copies from.
template <class Format, class S> struct Source {
    using At = Stage<Format, S>;
    const u8* weights;  // of the block's first tile
    const u16* x;       // of the block's first row
    const float* scales;
    const u8* zeros;
    i32 k;
    i32 x_cols;
    i32 tiles_left;
    i32 tokens_left;

    __device__ __forceinline__ void load(i32 step, u8* stage) const {
        load_weights(step, stage);
        load_x(step, stage + At::X);
        if constexpr (Format::GROUPED) {
            load_scales(step, stage);
        }
    }

    __device__ __forceinline__ void load_weights(i32 step, u8* to) const {
        constexpr i32 TILE_CHUNKS = At::TILE_BYTES / 16;
        const u8* from = weights + static_cast<i64>(step) * At::TILE_BYTES;
#pragma unroll
        for (i32 i = 0; i < S::ROWS / TILE_ROWS * TILE_CHUNKS / S::THREADS; i++) {
            i32 chunk = i * S::THREADS + threadIdx.x;
            i32 tile = chunk / TILE_CHUNKS;
            cp_async16(to + chunk * 16, from + tile * tile_bytes<Format>(k) + chunk % TILE_CHUNKS * 16, tile < tiles_left);
        }
    }

    // Zeros beyond k and beyond the last row.
    __device__ __forceinline__ void load_x(i32 step, u8* to) const {
        constexpr i32 ROW_CHUNKS = At::X_BYTES / 16;
        constexpr i32 PASS = S::THREADS / ROW_CHUNKS;
        i32 first = threadIdx.x / ROW_CHUNKS;
        i32 chunk = threadIdx.x % ROW_CHUNKS;
        i32 col = step * Format::STEP_K + chunk * 8;
#pragma unroll
        for (i32 i = 0; i < S::TOKENS / PASS; i++) {
            i32 row = first + i * PASS;
            cp_async16(to + place_of_x<At::X_BYTES>(row, chunk), x + static_cast<i64>(row) * x_cols + col,
                       col < k && row < tokens_left);
        }
    }

    // Of each tile 64 bytes of scales and 16 of zeros; a step is a group.
    __device__ __forceinline__ void load_scales(i32 step, u8* stage) const {
        i32 tile = threadIdx.x / 4;
        i32 quarter = threadIdx.x % 4;
        if (tile < S::ROWS / TILE_ROWS) {
            i64 first = (static_cast<i64>(tile) * ceil_div(k, GROUP_K) + step) * TILE_ROWS;
            cp_async16(stage + At::SCALES + threadIdx.x * 16, scales + first + quarter * 4, tile < tiles_left);
            if (quarter == 0) {
                cp_async16(stage + At::ZEROS + tile * 16, zeros + first, tile < tiles_left);
            }
        }
    }
};

// A warp's sums: of each 16 weight rows and 8 rows of x.
template <class S> struct Sums {
    static constexpr i32 M = S::WARP_ROWS / 16, N = S::WARP_TOKENS / 8;
    float at[M][N][4];

    __device__ __forceinline__ void fill(float value) {
#pragma unroll
        for (i32 m = 0; m < M; m++) {
#pragma unroll
            for (i32 n = 0; n < N; n++) {
#pragma unroll
                for (i32 i = 0; i < 4; i++) {
                    at[m][n][i] = value;
                }
            }
        }
    }

    __device__ __forceinline__ void add(const Sums& other) {
#pragma unroll
        for (i32 m = 0; m < M; m++) {
#pragma unroll
            for (i32 n = 0; n < N; n++) {
#pragma unroll
                for (i32 i = 0; i < 4; i++) {
                    at[m][n][i] += other.at[m][n][i];
                }
            }
        }
    }
};

// Where a warp's part of the tile begins.
template <class S> static __device__ __forceinline__ i32 warp_row() {
    return threadIdx.x / 32 % (S::ROWS / S::WARP_ROWS) * S::WARP_ROWS;
}

template <class S> static __device__ __forceinline__ i32 warp_token() {
    return threadIdx.x / 32 / (S::ROWS / S::WARP_ROWS) * S::WARP_TOKENS;
}

// sums += the stage's weights · x.
template <class Format, class S>
static __device__ __forceinline__ void multiply_stage(Sums<S>& sums, const u8* stage, const Offsets (&offsets)[Sums<S>::M]) {
    using At = Stage<Format, S>;
    constexpr i32 M = Sums<S>::M, N = Sums<S>::N;
    constexpr i32 LINE_BLOCKS = Format::LINE_K / 32;
    i32 lane = threadIdx.x % 32;
    const u8* tiles = stage + warp_row<S>() / TILE_ROWS * At::TILE_BYTES + lane * 16;
    i32 token = warp_token<S>() + lane / 4;
#pragma unroll
    for (i32 line = 0; line < At::LINES; line++) {
        uint4 pieces[M][2];
#pragma unroll
        for (i32 m = 0; m < M; m++) {
            pieces[m][0] = load16(tiles + m * At::TILE_BYTES + line * LINE_BYTES);
            pieces[m][1] = load16(tiles + m * At::TILE_BYTES + line * LINE_BYTES + LINE_BYTES / 2);
        }
#pragma unroll
        for (i32 block = 0; block < LINE_BLOCKS; block++) {
            uint4 x[N];
#pragma unroll
            for (i32 n = 0; n < N; n++) {
                i32 chunk = (line * LINE_BLOCKS + block) * 4 + lane % 4;
                x[n] = load16(stage + At::X + place_of_x<At::X_BYTES>(token + n * 8, chunk));
            }
#pragma unroll
            for (i32 m = 0; m < M; m++) {
                Fragment weights = Format::fragment(pieces[m], block, offsets[m]);
#pragma unroll
                for (i32 n = 0; n < N; n++) {
                    multiply_block(sums.at[m][n], weights, x[n]);
                }
            }
        }
    }
}

// segment += the stage's weights · x; a stage of a grouped format is one group.
template <class Format, class S> static __device__ __forceinline__ void add_stage(Sums<S>& segment, const u8* stage) {
    using At = Stage<Format, S>;
    constexpr i32 M = Sums<S>::M, N = Sums<S>::N;
    Offsets offsets[M] = {};
    if constexpr (!Format::GROUPED) {
        multiply_stage<Format, S>(segment, stage, offsets);
    } else {
        i32 first = warp_row<S>() + threadIdx.x % 32 / 4 * 2;
#pragma unroll
        for (i32 m = 0; m < M; m++) {
            u32 zeros = *reinterpret_cast<const u16*>(stage + At::ZEROS + first + m * TILE_ROWS);
            offsets[m] = {Format::offset(zeros & 0xff), Format::offset(zeros >> 8)};
        }
        Sums<S> group;
        group.fill(0.0f);
        multiply_stage<Format, S>(group, stage, offsets);
#pragma unroll
        for (i32 m = 0; m < M; m++) {
            float2 scale = *reinterpret_cast<const float2*>(stage + At::SCALES + (first + m * TILE_ROWS) * 4);
#pragma unroll
            for (i32 n = 0; n < N; n++) {
                add_group(segment.at[m][n], scale.x, scale.y, group.at[m][n]);
            }
        }
    }
}

// This lane's results of the warp's part.
template <class Format, class S>
static __device__ __forceinline__ void write(const Panel& panel, const Sums<S>& total, i32 first_row, i32 first_token, i32 rows,
                                             float* out, i32 out_cols) {
#pragma unroll
    for (i32 m = 0; m < Sums<S>::M; m++) {
#pragma unroll
        for (i32 half = 0; half < 2; half++) {
            i32 row = first_row + warp_row<S>() + m * 16 + half * 8 + threadIdx.x % 32 / 4;
            if (row >= panel.n) {
                continue;
            }
            float scale = 1.0f;
            if constexpr (Format::ROW_SCALED) {
                scale = panel.scales[row];
            }
#pragma unroll
            for (i32 n = 0; n < Sums<S>::N; n++) {
#pragma unroll
                for (i32 i = 0; i < 2; i++) {
                    i32 token = first_token + warp_token<S>() + n * 8 + threadIdx.x % 4 * 2 + i;
                    if (token < rows) {
                        float sum = total.at[m][n][half * 2 + i];
                        out[static_cast<i64>(token) * out_cols + panel.out_offset + row] = Format::ROW_SCALED ? sum * scale : sum;
                    }
                }
            }
        }
    }
}

template <class Format, class S>
static __device__ __forceinline__ void gemm(const Panel& panel, const u16* x, i32 rows, i32 x_cols, float* out, i32 out_cols) {
    using At = Stage<Format, S>;
    constexpr i32 SEGMENT_STEPS = SEGMENT_K / Format::STEP_K;
    // Blocks run about in the order of their index: a few token tiles with all row tiles, then the next few.
    i32 token_tiles = ceil_div(rows, S::TOKENS);
    i32 row_tiles = gridDim.x / token_tiles;
    i32 band = blockIdx.x / (BAND * row_tiles) * BAND;
    i32 in_band = blockIdx.x - band * row_tiles;
    i32 band_tiles = token_tiles - band < BAND ? token_tiles - band : BAND;
    i32 first_row = in_band / band_tiles * S::ROWS;
    i32 first_token = (band + in_band % band_tiles) * S::TOKENS;
    if (first_row >= panel.n) {
        return;
    }

    i32 first_tile = first_row / TILE_ROWS;
    i64 first_scale = static_cast<i64>(first_row) * ceil_div(panel.k, GROUP_K);
    Source<Format, S> source = {panel.weights + first_tile * tile_bytes<Format>(panel.k),
                                x + static_cast<i64>(first_token) * x_cols + panel.x_offset,
                                panel.scales + first_scale,
                                panel.zeros + first_scale,
                                panel.k,
                                x_cols,
                                ceil_div(panel.n, TILE_ROWS) - first_tile,
                                rows - first_token};
    u8* shared = dynamic_shared<u8>();
    i32 steps = ceil_div(panel.k, Format::STEP_K);
#pragma unroll
    for (i32 step = 0; step + 1 < S::STAGES; step++) {
        if (step < steps) {
            source.load(step, shared + step * At::SIZE);
        }
        cp_async_commit();
    }
    Sums<S> segment;
    Sums<S> total;
    segment.fill(0.0f);
    total.fill(NOTHING);
    i32 stage = 0;
    i32 loading = S::STAGES - 1;
#pragma unroll 1
    for (i32 step = 0; step < steps; step++) {
        cp_async_wait<S::STAGES - 2>();
        __syncthreads();  // all copies of this stage are there, and all have left the one that is loaded next
        if (step + S::STAGES - 1 < steps) {
            source.load(step + S::STAGES - 1, shared + loading * At::SIZE);
        }
        cp_async_commit();
        add_stage<Format, S>(segment, shared + stage * At::SIZE);
        if ((step + 1) % SEGMENT_STEPS == 0 || step + 1 == steps) {
            total.add(segment);
            segment.fill(0.0f);
        }
        stage = stage + 1 == S::STAGES ? 0 : stage + 1;
        loading = loading + 1 == S::STAGES ? 0 : loading + 1;
    }
    write<Format, S>(panel, total, first_row, first_token, rows, out, out_cols);
}

#define GEMM(name, Format, blocks, ROWS, TOKENS, WARP_ROWS, WARP_TOKENS, STAGES)                                            \
    KERNEL((Shape<ROWS, TOKENS, WARP_ROWS, WARP_TOKENS, STAGES>::THREADS), blocks, gemm_##name##_t##TOKENS,                 \
           (const __grid_constant__ Panels panels, const u16* x, i32 rows, i32 x_cols, float* out, i32 out_cols)) {         \
        using S = Shape<ROWS, TOKENS, WARP_ROWS, WARP_TOKENS, STAGES>;                                                      \
        gemm<Format, S>(panels.panel[blockIdx.y], x, rows, x_cols, out, out_cols);                                          \
    }

#define GEMM_QUANTISED(name, Format)          \
    GEMM(name, Format, 3, 64, 16, 16, 16, 4)  \
    GEMM(name, Format, 3, 64, 32, 16, 32, 3)  \
    GEMM(name, Format, 2, 64, 64, 32, 32, 3)  \
    GEMM(name, Format, 1, 64, 128, 32, 32, 3)

GEMM(bf16, Bf16, 4, 64, 16, 16, 16, 4)
GEMM(bf16, Bf16, 4, 64, 32, 16, 32, 4)
GEMM(bf16, Bf16, 3, 64, 64, 32, 32, 4)
GEMM(bf16, Bf16, 1, 128, 128, 64, 32, 3)
GEMM_QUANTISED(int8, Int8)
GEMM_QUANTISED(int4, Int4)
GEMM_QUANTISED(fp8, Fp8)
