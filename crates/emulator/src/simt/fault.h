// How a mistake of a kernel ends the process: with a sentence that names the kernel, the block and the thread.
#pragma once

#include "machine.h"

namespace emulator {

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
[[noreturn]] void fail_at(Place place, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Every thread of the block waits for another one: says who waits where.
[[noreturn]] void fail_deadlock(const Block& block);

// Makes a signal for a bad address or instruction say which kernel it came from before the process dies of it. May be
// called often. Also gives the calling OS thread a stack for handlers, should it have none.
void report_signals();

// Who knows more about addresses: writes a sentence about one to `text`; false if it knows nothing. Called in a signal handler.
using AddressBook = bool (*)(const void* address, char* text, size_t bytes);
void ask_about_addresses(AddressBook book);

}  // namespace emulator
