// Brings weights from the order of weights.cuh into rows of bf16, for products by cuBLASLt.
//
// unpack_FORMAT(panel, first_row, rows, out, stride): out[i·stride + col] = element [first_row + i][col] of the panel, for
//   i < rows and col < panel.k; FORMAT is bf16, int8, int4 or fp8. Block 256, grid ⌈tiles with a row of those · lines · 32 / 256⌉.
//   out: bf16, aligned to 16 bytes, stride % 8 == 0. panel: its weights, scales, zeros, n and k; first_row + rows <= n.
//
// bf16 comes out as it is. Of the others an element is value times scale, rounded to bf16: the kernels that multiply packed weights
// apply scales to sums instead and round nothing, so products of what comes out here are not theirs bit for bit.
#include "weights.cuh"

static constexpr i32 THREADS = 256;

static __device__ __forceinline__ u32 scaled(u32 pair, float scale) {
    return pack_bf16x2(low_bf16(pair) * scale, high_bf16(pair) * scale);
}

static __device__ __forceinline__ uint4 scaled(uint4 v, float scale) {
    return make_uint4(scaled(v.x, scale), scaled(v.y, scale), scaled(v.z, scale), scaled(v.w, scale));
}

template <class Format>
static __device__ __forceinline__ void unpack(const Panel& panel, i32 first_row, i32 rows, u16* out, i32 stride) {
    i32 lines = static_cast<i32>(tile_bytes<Format>(panel.k) / LINE_BYTES);
    i32 index = blockIdx.x * THREADS + threadIdx.x;
    i32 lane = index % 32;
    i32 line = index / 32 % lines;
    i32 tile = first_row / TILE_ROWS + index / 32 / lines;
    if (tile * TILE_ROWS >= first_row + rows) {
        return;
    }
    i32 top = tile * TILE_ROWS + lane / 4 - first_row;  // of the rows of `out`
    bool has_top = top >= 0 && top < rows;
    bool has_bottom = top + 8 >= 0 && top + 8 < rows;
    const u8* at = panel.weights + tile * tile_bytes<Format>(panel.k) + line * LINE_BYTES + lane * 16;
    uint4 pieces[2] = {load_stream16(at), load_stream16(at + LINE_BYTES / 2)};
    float2 scale = make_float2(1.0f, 1.0f);
    Offsets offsets = {0, 0};
    if constexpr (Format::GROUPED) {
        i32 group = line * Format::LINE_K / GROUP_K;
        i64 first = (static_cast<i64>(tile) * ceil_div(panel.k, GROUP_K) + group) * TILE_ROWS + lane / 4 * 2;
        scale = *reinterpret_cast<const float2*>(panel.scales + first);
        u32 zeros = *reinterpret_cast<const u16*>(panel.zeros + first);
        offsets = {Format::offset(zeros & 0xff), Format::offset(zeros >> 8)};
    }
    if constexpr (Format::ROW_SCALED) {
        scale.x = has_top ? panel.scales[first_row + top] : 0.0f;
        scale.y = has_bottom ? panel.scales[first_row + top + 8] : 0.0f;
    }
#pragma unroll
    for (i32 block = 0; block < Format::LINE_K / 32; block++) {
        i32 col = line * Format::LINE_K + block * 32 + lane % 4 * 8;
        if (col >= panel.k) {
            break;
        }
        Fragment values = Format::fragment(pieces, block, offsets);
        uint4 of_top = make_uint4(values.first.x, values.first.z, values.second.x, values.second.z);
        uint4 of_bottom = make_uint4(values.first.y, values.first.w, values.second.y, values.second.w);
        if constexpr (Format::GROUPED || Format::ROW_SCALED) {
            of_top = scaled(of_top, scale.x);
            of_bottom = scaled(of_bottom, scale.y);
        }
        u16* to = out + static_cast<i64>(top) * stride + col;
        if (has_top) {
            store16(to, of_top);
        }
        if (has_bottom) {
            store16(to + static_cast<i64>(8) * stride, of_bottom);
        }
    }
}

#define UNPACK(name, Format)                                                                                       \
    KERNEL(256, 4, unpack_##name, (const Panel panel, i32 first_row, i32 rows, u16* out, i32 stride)) {            \
        unpack<Format>(panel, first_row, rows, out, stride);                                                       \
    }

UNPACK(bf16, Bf16)
UNPACK(int8, Int8)
UNPACK(int4, Int4)
UNPACK(fp8, Fp8)
