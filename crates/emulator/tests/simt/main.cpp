// Tests of the emulated multiprocessor. Without an argument: everything that must work; with the name of a kernel: a
// mistake that must end the process.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include <sys/mman.h>

#include "simt.h"

#define EXPECT(condition)                                                              \
    do {                                                                               \
        if (!(condition)) {                                                            \
            std::printf("%s:%d: expected %s\n", __FILE__, __LINE__, #condition);       \
            std::exit(1);                                                              \
        }                                                                              \
    } while (false)

static void barriers() {
    const u32 blocks = 3, threads = 96;
    std::vector<u32> in(blocks * threads), out(in.size()), votes(in.size());
    for (u32 i = 0; i < in.size(); i++) {
        in[i] = i * i;
    }
    const u32* numbers = in.data();
    EXPECT(emulator_run("test_barriers", {blocks}, {threads}, 0, numbers, out.data(), votes.data()) == EMULATOR_SUCCESS);
    for (u32 block = 0; block < blocks; block++) {
        u32 sum = 0;
        for (u32 i = 0; i < threads; i++) {
            sum += in[block * threads + i];
        }
        for (u32 i = 0; i < threads; i++) {
            EXPECT(out[block * threads + i] == sum + threads - 1 - i);
            EXPECT(votes[block * threads + i] == (32 << 4 | 1 << 3 | 0 << 2 | 1 << 1 | 0));
        }
    }
    EXPECT(emulator_run("test_early_return", {1}, {threads}, 4 * threads, out.data()) == EMULATOR_SUCCESS);
    for (u32 i = 0; i < threads; i += 2) {
        EXPECT(out[i] == 94 - i);
    }
}

static void shuffles() {
    std::vector<u32> out(64 * 10);
    EXPECT(emulator_run("test_shuffles", {1}, {64}, 0, out.data()) == EMULATOR_SUCCESS);
    for (u32 thread = 0; thread < 64; thread++) {
        u32 lane = thread % 32;
        const u32* got = &out[thread * 10];
        EXPECT(got[0] == 70);
        EXPECT(got[1] == (lane / 8 * 8 + 3) * 10);
        EXPECT(got[2] == (lane >= 5 ? lane - 5 : lane));
        EXPECT(got[3] == (lane + 5 < 32 ? lane + 5 : lane));
        EXPECT(got[4] == (lane ^ 9));
        EXPECT(got[5] == (lane ^ 1));
        EXPECT(got[6] == 0x22222222u);
        EXPECT(got[7] == 2);
        EXPECT(got[8] == (lane < 16 ? lane ^ 1 : 0xffff0000u));
        EXPECT(got[9] == (lane ^ 16));
    }
}

static void mma() {
    float a[16][16], b[16][8], c[16][8], expected[16][8];
    u16 packed_a[16][16], packed_b[8][16];
    u32 state = 1;
    auto next = [&] {
        state = state * 1664525 + 1013904223;
        return __uint_as_float((state >> 16 & 0x807f) << 16 | 0x3f000000u | (state >> 8 & 3) << 23);
    };
    for (u32 i = 0; i < 16; i++) {
        for (u32 k = 0; k < 16; k++) {
            a[i][k] = next();
            packed_a[i][k] = static_cast<u16>(__float_as_uint(a[i][k]) >> 16);
        }
        for (u32 j = 0; j < 8; j++) {
            b[i][j] = next();
            packed_b[j][i] = static_cast<u16>(__float_as_uint(b[i][j]) >> 16);
            c[i][j] = next() / 3.0f;
        }
    }
    for (u32 i = 0; i < 16; i++) {
        for (u32 j = 0; j < 8; j++) {
            expected[i][j] = c[i][j];
            for (u32 k = 0; k < 16; k++) {
                expected[i][j] += a[i][k] * b[k][j];
            }
        }
    }
    const u32* words_a = reinterpret_cast<const u32*>(packed_a);
    const u32* words_b = reinterpret_cast<const u32*>(packed_b);
    EXPECT(emulator_run("test_mma", {1}, {32}, 0, words_a, words_b, &c[0][0]) == EMULATOR_SUCCESS);
    EXPECT(std::memcmp(c, expected, sizeof c) == 0);
}

static void copies() {
    const i32 tiles = 5;
    std::vector<uint4> in(tiles * 32), out(tiles * 32);
    for (u32 i = 0; i < in.size(); i++) {
        in[i] = make_uint4(i, i + 1, i + 2, i + 3);
    }
    const uint4* source = in.data();
    EXPECT(emulator_run("test_copies", {1}, {32}, 1024, source, out.data(), tiles) == EMULATOR_SUCCESS);
    for (u32 tile = 0; tile < tiles; tile++) {
        for (u32 i = 0; i < 32; i++) {
            u32 from = tile * 32 + (i + 1) % 32;
            EXPECT(out[tile * 32 + i].w == (tile % 2 == 0 ? from + 3 : 0));
        }
    }
}

// Kernels of two OS threads wait for one another.
static void handshake() {
    u32 flags[2] = {0, 0};
    auto run = [&](u32 rank) {
        const u32* peer = &flags[1 - rank];
        EXPECT(emulator_run("test_handshake", {1}, {32}, 0, &flags[rank], peer, 100u) == EMULATOR_SUCCESS);
    };
    std::thread other(run, 1);
    run(0);
    other.join();
}

static void launches() {
    std::vector<float> x(1000, 1.0f);
    EXPECT(emulator_run("test_add", {4}, {257}, 0, x.data(), 1.0f, 1000) == EMULATOR_INVALID_VALUE);
    EXPECT(emulator_run("test_add", {0}, {256}, 0, x.data(), 1.0f, 1000) == EMULATOR_INVALID_VALUE);
    EXPECT(emulator_run("test_add", {4}, {256}, 228 * 1024, x.data(), 1.0f, 1000) == EMULATOR_INVALID_VALUE);
    EXPECT(emulator_run("no_such_kernel", {4}, {256}, 0, x.data(), 1.0f, 1000) == EMULATOR_NOT_FOUND);
    EXPECT(emulator_run("test_add", {4}, {256}, 0, x.data(), 1.0f, 1000) == EMULATOR_SUCCESS);
    EXPECT(x[0] == 2.0f && x[999] == 2.0f);
}

static void rounding() {
    EXPECT(pack_bf16x2(1.00390625f, -1.01171875f) == 0xbf823f80u);  // both ties, to even
    EXPECT(pack_bf16x2(__uint_as_float(0x7f800001u), 0.0f) == 0x00007fffu);
    // 1.0078125² + 2^-24: the exact sum lies just above a tie of bf16; rounding to f32 first would fall onto it.
    EXPECT((fma_bf16x2(0x3f803f80u, 0x3f803f80u, 0x3f803f80u) & 0xffff) == 0x4000);
    EXPECT((fma_bf16x2(0x3f88u, 0x3f88u, 0x2f80u) & 0xffff) == 0x3f91);
    EXPECT((fma_bf16x2(0x3f88u, 0x3f88u, 0xaf80u) & 0xffff) == 0x3f90);
    EXPECT(exp2_approximate(-INFINITY) == 0.0f && exp2_approximate(3.0f) == 8.0f && exp2_approximate(-130.0f) == 0.0f);
    EXPECT(__byte_perm(0x33221100u, 0x77665544u, 0x7250u) == 0x77225500u);
}

// A thread gets what another one wrote if that one ran before it. No order is right for all; where none is asked for, blocks take
// different ones.
static void missing_barrier() {
    const u32 blocks = 20;
    std::vector<u32> out(blocks * 64);
    EXPECT(emulator_run("wrong_missing_barrier", {blocks}, {64}, 0, out.data()) == EMULATOR_SUCCESS);
    u32 ascending = 0, descending = 0;
    for (u32 block = 0; block < blocks; block++) {
        u32 right[2] = {0, 0};  // of the lower threads, of the upper ones
        for (u32 i = 0; i < 64; i++) {
            right[i / 32] += out[block * 64 + i] == block * 64 + 63 - i;
        }
        EXPECT(right[0] + right[1] < 64);
        ascending += right[0] == 0;
        descending += right[1] == 0;
    }
    if (std::getenv("PHALANX_EMULATOR_ORDER") == nullptr) {
        EXPECT(ascending > 0 && descending > 0);
    }
}

int main(int count, char** arguments) {
    if (count == 2) {
        // A page, then one that cannot be touched.
        void* memory = mmap(nullptr, 8192, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        EXPECT(memory != MAP_FAILED && mprotect(memory, 4096, PROT_READ | PROT_WRITE) == 0);
        u32 threads = std::strcmp(arguments[1], "wrong_divergence") == 0 ? 64 : 32;
        emulator_run(arguments[1], {1}, {threads}, 256, static_cast<u32*>(memory));
        std::printf("%s went unnoticed\n", arguments[1]);
        return 0;
    }
    barriers();
    shuffles();
    mma();
    copies();
    handshake();
    launches();
    rounding();
    missing_barrier();
    std::printf("fine\n");
    return 0;
}
