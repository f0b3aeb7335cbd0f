// Adds whole [T, n] results of units, or of sub-trees of several ranks, along the reduction tree.
//
// fold(parts, program, outputs, count): grid ⌈count / 1024⌉, block 256, no dynamic shared memory.
//   parts: the units' sums, 64 pointers by value, `program.count` of them used; f32, `count` elements, aligned to 16 bytes.
//   program, outputs: see tree.cuh; f32, `count` elements, aligned to 16 bytes. An output may be a part of its own sub-tree.
//   count: elements of a part (i64).
#include "tree.cuh"

static constexpr i32 THREADS = 256;

KERNEL(256, 3, fold,
       (const __grid_constant__ Parts parts, const __grid_constant__ FoldProgram program,
        const __grid_constant__ Outputs outputs, i64 count)) {
    i64 first = (static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x) * FOUR;
    if (first >= count) {
        return;
    }
    FoldStack<FOUR> stack;
    float next[FOUR];
    read_four(parts.part[0], first, count, next);
#pragma unroll 1
    for (i32 unit = 0; unit < program.count; unit++) {
        stack.push(next);
        if (unit + 1 < program.count) {  // on its way while this one is added
            read_four(parts.part[unit + 1], first, count, next);
        }
        stack.merge(program.merges[unit]);
        i32 output = program.store[unit];
        if (output >= 0) {
            write_four(outputs.out[output], first, count, stack.value[0]);
            stack.pop();
        }
    }
}
