// The kernels that were compiled into this process, by name.
#include "registry.h"

#include <map>
#include <string>

#include "fault.h"

namespace emulator {

static std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

Registration::Registration(Kernel kernel) {
    std::string name = kernel.name;
    if (!kernels().emplace(name, std::move(kernel)).second) {
        fail("two kernels are named %s", name.c_str());
    }
}

const Kernel* find_kernel(const char* name) {
    auto found = kernels().find(name);
    return found == kernels().end() ? nullptr : &found->second;
}

bool fits(const Kernel& kernel, Dim3 grid, Dim3 block, u32 shared_bytes) {
    bool grid_fits = grid.count() != 0 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535;
    bool block_fits = block.count() != 0 && block.count() <= kernel.max_threads && block.z <= 64;
    return grid_fits && block_fits && shared_bytes <= MAX_SHARED_BYTES;
}

}  // namespace emulator

EmulatorResult emulator_launch(const char* name, emulator::Dim3 grid, emulator::Dim3 block, unsigned shared_bytes,
                               void* const* parameters) {
    const emulator::Kernel* kernel = emulator::find_kernel(name);
    if (kernel == nullptr) {
        return EMULATOR_NOT_FOUND;
    }
    if (!emulator::fits(*kernel, grid, block, shared_bytes)) {
        return EMULATOR_INVALID_VALUE;
    }
    emulator::run_grid(kernel->name, grid, block, shared_bytes, kernel->run, parameters);
    return EMULATOR_SUCCESS;
}
