// The arithmetic of sampling. Everything that decides which id is chosen is, operation for operation, that of sample.rs, so that
// the host and the device choose alike: nothing is fused (-fmad=false) and nothing comes from CUDA's library of functions.
#pragma once

#include "device.cuh"

// e^x for x ≤ 0, 0 below −87. NaN counts as −87.
static __device__ __forceinline__ float exp_negative(float x) {
    float clamped = fmaxf(x, -87.0f);
    float n = floorf(clamped * 1.44269504f + 0.5f);
    float r = clamped - n * 0.6933594f - n * -2.1219444e-4f;
    float p = 1.9875691e-4f;
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.333452e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 0.5f;
    float e = (p * r * r + r + 1.0f) * __uint_as_float(static_cast<u32>(static_cast<i32>(n) + 127) << 23);
    return x < -87.0f ? 0.0f : e;
}

// ln x for a normal x > 0, to about 1e-16: with x = 2^k · m, √½ ≤ m ≤ √2, ln m is 2 artanh s for s = (m − 1) / (m + 1).
static __device__ __forceinline__ double natural_logarithm(double x) {
    const double LN_2 = 0.69314718055994531;
    const double SQRT_2 = 1.4142135623730951;
    i64 bits = __double_as_longlong(x);
    i32 k = static_cast<i32>(bits >> 52) - 1023;
    double m = __longlong_as_double((bits & 0x000fffffffffffffll) | 0x3ff0000000000000ll);
    if (m > SQRT_2) {
        m *= 0.5;
        k += 1;
    }
    double s = (m - 1.0) / (m + 1.0);
    double square = s * s;
    double series = 0.0;
#pragma unroll
    for (i32 n = 23; n >= 1; n -= 2) {
        series = series * square + 1.0 / n;
    }
    return k * LN_2 + 2.0 * s * series;
}

// SplitMix64's step and finaliser.
static __device__ __forceinline__ u64 mix(u64 value) {
    u64 z = value + 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// A number in [0, 1) with 53 random bits, a function of seed and position alone.
static __device__ __forceinline__ double uniform(u64 seed, u32 position) {
    u64 mixed = mix(mix(seed) + static_cast<u64>(position) * 0x9e3779b97f4a7c15ull);
    return static_cast<double>(mixed >> 11) * (1.0 / 9007199254740992.0);
}

// A key that is ordered as logits are: NaN below all else, and the two zeros equal.
static __device__ __forceinline__ u32 order_key(float logit) {
    u32 bits = __float_as_uint(logit + 0.0f);  // −0 + 0 = 0
    u32 key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return logit == logit ? key : 0;
}
