// A fiber: a stack and a saved place to go on from. Each thread of an emulated block is one.
//
// Fibers never leave the OS thread that made them, so thread_local variables keep their address across a switch.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

// What a fiber needs to go on; the host's own stack has one too while a block runs.
struct Context {
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
    void* frame_pointer = nullptr;
    void* resume = nullptr;
#else
    ucontext_t saved;
#endif
};

// Bytes of a stack, which begins on a multiple of them: so its end, where a word of the owner's lies, is found from any
// address in it.
const size_t STACK_BYTES = 128 * 1024;

// Memory for a stack. Its lowest page cannot be touched.
class Stack {
  public:
    Stack();
    ~Stack();
    Stack(Stack&& other) noexcept;
    Stack(const Stack&) = delete;
    Stack& operator=(const Stack&) = delete;

    // The word at its end.
    void** word() const { return reinterpret_cast<void**>(memory_ + STACK_BYTES) - 1; }
    // Is `address` in the page that cannot be touched?
    bool overflowed_at(const void* address) const;

    // The word of the stack that the caller runs on, which must be one of these.
    static __attribute__((always_inline)) void* own_word() {
        uintptr_t inside = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
        return *reinterpret_cast<void**>((inside | (STACK_BYTES - 1)) + 1 - sizeof(void*));
    }

  private:
    char* memory_;
};

// Makes `context` start at `entry` (which never returns) on `stack`. `colour` shifts the start of the stack by some cache
// lines: without it the same variable of all threads would fall into the same set of the cache.
void prepare(Context& context, const Stack& stack, unsigned colour, void (*entry)());

// Saves the running fiber in `from` and goes on with `to`.
//
// On x86-64 everything that the compiler may keep in registers is declared overwritten, so that it saves what it needs and
// only the stack, the frame and the place to go on remain. The jump is predicted: all threads wait at the same instruction.
static inline __attribute__((always_inline)) void switch_context(Context& from, Context& to) {
#if defined(__x86_64__)
    Context* f = &from;
    Context* t = &to;
    asm volatile(
        "movq %%rsp, 0(%0)\n\t"
        "movq %%rbp, 8(%0)\n\t"
        "leaq 1f(%%rip), %%rax\n\t"
        "movq %%rax, 16(%0)\n\t"
        "movq 0(%1), %%rsp\n\t"
        "movq 8(%1), %%rbp\n\t"
        "jmpq *16(%1)\n"
        "1:"
        : "+D"(f), "+S"(t)
        :
        : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc", "xmm0", "xmm1",
          "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14",
          "xmm15"
#if defined(__AVX512F__)
          ,
          "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27",
          "xmm28", "xmm29", "xmm30", "xmm31", "k1", "k2", "k3", "k4", "k5", "k6", "k7"
#endif
    );
#else
    swapcontext(&from.saved, &to.saved);
#endif
}

}  // namespace emulator
