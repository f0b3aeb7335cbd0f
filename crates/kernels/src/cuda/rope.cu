// Rotary position embedding: the table of a step's angles, then queries, keys and values on their way out of the qkv matrix.
//
// rope_table(positions, frequencies, rows, half, out)
//   grid ⌈rows · half / 256⌉, block 256, no dynamic shared memory.
//   positions: i32 [rows], -1 for padding, at most 10⁶. frequencies: f64 [half], in radians for each position, at most 1.
//   out: f32 [rows][2 · half], the cosines of position · frequency and then the sines; zeros for padding.
//
// rope_write_kv(qkv, rope, positions, row_slice, table_offset, table, kv, layer, blocks, units, group, head_dim, q)
//   grid (rows, units), block 128, no dynamic shared memory.
//   qkv: f32 [rows, units · (group + 2) · head_dim], unit after unit: its query heads, its key, its value; aligned to 16 bytes.
//   rope: f32 [rows, head_dim], of rope_table; aligned to 16 bytes. head_dim: a multiple of 8.
//   positions i32, row_slice u32 [rows]; table_offset u32, by slice; table: u32, KV blocks.
//   kv: bf16, the cache: for each layer, block (of `blocks`) and unit, K [64][head_dim], then V [head_dim][64].
//   q: bf16 [rows, units · group · head_dim]; zeros for padding, of which nothing is written to kv.
#include "device.cuh"

static constexpr i32 BLOCK_KEYS = 64;

struct SinCos {
    double sine;
    double cosine;
};

// Sine and cosine within 2 ulp for 0 ≤ x ≤ 10⁶: the nearest multiple of π/2 is taken off in two parts, of which the first
// leaves no rounding error and the second is below 10⁻¹⁰, then polynomials on |r| ≤ π/4 (the coefficients of fdlibm).
// Not the library's, whose bits may differ from one version to the next.
static __device__ __forceinline__ SinCos sine_and_cosine(double x) {
    double quarters = rint(x * 6.36619772367581382433e-01);
    double r = fma(quarters, -1.57079632679489655800e+00, x);
    r = fma(quarters, -6.12323399573676603587e-17, r);
    double z = r * r;
    double sine = fma(z, 1.58969099521155010221e-10, -2.50507602534068634195e-08);
    sine = fma(z, sine, 2.75573137070700676789e-06);
    sine = fma(z, sine, -1.98412698298579493134e-04);
    sine = fma(z, sine, 8.33333333332248946124e-03);
    sine = fma(z, sine, -1.66666666666666324348e-01);
    sine = fma(z * r, sine, r);
    double cosine = fma(z, -1.13596475577881948265e-11, 2.08757232129817482790e-09);
    cosine = fma(z, cosine, -2.75573143513906633035e-07);
    cosine = fma(z, cosine, 2.48015872894767294178e-05);
    cosine = fma(z, cosine, -1.38888888888741095749e-03);
    cosine = fma(z, cosine, 4.16666666666666019037e-02);
    cosine = fma(z * z, cosine, fma(z, -0.5, 1.0));
    switch (static_cast<i32>(quarters) & 3) {
        case 0: return SinCos{sine, cosine};
        case 1: return SinCos{cosine, -sine};
        case 2: return SinCos{-sine, -cosine};
        default: return SinCos{-cosine, sine};
    }
}

KERNEL(256, 2, rope_table, (const i32* positions, const double* frequencies, i32 rows, i32 half, float* out)) {
    after_previous();
    i32 index = static_cast<i32>(blockIdx.x * 256 + threadIdx.x);
    i32 row = index / half;
    i32 i = index % half;
    if (row >= rows) {
        return;
    }
    SinCos turn = {0.0, 0.0};
    if (positions[row] >= 0) {
        turn = sine_and_cosine(static_cast<double>(positions[row]) * frequencies[i]);
    }
    out[row * 2 * half + i] = static_cast<float>(turn.cosine);
    out[row * 2 * half + half + i] = static_cast<float>(turn.sine);
}

