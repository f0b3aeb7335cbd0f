// How a mistake of a kernel ends the process.
#include "fault.h"

#include <atomic>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>

#include <unistd.h>

namespace emulator {

// Writes where the kernel is to `text`; gives the length. No allocation: signal handlers use it.
static int describe(char* text, size_t size) {
    const Thread* thread = running_thread();
    if (thread == nullptr) {
        return std::snprintf(text, size, "emulator: ");
    }
    const Block& block = *thread->block;
    return std::snprintf(text, size, "emulator: kernel %s, block (%u, %u, %u), thread (%u, %u, %u): ", block.kernel,
                         block.index.x, block.index.y, block.index.z, thread->index.x, thread->index.y, thread->index.z);
}

[[noreturn]] static void die(Place place, const char* format, va_list arguments) {
    char text[1024];
    int length = describe(text, sizeof text);
    length += std::vsnprintf(text + length, sizeof text - length, format, arguments);
    if (place.file != nullptr && length < static_cast<int>(sizeof text)) {
        std::snprintf(text + length, sizeof text - length, " (%s:%d)", place.file, place.line);
    }
    std::fprintf(stderr, "%s\n", text);
    std::abort();
}

void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    die(Place(), format, arguments);
}

void fail_at(Place place, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    die(place, format, arguments);
}

const char* name_of(Meeting kind) {
    switch (kind) {
        case Meeting::None:
            return "nothing";
        case Meeting::WarpBarrier:
            return "__syncwarp";
        case Meeting::Shuffle:
            return "a shuffle";
        case Meeting::Ballot:
            return "a ballot";
        case Meeting::Mma:
            return "mma_bf16";
        case Meeting::BlockBarrier:
            return "__syncthreads";
        case Meeting::BlockBarrierOr:
            return "__syncthreads_or";
        case Meeting::BlockBarrierAnd:
            return "__syncthreads_and";
        case Meeting::BlockBarrierCount:
            return "__syncthreads_count";
    }
    return "an unknown meeting";
}

void fail_deadlock(const Block& block) {
    std::fprintf(stderr, "emulator: kernel %s, block (%u, %u, %u): every thread waits for another one:\n", block.kernel,
                 block.index.x, block.index.y, block.index.z);
    // One line for each run of threads, in the order in which they ran, that wait at the same place.
    const Thread* thread = block.first;
    do {
        const Thread* first = thread;
        u32 count = 0;
        do {
            count++;
            thread = thread->next;
        } while (thread != block.first && thread->waits_for == first->waits_for && thread->place.line == first->place.line);
        const char* file = first->place.file != nullptr ? first->place.file : "?";
        if (first->waits_for == Meeting::None) {
            std::fprintf(stderr, "  %u threads from (%u, %u, %u) on have returned\n", count, first->index.x, first->index.y,
                         first->index.z);
        } else {
            std::fprintf(stderr, "  %u threads from (%u, %u, %u) on are at %s (%s:%d)\n", count, first->index.x,
                         first->index.y, first->index.z, name_of(first->waits_for), file, first->place.line);
        }
    } while (thread != block.first);
    std::abort();
}

static const int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
static struct sigaction earlier[4];

static std::atomic<AddressBook> address_book{nullptr};

void ask_about_addresses(AddressBook book) {
    address_book = book;
}

// What is at a bad address; an empty text if nothing is known.
static void describe_address(const void* address, char* text, size_t bytes) {
    text[0] = '\0';
    AddressBook book = address_book;
    if (const char* overrun = overrun_at(address)) {
        std::snprintf(text, bytes, ": %s", overrun);
    } else if (book != nullptr && bytes > 2 && book(address, text + 2, bytes - 2)) {
        text[0] = ':';
        text[1] = ' ';
    }
}

// Says where the kernel is, then puts the handler back that was there before: the instruction fails again, now for good.
static void on_signal(int signal, siginfo_t* info, void*) {
    if (running_thread() != nullptr) {
        char text[512], address[200];
        int length = describe(text, sizeof text);
        describe_address(info->si_addr, address, sizeof address);
        length += std::snprintf(text + length, sizeof text - length, "signal %d at address %p%s\n", signal, info->si_addr, address);
        ssize_t written = write(STDERR_FILENO, text, static_cast<size_t>(length));
        static_cast<void>(written);
    }
    for (size_t i = 0; i < 4; i++) {
        if (SIGNALS[i] == signal) {
            sigaction(signal, &earlier[i], nullptr);
        }
    }
}

void report_signals() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (size_t i = 0; i < 4; i++) {
            sigaction(SIGNALS[i], &action, &earlier[i]);
        }
    });
    // A fiber whose stack is full cannot run a handler on it.
    static thread_local std::unique_ptr<char[]> memory;
    stack_t current;
    if (memory == nullptr && sigaltstack(nullptr, &current) == 0 && (current.ss_flags & SS_DISABLE)) {
        const size_t bytes = 64 * 1024;
        memory.reset(new char[bytes]);
        stack_t stack = {};
        stack.ss_sp = memory.get();
        stack.ss_size = bytes;
        sigaltstack(&stack, nullptr);
    }
}

}  // namespace emulator
