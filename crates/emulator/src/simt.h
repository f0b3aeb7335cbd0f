// CUDA C++ for g++: included before every kernel source when it is compiled for the emulator (-DPHALANX_EMULATOR). It gives
// the words of the language, the built-in variables and functions, and the first half of device.cuh.
#pragma once

#include <math.h>

#include "simt/copy.h"
#include "simt/fault.h"
#include "simt/machine.h"
#include "simt/registry.h"

extern "C" int printf(const char* format, ...);

// ---- words of the language

#define __device__
#define __host__
#define __global__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
// One copy for each OS thread: blocks run on it one after another, all threads of a block on the same one.
#define __shared__ static thread_local

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };

inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define threadIdx (::emulator::here()->index)
#define blockIdx (::emulator::here()->block->index)
#define blockDim (::emulator::here()->block->size)
#define gridDim (::emulator::here()->block->grid)
static const int warpSize = 32;

// A kernel becomes a function of this file, known to the launcher by its name.
#define KERNEL(threads, blocks, name, parameters)                                                     \
    static void kernel_##name parameters;                                                             \
    static const ::emulator::Registration registration_##name(                                        \
        ::emulator::describe<&kernel_##name>(#name, threads, blocks));                                \
    static void kernel_##name parameters

template <class T> __forceinline__ T* dynamic_shared() {
    return reinterpret_cast<T*>(::emulator::here()->block->shared);
}

// ---- meeting points

#define EMULATOR_WHERE ::emulator::Place place = EMULATOR_PLACE

inline void __syncthreads(EMULATOR_WHERE) {
    ::emulator::meet_block(::emulator::Meeting::BlockBarrier, false, place);
}
inline int __syncthreads_or(int vote, EMULATOR_WHERE) {
    return static_cast<int>(::emulator::meet_block(::emulator::Meeting::BlockBarrierOr, vote != 0, place));
}
inline int __syncthreads_and(int vote, EMULATOR_WHERE) {
    return static_cast<int>(::emulator::meet_block(::emulator::Meeting::BlockBarrierAnd, vote != 0, place));
}
inline int __syncthreads_count(int vote, EMULATOR_WHERE) {
    return static_cast<int>(::emulator::meet_block(::emulator::Meeting::BlockBarrierCount, vote != 0, place));
}
inline void __syncwarp(u32 mask = 0xffffffffu, EMULATOR_WHERE) {
    ::emulator::meet_warp(::emulator::Meeting::WarpBarrier, mask, place);
}

// The value of lane `source`; of all ones if that lane takes no part.
template <class T> inline T emulator_shuffle(u32 mask, T value, u32 source, ::emulator::Place place) {
    static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
    ::emulator::Warp& warp = *::emulator::here()->warp;
    u32 lane = ::emulator::here()->lane;
    warp.value[lane] = 0;
    __builtin_memcpy(&warp.value[lane], &value, sizeof value);
    warp.source[lane] = source;
    ::emulator::meet_warp(::emulator::Meeting::Shuffle, mask, place);
    __builtin_memcpy(&value, &warp.result[lane], sizeof value);
    return value;
}
template <class T> inline T __shfl_sync(u32 mask, T value, int source, int width = 32, EMULATOR_WHERE) {
    u32 lane = ::emulator::here()->lane, segment = static_cast<u32>(width);
    return emulator_shuffle(mask, value, (lane & ~(segment - 1)) | (static_cast<u32>(source) & (segment - 1)), place);
}
template <class T> inline T __shfl_up_sync(u32 mask, T value, u32 distance, int width = 32, EMULATOR_WHERE) {
    u32 lane = ::emulator::here()->lane, segment = static_cast<u32>(width);
    return emulator_shuffle(mask, value, (lane & (segment - 1)) >= distance ? lane - distance : lane, place);
}
template <class T> inline T __shfl_down_sync(u32 mask, T value, u32 distance, int width = 32, EMULATOR_WHERE) {
    u32 lane = ::emulator::here()->lane, segment = static_cast<u32>(width);
    return emulator_shuffle(mask, value, (lane & (segment - 1)) + distance < segment ? lane + distance : lane, place);
}
template <class T> inline T __shfl_xor_sync(u32 mask, T value, int bits, int width = 32, EMULATOR_WHERE) {
    u32 lane = ::emulator::here()->lane, segment = static_cast<u32>(width), source = lane ^ static_cast<u32>(bits);
    return emulator_shuffle(mask, value, source <= (lane | (segment - 1)) ? source : lane, place);
}

