// What the kernels use beyond plain CUDA C++: fixed-width types, bf16, and the PTX instructions, each in one function.
//
// No CUDA header is included, so NVRTC needs no include path. The emulator (crates/emulator) defines PHALANX_EMULATOR and
// gives its own versions of everything in the first part; the second part is common.
#pragma once

#ifndef PHALANX_EMULATOR

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

// Declares a kernel: threads of a block (at most), blocks that shall fit on a multiprocessor, name, parameters.
#define KERNEL(threads, blocks, name, parameters) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name parameters

extern __shared__ __align__(16) u8 dynamic_shared_memory[];

// The block's dynamic shared memory, aligned to 16 bytes.
template <class T> __device__ __forceinline__ T* dynamic_shared() {
    return reinterpret_cast<T*>(dynamic_shared_memory);
}

// 16 bytes through the read-only path that are not wanted again (weights, KV): not kept in L1.
__device__ __forceinline__ uint4 load_stream16(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// 16 bytes that other threads of the grid do not write.
__device__ __forceinline__ uint4 load16(const void* p) {
    return *reinterpret_cast<const uint4*>(p);
}

__device__ __forceinline__ void store16(void* p, uint4 v) {
    *reinterpret_cast<uint4*>(p) = v;
}

// Starts a copy of 16 bytes from global to shared memory; zeros are written where `valid` is false (nothing is read then).
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid) {
    u32 address = static_cast<u32>(__cvta_generic_to_shared(shared));
    i32 bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}

// Starts a copy of 16 bytes, and asks for all the BYTES (128 or 256) around them to come to L2: others want the rest soon.
template <i32 BYTES> __device__ __forceinline__ void cp_async16_from(void* shared, const void* global) {
    u32 address = static_cast<u32>(__cvta_generic_to_shared(shared));
    if constexpr (BYTES == 256) {
        asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
    } else {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
    }
}

// Starts a copy of 4 or 8 bytes.
template <i32 BYTES> __device__ __forceinline__ void cp_async_small(void* shared, const void* global) {
    u32 address = static_cast<u32>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(global), "n"(BYTES) : "memory");
}

// Closes this thread's group of copies.
__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `PENDING` of this thread's groups are under way.
template <i32 PENDING> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// c[16×8] += a[16×16] · b[16×8], bf16 operands in f32, for a warp. Lane 4g + t holds, as pairs of bf16:
// a[0] = A[g][2t..], a[1] = A[g+8][2t..], a[2] = A[g][2t+8..], a[3] = A[g+8][2t+8..]; b0 = B[2t..][g], b1 = B[2t+8..][g];
// c[0], c[1] = C[g][2t], C[g][2t+1]; c[2], c[3] = C[g+8][2t], C[g+8][2t+1]. (PTX ISA, mma.m16n8k16)
__device__ __forceinline__ void mma_bf16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Two floats rounded to nearest even, `low` in the lower half.
__device__ __forceinline__ u32 pack_bf16x2(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// a · b + c on two bf16 each, rounded once.
__device__ __forceinline__ u32 fma_bf16x2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// 2^x, 2 ulp, as the hardware gives it; 2^-inf = 0.
__device__ __forceinline__ float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// (a & b) | c.
__device__ __forceinline__ u32 and_or(u32 a, u32 b, u32 c) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// Flags in memory that other devices and the host see.
__device__ __forceinline__ u32 load_acquire_system(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ void store_release_system(u32* p, u32 v) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Nanoseconds of a clock that all multiprocessors share.
__device__ __forceinline__ u64 global_nanoseconds() {
    u64 t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}

// For kernels that are begun early (Device::launch_early): lets the next one come as soon as all blocks of this one are here, and
// waits until everything before this one has ended and is seen. What comes before this in a kernel touches nothing that changes
// during a step; every thread must call it, since that the kernels before have ended is known by the end of this one.
__device__ __forceinline__ void after_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets others run while spinning.
__device__ __forceinline__ void spin_pause() {
    __nanosleep(40);
}

#endif

// ---- common to the GPU and the emulator

static __device__ __forceinline__ float bf16_to_float(u16 bits) {
    return __uint_as_float(static_cast<u32>(bits) << 16);
}

// Rounded to nearest even.
static __device__ __forceinline__ u16 float_to_bf16(float x) {
    return static_cast<u16>(pack_bf16x2(x, 0.0f) & 0xffffu);
}

static __device__ __forceinline__ float low_bf16(u32 pair) {
    return __uint_as_float(pair << 16);
}

static __device__ __forceinline__ float high_bf16(u32 pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

static __device__ __forceinline__ i32 ceil_div(i32 a, i32 b) {
    return (a + b - 1) / b;
}

#define NEGATIVE_INFINITY __uint_as_float(0xff800000u)
#define FULL_WARP 0xffffffffu
