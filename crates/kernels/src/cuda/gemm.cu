// Matrix products for more than 8 rows of x: tiles of weight rows × rows of x, steps of k on their way to shared memory while
// another is multiplied. Each tile goes through all of its k, segment after segment, so the bits are gemv's.
//
// gemm_FORMAT_tN(panels, x, rows, x_cols, out, out_cols): out[row·out_cols + panel.out_offset + i] f32, for
//   column-parallel matrices (out_offset = the panel's first column), and for the units of row-parallel ones (out_offset = the
//   unit's place in a scratch buffer, out_cols = n; `fold` then adds the units).
// Grid (⌈rows / N⌉ · ⌈largest panel.n / weight rows⌉, panels). Dynamic shared memory in bytes:
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

// A kernel's shape: a block's tile, a warp's part of it, and how many steps of k are in shared memory.
template <i32 TILE_ROWS, i32 TILE_TOKENS, i32 WARP_TILE_ROWS, i32 WARP_TILE_TOKENS, i32 PIPELINE> struct Shape {
    static constexpr i32 ROWS = TILE_ROWS, TOKENS = TILE_TOKENS, WARP_ROWS = WARP_TILE_ROWS, WARP_TOKENS = WARP_TILE_TOKENS;
    static constexpr i32 STAGES = PIPELINE;
    static constexpr i32 THREADS = ROWS / WARP_ROWS * (TOKENS / WARP_TOKENS) * 32;
};

// One step of k in shared memory, as offsets in bytes.
template <class Format, class S> struct Stage {
    static constexpr i32 WEIGHT_BYTES = Format::STEP_K / Format::LINE_K * 64;  // of a row
    static constexpr i32 X_BYTES = Format::STEP_K * 2;                        // of a row
    static constexpr i32 X = S::ROWS * WEIGHT_BYTES;
    static constexpr i32 SCALES = X + S::TOKENS * X_BYTES;
    static constexpr i32 ZEROS = SCALES + (Format::GROUPED ? S::ROWS * 4 : 0);
    static constexpr i32 SIZE = ZEROS + (Format::GROUPED ? S::ROWS : 0);
};

// Where 16 bytes of a row lie. Reading the pieces of one line of 8 rows must meet every bank equally often: where rows are
// 128 bytes apart, odd ones swap lines.
template <i32 BYTES> static __device__ __forceinline__ i32 place_in_tile(i32 row, i32 chunk) {
    return row * BYTES + (BYTES == 64 ? chunk : chunk ^ (row % 2 * 4)) * 16;
}

// Starts copying `BYTES` of each of a tile's rows; zeros where there is no row, or a row has ended.
template <class S, i32 ROWS, i32 BYTES>
static __device__ __forceinline__ void copy_rows(u8* tile, const u8* source, i64 stride, i32 rows_left, i32 bytes_left) {
    constexpr i32 CHUNKS = BYTES / 16;
    constexpr i32 PASS = S::THREADS / CHUNKS;
    i32 first = threadIdx.x / CHUNKS;
    i32 chunk = threadIdx.x % CHUNKS;
    bool in_row = chunk * 16 < bytes_left;
#pragma unroll
    for (i32 i = 0; i < ROWS / PASS; i++) {
        i32 row = first + i * PASS;
        cp_async16(tile + place_in_tile<BYTES>(row, chunk), source + row * stride + chunk * 16, in_row && row < rows_left);
    }
}

