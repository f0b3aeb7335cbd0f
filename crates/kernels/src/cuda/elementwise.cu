// What works on rows element by element: embedding, gate, copies of rows.
//
// All: grid (rows, blocks of a row), 256 threads, no dynamic shared memory.
#include "device.cuh"

static const i32 THREADS = 256;

// A token is an id; or, with this bit, a slot whose last id it is; or, of all ones, none.
static const u32 LAST_SAMPLED = 0x80000000u;
static const u32 NO_TOKEN = 0xffffffffu;

// out[row] = the table's row of tokens[row], or zeros where its id is not one of first_id .. first_id + count.
// last_sampled: an id for each slot. table bf16 [count, cols], out f32 [rows, cols].
KERNEL(256, 4, embed,
       (const u32* tokens, const u32* last_sampled, const u16* table, u32 first_id, u32 count, i32 cols, float* out)) {
    after_previous();
    u32 id = tokens[blockIdx.x];
    if (id >= LAST_SAMPLED && id != NO_TOKEN) {
        id = last_sampled[id - LAST_SAMPLED];
    }
    u32 at = id - first_id;
    bool held = id >= first_id && at < count;
    const u16* from = table + static_cast<i64>(held ? at : 0) * cols;
    float* to = out + static_cast<i64>(blockIdx.x) * cols;
    for (i32 i = blockIdx.y * THREADS + threadIdx.x; i < cols; i += gridDim.y * THREADS) {
        to[i] = held ? bf16_to_float(from[i]) : 0.0f;
    }
}

// Columns of a unit's gate, as widest as a model has them.
static const i32 MAX_UNITS = 64;
struct Widths {
    i32 count;
    // Where each unit's columns begin among all units', and behind the last one the number of all.
    i32 first[MAX_UNITS + 1];
};

// e^x to about 2 ulp (Cephes' expf), for x in -87 .. 88: the hardware's own differs by chip.
static __device__ __forceinline__ float exponential(float x) {
    float n = floorf(fmaf(x, 1.44269504f, 0.5f));
    float r = fmaf(n, -0.693359375f, x);
    r = fmaf(n, 2.12194440e-4f, r);
    float p = 1.9875691e-4f;
    p = fmaf(p, r, 1.3981999e-3f);
    p = fmaf(p, r, 8.3334519e-3f);
    p = fmaf(p, r, 4.1665796e-2f);
    p = fmaf(p, r, 1.6666666e-1f);
    p = fmaf(p, r, 0.5f);
    float e = fmaf(p * r, r, r) + 1.0f;
    return e * __uint_as_float(static_cast<u32>(static_cast<i32>(n) + 127) << 23);
}

// out[row, unit's columns] = silu(gate) · up; gate_up f32 [rows, 2 · all columns] (unit after unit: its gate, its up),
// out bf16 [rows, all columns]; silu(z) = z / (1 + e^-z).
KERNEL(256, 4, silu_mul, (const float* gate_up, Widths widths, u16* out)) {
    after_previous();
    i32 total = widths.first[widths.count];
    const float* from = gate_up + static_cast<i64>(blockIdx.x) * 2 * total;
    u16* to = out + static_cast<i64>(blockIdx.x) * total;
    i32 unit = 0;
    for (i32 i = blockIdx.y * THREADS + threadIdx.x; i < total; i += gridDim.y * THREADS) {
        while (i >= widths.first[unit + 1]) {
            unit++;
        }
        // The unit's gate begins at twice its first column, its up one width behind.
        const float* gate = from + widths.first[unit] + i;
        float z = gate[0];
        float up = gate[widths.first[unit + 1] - widths.first[unit]];
        // Below -87 the quotient is as good as zero; above 87 it is z.
        float silu = z < -87.0f ? 0.0f : z / (1.0f + exponential(fmaxf(-z, -87.0f)));
        to[i] = float_to_bf16(silu * up);
    }
}

// out[i] = x[rows[i]], 4-byte elements.
KERNEL(256, 4, gather_rows_4, (const u32* rows, const u32* x, i32 cols, u32* out)) {
    after_previous();
    const u32* from = x + static_cast<i64>(rows[blockIdx.x]) * cols;
    u32* to = out + static_cast<i64>(blockIdx.x) * cols;
    for (i32 i = blockIdx.y * THREADS + threadIdx.x; i < cols; i += gridDim.y * THREADS) {
        to[i] = from[i];
    }
}

// Likewise, 2-byte elements.
KERNEL(256, 4, gather_rows_2, (const u32* rows, const u16* x, i32 cols, u16* out)) {
    after_previous();
    const u16* from = x + static_cast<i64>(rows[blockIdx.x]) * cols;
    u16* to = out + static_cast<i64>(blockIdx.x) * cols;
    for (i32 i = blockIdx.y * THREADS + threadIdx.x; i < cols; i += gridDim.y * THREADS) {
        to[i] = from[i];
    }
}