// In the upper half the lanes that took part, in the lower half those that voted yes.
inline u64 emulator_ballot(u32 mask, int vote, ::emulator::Place place) {
    ::emulator::Warp& warp = *::emulator::here()->warp;
    u32 lane = ::emulator::here()->lane;
    warp.value[lane] = vote != 0;
    ::emulator::meet_warp(::emulator::Meeting::Ballot, mask, place);
    return warp.result[lane];
}
inline u32 __ballot_sync(u32 mask, int vote, EMULATOR_WHERE) {
    return static_cast<u32>(emulator_ballot(mask, vote, place));
}
inline int __any_sync(u32 mask, int vote, EMULATOR_WHERE) {
    return static_cast<u32>(emulator_ballot(mask, vote, place)) != 0;
}
inline int __all_sync(u32 mask, int vote, EMULATOR_WHERE) {
    u64 ballot = emulator_ballot(mask, vote, place);
    return static_cast<u32>(ballot >> 32) == static_cast<u32>(ballot);
}

// c += a · b: to c the 16 products in ascending k, each sum rounded to nearest. See simt/warp.cpp.
inline void mma_bf16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, EMULATOR_WHERE) {
    u32 lane = ::emulator::here()->lane, group = lane / 4, pair = lane % 4;
    ::emulator::MmaOperands& mma = ::emulator::here()->warp->mma;
    mma.a[0][lane] = a0;
    mma.a[1][lane] = a1;
    mma.a[2][lane] = a2;
    mma.a[3][lane] = a3;
    mma.b[0][pair * 8 + group] = b0;
    mma.b[1][pair * 8 + group] = b1;
    float* low = &mma.c[group][pair * 2];
    float* high = &mma.c[group + 8][pair * 2];
    low[0] = c[0];
    low[1] = c[1];
    high[0] = c[2];
    high[1] = c[3];
    ::emulator::meet_warp(::emulator::Meeting::Mma, 0xffffffffu, place);
    c[0] = low[0];
    c[1] = low[1];
    c[2] = high[0];
    c[3] = high[1];
}

// ---- memory

inline void emulator_aligned(const void* p, ::emulator::Place place, u32 bytes = 16) {
    if (reinterpret_cast<u64>(p) % bytes != 0) {
        ::emulator::fail_at(place, "an access of %u bytes at %p, which is not a multiple of %u", bytes, p, bytes);
    }
}
inline uint4 load16(const void* p, EMULATOR_WHERE) {
    emulator_aligned(p, place);
    return *static_cast<const uint4*>(p);
}
inline uint4 load_stream16(const void* p, EMULATOR_WHERE) {
    return load16(p, place);
}
inline void store16(void* p, uint4 v, EMULATOR_WHERE) {
    emulator_aligned(p, place);
    *static_cast<uint4*>(p) = v;
}
inline void cp_async16(void* shared, const void* global, bool valid, EMULATOR_WHERE) {
    emulator_aligned(shared, place);
    emulator_aligned(valid ? global : nullptr, place);
    ::emulator::start_copy(shared, valid ? global : nullptr, 16);
}
template <i32 BYTES> inline void cp_async16_from(void* shared, const void* global, EMULATOR_WHERE) {
    static_assert(BYTES == 128 || BYTES == 256);
    cp_async16(shared, global, true, place);
}
template <i32 BYTES> inline void cp_async_small(void* shared, const void* global, EMULATOR_WHERE) {
    static_assert(BYTES == 4 || BYTES == 8);
    emulator_aligned(shared, place, BYTES);
    emulator_aligned(global, place, BYTES);
    ::emulator::start_copy(shared, global, BYTES);
}
inline void cp_async_commit() {
    ::emulator::here()->copy_group++;
}
template <i32 PENDING> inline void cp_async_wait() {
    ::emulator::wait_for_copies(PENDING);
}

template <class T> inline T __ldg(const T* p) { return *p; }

inline u32 load_acquire_system(const u32* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
inline void store_release_system(u32* p, u32 v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// Kernels run one after another.
inline void after_previous() {}

// Each gives the value from before. (None for floats: the order of their sums would be left to chance.)
#define EMULATOR_ATOMICS(T)                                                                                              \
    inline T atomicAdd(T* p, T v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }                                 \
    inline T atomicSub(T* p, T v) { return __atomic_fetch_sub(p, v, __ATOMIC_RELAXED); }                                 \
    inline T atomicAnd(T* p, T v) { return __atomic_fetch_and(p, v, __ATOMIC_RELAXED); }                                 \
    inline T atomicOr(T* p, T v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }                                   \
    inline T atomicExch(T* p, T v) { return __atomic_exchange_n(p, v, __ATOMIC_RELAXED); }                               \
    inline T atomicCAS(T* p, T expected, T v) {                                                                          \
        __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);                         \
        return expected;                                                                                                 \
    }                                                                                                                    \
    inline T atomicMax(T* p, T v) {                                                                                      \
        T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                                                    \
        while (old < v && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {         \
        }                                                                                                                \
        return old;                                                                                                      \
    }                                                                                                                    \
    inline T atomicMin(T* p, T v) {                                                                                      \
        T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                                                    \
        while (v < old && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {         \
        }                                                                                                                \
        return old;                                                                                                      \
    }
EMULATOR_ATOMICS(int)
EMULATOR_ATOMICS(u32)
EMULATOR_ATOMICS(u64)
#undef EMULATOR_ATOMICS

#include "simt/arithmetic.h"