// What a block copies from.
template <class Format, class S> struct Source {
    using At = Stage<Format, S>;
    const u8* weights;
    const u8* x;
    const u8* scales;
    const u8* zeros;
    i32 k;
    i32 weight_stride;  // bytes
    i32 x_cols;
    i32 rows_left;
    i32 tokens_left;

    __device__ __forceinline__ void load(i32 step, u8* stage) const {
        i32 k_left = k - step * Format::STEP_K;
        copy_rows<S, S::ROWS, At::WEIGHT_BYTES>(stage, weights + static_cast<i64>(step) * At::WEIGHT_BYTES, weight_stride,
                                               rows_left, weight_stride - step * At::WEIGHT_BYTES);
        copy_rows<S, S::TOKENS, At::X_BYTES>(stage + At::X, x + static_cast<i64>(step) * At::X_BYTES, 2 * static_cast<i64>(x_cols),
                                            tokens_left, 2 * k_left);
        if constexpr (Format::GROUPED) {  // of 16 rows: 64 bytes of scales, 16 of zeros
            i64 groups = ceil_div(k, GROUP_K);
            i32 tile = threadIdx.x / 4;
            bool there = tile * 16 < rows_left;
            if (tile < S::ROWS / 16) {
                cp_async16(stage + At::SCALES + threadIdx.x * 16, scales + (tile * groups + step) * 64 + threadIdx.x % 4 * 16,
                           there);
                if (threadIdx.x % 4 == 0) {
                    cp_async16(stage + At::ZEROS + tile * 16, zeros + (tile * groups + step) * 16, there);
                }
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
static __device__ __forceinline__ void multiply_stage(Sums<S>& sums, const u8* stage, const u32 (&offsets)[Sums<S>::M][2]) {
    using At = Stage<Format, S>;
    constexpr i32 M = Sums<S>::M, N = Sums<S>::N;
    constexpr i32 LINE_BLOCKS = Format::LINE_K / 32;
    i32 t = threadIdx.x % 4;
    i32 row = warp_row<S>() + threadIdx.x % 32 / 4;
    i32 token = warp_token<S>() + threadIdx.x % 32 / 4;
#pragma unroll
    for (i32 line = 0; line < Format::STEP_K / Format::LINE_K; line++) {
        uint4 weights[M][2];
#pragma unroll
        for (i32 m = 0; m < M; m++) {
            weights[m][0] = load16(stage + place_in_tile<At::WEIGHT_BYTES>(row + m * 16, line * 4 + t));
            weights[m][1] = load16(stage + place_in_tile<At::WEIGHT_BYTES>(row + m * 16 + 8, line * 4 + t));
        }
#pragma unroll
        for (i32 block = 0; block < LINE_BLOCKS; block++) {
            uint4 x[N];
#pragma unroll
            for (i32 n = 0; n < N; n++) {
                i32 chunk = (line * LINE_BLOCKS + block) * 4 + t;
                x[n] = load16(stage + At::X + place_in_tile<At::X_BYTES>(token + n * 8, chunk));
            }
#pragma unroll
            for (i32 m = 0; m < M; m++) {
                uint4 top = Format::widen(weights[m][0], block, offsets[m][0]);
                uint4 bottom = Format::widen(weights[m][1], block, offsets[m][1]);
#pragma unroll
                for (i32 n = 0; n < N; n++) {
                    multiply_block(sums.at[m][n], top, bottom, x[n]);
                }
            }
        }
    }
}

// segment += the stage's weights · x; a stage of a grouped format is one group.
template <class Format, class S> static __device__ __forceinline__ void add_stage(Sums<S>& segment, const u8* stage) {
    using At = Stage<Format, S>;
    constexpr i32 M = Sums<S>::M, N = Sums<S>::N;
    u32 offsets[M][2] = {};
    if constexpr (!Format::GROUPED) {
        multiply_stage<Format, S>(segment, stage, offsets);
    } else {
        i32 g = threadIdx.x % 32 / 4;
#pragma unroll
        for (i32 m = 0; m < M; m++) {
            u32 zeros = *reinterpret_cast<const u16*>(stage + At::ZEROS + warp_row<S>() + m * 16 + g * 2);
            offsets[m][0] = Format::offset(zeros & 0xff);
            offsets[m][1] = Format::offset(zeros >> 8);
        }
        Sums<S> group;
        group.fill(0.0f);
        multiply_stage<Format, S>(group, stage, offsets);
#pragma unroll
        for (i32 m = 0; m < M; m++) {
            float2 scale = *reinterpret_cast<const float2*>(stage + At::SCALES + (warp_row<S>() + m * 16 + g * 2) * 4);
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

    Source<Format, S> source;
    source.k = panel.k;
    source.weight_stride = row_bytes<Format>(panel.k);
    source.x_cols = x_cols;
    source.rows_left = panel.n - first_row;
    source.tokens_left = rows - first_token;
    source.weights = panel.weights + static_cast<i64>(first_row) * source.weight_stride;
    source.x = reinterpret_cast<const u8*>(x + static_cast<i64>(first_token) * x_cols + panel.x_offset);
    i64 scales = static_cast<i64>(first_row) * ceil_div(panel.k, GROUP_K);
    source.scales = reinterpret_cast<const u8*>(panel.scales + scales);
    source.zeros = panel.zeros + scales;

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
