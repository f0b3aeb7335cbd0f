// RMSNorm, alone and with the addition to the residual stream before it. One block for each row.
#include "device.cuh"

static const i32 THREADS = 512;
// Columns of a thread that stay in registers, all of them under way at once; those of wider rows are read again.
static const i32 KEPT = 16;

// The sum over the block of each thread's `x`, the same bits in every thread: a butterfly in the warp, then the warps in order.
static __device__ __forceinline__ float block_sum(float x) {
    __shared__ float sums[THREADS / 32];
#pragma unroll
    for (i32 distance = 16; distance > 0; distance /= 2) {
        x += __shfl_xor_sync(FULL_WARP, x, distance);
    }
    if (threadIdx.x % 32 == 0) {
        sums[threadIdx.x / 32] = x;
    }
    __syncthreads();
    float total = sums[0];
#pragma unroll
    for (i32 warp = 1; warp < THREADS / 32; warp++) {
        total += sums[warp];
    }
    return total;
}

// x[i], after `added` was added to it if there is any.
static __device__ __forceinline__ float residual_at(const float* added, const float* residual, i32 i) {
    return added != nullptr ? residual[i] + added[i] : residual[i];
}

// out[row] = x[row] / √(mean(x²) + eps) · weight, where x is `residual`, after `added` was added to it if there is any.
static __device__ __forceinline__ void normalise(const float* added, float* residual, const float* weight, i32 cols, float eps,
                                                 u16* out) {
    i64 row = static_cast<i64>(blockIdx.x) * cols;
    added = added != nullptr ? added + row : nullptr;
    residual += row;
    out += row;
    float kept[KEPT];
    float weights[KEPT];
#pragma unroll
    for (i32 j = 0; j < KEPT; j++) {
        i32 i = static_cast<i32>(threadIdx.x) + j * THREADS;
        kept[j] = i < cols ? residual_at(added, residual, i) : 0.0f;
        weights[j] = i < cols ? weight[i] : 0.0f;
    }
    float squares = 0.0f;
#pragma unroll
    for (i32 j = 0; j < KEPT; j++) {
        i32 i = static_cast<i32>(threadIdx.x) + j * THREADS;
        if (added != nullptr && i < cols) {
            residual[i] = kept[j];
        }
        squares = fmaf(kept[j], kept[j], squares);
    }
    for (i32 i = static_cast<i32>(threadIdx.x) + KEPT * THREADS; i < cols; i += THREADS) {
        float x = residual_at(added, residual, i);
        if (added != nullptr) {
            residual[i] = x;
        }
        squares = fmaf(x, x, squares);
    }
    float mean = block_sum(squares) / static_cast<float>(cols);
    float factor = 1.0f / sqrtf(mean + eps);
#pragma unroll
    for (i32 j = 0; j < KEPT; j++) {
        i32 i = static_cast<i32>(threadIdx.x) + j * THREADS;
        if (i < cols) {
            out[i] = float_to_bf16(kept[j] * factor * weights[j]);
        }
    }
    for (i32 i = static_cast<i32>(threadIdx.x) + KEPT * THREADS; i < cols; i += THREADS) {
        out[i] = float_to_bf16(residual[i] * factor * weight[i]);
    }
}

KERNEL(512, 2, rms_norm, (const float* x, const float* weight, i32 cols, float eps, u16* out)) {
    after_previous();
    normalise(nullptr, const_cast<float*>(x), weight, cols, eps, out);
}

KERNEL(512, 2, add_rms_norm, (const float* x, float* residual, const float* weight, i32 cols, float eps, u16* out)) {
    after_previous();
    normalise(x, residual, weight, cols, eps, out);
}
