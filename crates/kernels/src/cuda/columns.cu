// Puts a matrix into a run of columns of a wider one: how gathered logits come side by side.
//
// place_columns(x, rows, count, out, first, all): grid ⌈rows · count / 256⌉, block 256, no dynamic shared memory.
//   x: f32 [rows, count]; out: f32 [rows, all], of which columns first..first + count are written. rows · all < 2^31.
#include "device.cuh"

KERNEL(256, 4, place_columns, (const float* x, i32 rows, i32 count, float* out, i32 first, i32 all)) {
    after_previous();
    i32 element = static_cast<i32>(blockIdx.x * blockDim.x + threadIdx.x);
    if (element < rows * count) {
        out[static_cast<i64>(element / count) * all + first + element % count] = x[element];
    }
}