static __device__ __forceinline__ float4 load_four(const float* p) {
    return *reinterpret_cast<const float4*>(p);
}

static __device__ __forceinline__ uint2 pack_four(float4 x) {
    return make_uint2(pack_bf16x2(x.x, x.y), pack_bf16x2(x.z, x.w));
}

// a · cosine − b · sine; with −sine, the second half: a · cosine + b · sine.
static __device__ __forceinline__ float4 rotated(float4 a, float4 b, float4 cosine, float4 sine, float sign) {
    return make_float4(fmaf(a.x, cosine.x, b.x * sine.x * sign), fmaf(a.y, cosine.y, b.y * sine.y * sign),
                       fmaf(a.z, cosine.z, b.z * sine.z * sign), fmaf(a.w, cosine.w, b.w * sine.w * sign));
}

// Four consecutive elements of a value, into its column of V.
static __device__ __forceinline__ void store_column(u16* column, float4 x) {
    uint2 packed = pack_four(x);
    column[0] = static_cast<u16>(packed.x & 0xffffu);
    column[BLOCK_KEYS] = static_cast<u16>(packed.x >> 16);
    column[2 * BLOCK_KEYS] = static_cast<u16>(packed.y & 0xffffu);
    column[3 * BLOCK_KEYS] = static_cast<u16>(packed.y >> 16);
}

// Each thread takes elements i..i + 3 of a head and their partners i + head_dim / 2...
KERNEL(128, 8, rope_write_kv,
       (const float* qkv, const float* rope, const i32* positions, const u32* row_slice, const u32* table_offset, const u32* table,
        u16* kv, i32 layer, i32 blocks, i32 units, i32 group, i32 head_dim, u16* q)) {
    after_previous();
    i32 row = static_cast<i32>(blockIdx.x);
    i32 unit = static_cast<i32>(blockIdx.y);
    i32 half = head_dim / 2;
    i64 row_unit = static_cast<i64>(row) * units + unit;
    const float* from = qkv + row_unit * (group + 2) * head_dim;
    const float* angles = rope + static_cast<i64>(row) * head_dim;
    u16* queries = q + row_unit * group * head_dim;
    i32 position = positions[row];
    if (position < 0) {
        for (i32 i = 4 * static_cast<i32>(threadIdx.x); i < group * head_dim; i += 4 * 128) {
            *reinterpret_cast<uint2*>(queries + i) = make_uint2(0, 0);
        }
        return;
    }
    i64 block = table[table_offset[row_slice[row]] + static_cast<u32>(position / BLOCK_KEYS)];
    i32 offset = position % BLOCK_KEYS;
    u16* keys = kv + ((static_cast<i64>(layer) * blocks + block) * units + unit) * (2 * BLOCK_KEYS * head_dim);
    u16* values = keys + BLOCK_KEYS * head_dim;
    for (i32 item = static_cast<i32>(threadIdx.x); item < (group + 2) * (half / 4); item += 128) {
        i32 head = item / (half / 4);
        i32 i = item % (half / 4) * 4;
        float4 first = load_four(from + head * head_dim + i);
        float4 second = load_four(from + head * head_dim + half + i);
        if (head > group) {
            store_column(values + i * BLOCK_KEYS + offset, first);
            store_column(values + (half + i) * BLOCK_KEYS + offset, second);
            continue;
        }
        float4 cosine = load_four(angles + i);
        float4 sine = load_four(angles + half + i);
        u16* to = head < group ? queries + head * head_dim : keys + offset * head_dim;
        *reinterpret_cast<uint2*>(to + i) = pack_four(rotated(first, second, cosine, sine, -1.0f));
        *reinterpret_cast<uint2*>(to + half + i) = pack_four(rotated(second, first, cosine, sine, 1.0f));
    }
}
