// Stacks of fibers, and how a fiber starts.
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

namespace emulator {

static const size_t COLOURS = 32;
static const size_t COLOUR_BYTES = 128;

static size_t page_bytes() {
    static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return bytes;
}

Stack::Stack() {
    // Twice as much, of which the part on a multiple stays.
    void* memory = mmap(nullptr, 2 * STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    uintptr_t start = reinterpret_cast<uintptr_t>(memory);
    uintptr_t aligned = (start + STACK_BYTES - 1) / STACK_BYTES * STACK_BYTES;
    memory_ = reinterpret_cast<char*>(aligned);
    if (memory == MAP_FAILED || mprotect(memory_, page_bytes(), PROT_NONE) != 0) {
        std::perror("emulator: no memory for a thread's stack");
        std::abort();
    }
    if (aligned != start) {
        munmap(memory, aligned - start);
    }
    munmap(memory_ + STACK_BYTES, start + STACK_BYTES - aligned);
}

Stack::~Stack() {
    if (memory_ != nullptr) {
        munmap(memory_, STACK_BYTES);
    }
}

Stack::Stack(Stack&& other) noexcept : memory_(other.memory_) {
    other.memory_ = nullptr;
}

bool Stack::overflowed_at(const void* address) const {
    const char* place = static_cast<const char*>(address);
    return place >= memory_ && place < memory_ + page_bytes();
}

void prepare(Context& context, const Stack& stack, unsigned colour, void (*entry)()) {
    char* end = reinterpret_cast<char*>(stack.word()) + sizeof(void*);
    char* top = end - 64 - (colour % COLOURS) * COLOUR_BYTES;
#if defined(__x86_64__)
    // A function expects its stack as a call leaves it: 8 bytes off a multiple of 16.
    context.stack_pointer = top - 8;
    context.frame_pointer = nullptr;
    context.resume = reinterpret_cast<void*>(entry);
    *static_cast<void**>(context.stack_pointer) = nullptr;
#else
    getcontext(&context.saved);
    char* bottom = end - STACK_BYTES + page_bytes();
    context.saved.uc_stack.ss_sp = bottom;
    context.saved.uc_stack.ss_size = static_cast<size_t>(top - bottom);
    context.saved.uc_link = nullptr;
    makecontext(&context.saved, entry, 0);
#endif
}

}  // namespace emulator
