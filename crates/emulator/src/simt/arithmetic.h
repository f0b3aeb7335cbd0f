// CUDA's functions on bits and numbers, for kernels that are compiled for the emulator. Included by simt.h.
#pragma once

// ---- bits

template <class To, class From> __forceinline__ To emulator_bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "the same bits in another type");
    To to;
    __builtin_memcpy(&to, &value, sizeof to);
    return to;
}
inline u32 __float_as_uint(float x) { return emulator_bits<u32>(x); }
inline int __float_as_int(float x) { return emulator_bits<int>(x); }
inline float __uint_as_float(u32 x) { return emulator_bits<float>(x); }
inline float __int_as_float(int x) { return emulator_bits<float>(x); }
inline double __longlong_as_double(i64 x) { return emulator_bits<double>(x); }
inline i64 __double_as_longlong(double x) { return emulator_bits<i64>(x); }

inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __popcll(u64 x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<u32>(x)); }
inline int __clzll(i64 x) { return x == 0 ? 64 : __builtin_clzll(static_cast<u64>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(i64 x) { return __builtin_ffsll(x); }
inline u32 __brev(u32 x) {
    u32 reversed = 0;
    for (u32 bit = 0; bit < 32; bit++) {
        reversed |= (x >> bit & 1) << (31 - bit);
    }
    return reversed;
}
inline u32 __umulhi(u32 a, u32 b) { return static_cast<u32>(static_cast<u64>(a) * b >> 32); }
inline u64 __umul64hi(u64 a, u64 b) { return static_cast<u64>(static_cast<unsigned __int128>(a) * b >> 64); }
inline u32 __byte_perm(u32 low, u32 high, u32 selector) {
    u64 bytes = static_cast<u64>(high) << 32 | low;
    u32 result = 0;
    for (u32 i = 0; i < 4; i++) {
        u32 choice = selector >> 4 * i & 15;
        u32 byte = static_cast<u32>(bytes >> 8 * (choice & 7)) & 0xff;
        result |= (choice & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
    }
    return result;
}
inline u32 and_or(u32 a, u32 b, u32 c) { return (a & b) | c; }

// ---- numbers

template <class T> __forceinline__ T emulator_max(T a, T b) { return a > b ? a : b; }
template <class T> __forceinline__ T emulator_min(T a, T b) { return a < b ? a : b; }
#define EMULATOR_MIN_MAX(T, A, B)                                                             \
    __forceinline__ T max(A a, B b) { return emulator_max(static_cast<T>(a), static_cast<T>(b)); } \
    __forceinline__ T min(A a, B b) { return emulator_min(static_cast<T>(a), static_cast<T>(b)); }
EMULATOR_MIN_MAX(int, int, int)
EMULATOR_MIN_MAX(u32, u32, u32)
EMULATOR_MIN_MAX(u32, int, u32)
EMULATOR_MIN_MAX(u32, u32, int)
EMULATOR_MIN_MAX(i64, i64, i64)
EMULATOR_MIN_MAX(u64, u64, u64)
EMULATOR_MIN_MAX(u64, i64, u64)
EMULATOR_MIN_MAX(u64, u64, i64)
#undef EMULATOR_MIN_MAX
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }

// bf16 from bits of f32: to nearest, ties to even; every NaN becomes 0x7fff, as on the GPU.
inline u32 emulator_bf16(float x) {
    u32 bits = __float_as_uint(x);
    u32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return x == x ? rounded : 0x7fff;
}
inline u32 pack_bf16x2(float low, float high) { return emulator_bf16(low) | emulator_bf16(high) << 16; }

// a · b + c rounded once to bf16. The double sum and the float from it are rounded to odd: if bits are lost, the last one
// that stays is set, so that the last rounding sees on which side of a tie the exact value is.
inline u32 emulator_fma_bf16(u32 a, u32 b, u32 c) {
    double product = static_cast<double>(__uint_as_float(a << 16)) * __uint_as_float(b << 16);  // exact
    double addend = __uint_as_float(c << 16);
    double sum = product + addend;
    if (!(fabs(sum) <= 3.4e38)) {
        return emulator_bf16(static_cast<float>(sum));
    }
    double back = sum - product;
    double lost = (product - (sum - back)) + (addend - back);
    if (lost != 0.0 && !(__double_as_longlong(sum) & 1)) {
        sum = nextafter(sum, lost > 0.0 ? HUGE_VAL : -HUGE_VAL);
    }
    float narrow = static_cast<float>(sum);
    if (static_cast<double>(narrow) != sum && !(__float_as_uint(narrow) & 1)) {
        narrow = nextafterf(narrow, sum > static_cast<double>(narrow) ? HUGE_VALF : -HUGE_VALF);
    }
    return emulator_bf16(narrow);
}
inline u32 fma_bf16x2(u32 a, u32 b, u32 c) {
    u32 low = emulator_fma_bf16(a & 0xffff, b & 0xffff, c & 0xffff);
    return low | emulator_fma_bf16(a >> 16, b >> 16, c >> 16) << 16;
}

// The C library's 2^x (within 1 ulp; the GPU's is within 2), subnormal results flushed to zero.
inline float exp2_approximate(float x) {
    float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y;
}

// ---- time, and the end

inline u64 global_nanoseconds() { return ::emulator::nanoseconds(); }
inline u64 clock64() { return global_nanoseconds(); }
inline void spin_pause() { ::emulator::pause_thread(); }
inline void __nanosleep(u32) { ::emulator::pause_thread(); }

[[noreturn]] inline void __trap(EMULATOR_WHERE) { ::emulator::fail_at(place, "__trap"); }
#define assert(condition) ((condition) ? void() : ::emulator::fail_at(EMULATOR_PLACE, "assertion failed: %s", #condition))
