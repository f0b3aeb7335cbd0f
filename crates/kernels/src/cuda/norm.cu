// RMSNorm, alone and with the addition to the residual stream before it. One block for each row.
#include "device.cuh"

static const i32 THREADS = 256;

// The sum over the block of each thread's `x`, the same bits in every thread: a butterfly in the warp, then the warps in order.
static __device__ float block_sum(float x) {
    __shared__ float sums[THREADS / 32];
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

// out[row] = x[row] / √(mean(x²) + eps) · weight, where x is `residual`, after `added` was added to it if there is any.
static __device__ void normalise(const float* added, float* residual, const float* weight, i32 cols, float eps, u16* out) {
    i64 row = static_cast<i64>(blockIdx.x) * cols;
    float squares = 0.0f;
    for (i32 i = threadIdx.x; i < cols; i += THREADS) {
        float x = residual[row + i];
        if (added != nullptr) {
            x += added[row + i];
            residual[row + i] = x;
        }
        squares = fmaf(x, x, squares);
    }
    float mean = block_sum(squares) / static_cast<float>(cols);
    float factor = 1.0f / sqrtf(mean + eps);
    for (i32 i = threadIdx.x; i < cols; i += THREADS) {
        out[row + i] = float_to_bf16(residual[row + i] * factor * weight[i]);
    }
}

KERNEL(256, 4, rms_norm, (const float* x, const float* weight, i32 cols, float eps, u16* out)) {
    normalise(nullptr, const_cast<float*>(x), weight, cols, eps, out);
}

KERNEL(256, 4, add_rms_norm, (const float* x, float* residual, const float* weight, i32 cols, float eps, u16* out)) {
    normalise(x, residual, weight, cols, eps, out);
}
