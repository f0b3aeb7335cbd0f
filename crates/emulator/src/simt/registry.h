// The kernels that were compiled into this process, by name, and how to launch one.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include "machine.h"

namespace emulator {

struct Parameter {
    size_t bytes;
    size_t alignment;
};

struct Kernel {
    const char* name;
    u32 max_threads;
    u32 blocks_per_multiprocessor;
    std::vector<Parameter> parameters;
    void (*run)(void* const* parameters);
};

// Calls `kernel` with the values that `parameters` point to.
template <auto kernel> struct Trampoline;

template <class... P, void (*kernel)(P...)> struct Trampoline<kernel> {
    static void run(void* const* parameters) { call(parameters, std::index_sequence_for<P...>()); }

    template <size_t... I> static void call(void* const* parameters, std::index_sequence<I...>) {
        static_cast<void>(parameters);
        kernel(*static_cast<P*>(parameters[I])...);
    }

    static Kernel describe(const char* name, u32 max_threads, u32 blocks_per_multiprocessor) {
        return {name, max_threads, blocks_per_multiprocessor, {Parameter{sizeof(P), alignof(P)}...}, run};
    }
};

template <auto kernel> Kernel describe(const char* name, u32 max_threads, u32 blocks_per_multiprocessor) {
    return Trampoline<kernel>::describe(name, max_threads, blocks_per_multiprocessor);
}

// Enters a kernel when the program starts.
struct Registration {
    explicit Registration(Kernel kernel);
};

// Null if there is none of that name.
const Kernel* find_kernel(const char* name);

// Do the kernel and the device allow a launch of this size?
bool fits(const Kernel& kernel, Dim3 grid, Dim3 block, u32 shared_bytes);

}  // namespace emulator

// What emulator_launch answers, in the driver API's numbers.
enum EmulatorResult {
    EMULATOR_SUCCESS = 0,
    EMULATOR_INVALID_VALUE = 1,
    EMULATOR_NOT_FOUND = 500,
};

// Runs a kernel to its end. `parameters` points to the values, as for cuLaunchKernel. More threads or shared memory than
// the kernel or the device allows are an invalid value.
EmulatorResult emulator_launch(const char* name, emulator::Dim3 grid, emulator::Dim3 block, unsigned shared_bytes,
                               void* const* parameters);

// The same with the values themselves; their types must be the parameters' types exactly.
template <class... P>
EmulatorResult emulator_run(const char* name, emulator::Dim3 grid, emulator::Dim3 block, unsigned shared_bytes, P... values) {
    void* parameters[] = {&values..., nullptr};
    return emulator_launch(name, grid, block, shared_bytes, parameters);
}
