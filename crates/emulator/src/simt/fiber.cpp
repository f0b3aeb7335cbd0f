// Stacks of fibers, and how a fiber starts.
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

namespace emulator {

static const size_t STACK_BYTES = 128 * 1024;
static const size_t COLOURS = 32;
static const size_t COLOUR_BYTES = 128;

static size_t page_bytes() {
    static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return bytes;
}

Stack::Stack() {
    void* memory = mmap(nullptr, page_bytes() + STACK_BYTES, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page_bytes(), PROT_NONE) != 0) {
        std::perror("emulator: no memory for a thread's stack");
        std::abort();
    }
    memory_ = static_cast<char*>(memory);
}

Stack::~Stack() {
    if (memory_ != nullptr) {
        munmap(memory_, page_bytes() + STACK_BYTES);
    }
}

Stack::Stack(Stack&& other) noexcept : memory_(other.memory_) {
    other.memory_ = nullptr;
}

char* Stack::top() const {
    return memory_ + page_bytes() + STACK_BYTES;
}

bool Stack::overflowed_at(const void* address) const {
    const char* place = static_cast<const char*>(address);
    return place >= memory_ && place < memory_ + page_bytes();
}

void prepare(Context& context, const Stack& stack, unsigned colour, void (*entry)()) {
    char* top = stack.top() - (colour % COLOURS) * COLOUR_BYTES;
#if defined(__x86_64__)
    // A function expects its stack as a call leaves it: 8 bytes off a multiple of 16.
    context.stack_pointer = top - 8;
    context.frame_pointer = nullptr;
    context.resume = reinterpret_cast<void*>(entry);
    *static_cast<void**>(context.stack_pointer) = nullptr;
#else
    getcontext(&context.saved);
    context.saved.uc_stack.ss_sp = top - (STACK_BYTES - COLOURS * COLOUR_BYTES);
    context.saved.uc_stack.ss_size = STACK_BYTES - COLOURS * COLOUR_BYTES;
    context.saved.uc_link = nullptr;
    makecontext(&context.saved, entry, 0);
#endif
}

}  // namespace emulator
