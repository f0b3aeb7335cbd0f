// Modules, functions and launches. All kernels are compiled into this library; a module is only the leave to use them.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>

#include "../simt/registry.h"
#include "handles.h"
#include "stream.h"

namespace emulator {

struct Function {
    const Kernel& kernel;
    std::atomic<u32> dynamic_shared_bytes{48 * 1024};  // that a launch may ask for

    explicit Function(const Kernel& k) : kernel(k) {}
};

struct Module {
    std::mutex mutex;
    std::map<std::string, CUfunction> functions;  // those that were asked for
};

// The values of a launch's parameters, kept for as long as a graph may want them.
class Arguments {
  public:
    Arguments(const Kernel& kernel, void* const* values) {
        size_t offset = 0;
        std::vector<size_t> offsets;
        for (const Parameter& parameter : kernel.parameters) {
            offset = (offset + parameter.alignment - 1) / parameter.alignment * parameter.alignment;
            offsets.push_back(offset);
            offset += parameter.bytes;
        }
        memory_.resize(offset / sizeof(std::max_align_t) + 1);
        char* bytes = reinterpret_cast<char*>(memory_.data());
        for (size_t i = 0; i < offsets.size(); i++) {
            std::memcpy(bytes + offsets[i], values[i], kernel.parameters[i].bytes);
            pointers_.push_back(bytes + offsets[i]);
        }
    }
    Arguments(const Arguments&) = delete;
    Arguments& operator=(const Arguments&) = delete;

    void* const* pointers() const { return pointers_.data(); }

  private:
    std::vector<std::max_align_t> memory_;
    std::vector<void*> pointers_;
};

// That fit on a multiprocessor, by the kernel's launch bounds.
static u32 promised_blocks(const Kernel& kernel) {
    return std::max(1u, kernel.blocks_per_multiprocessor);
}

static CUresult launch(CUfunction function, Dim3 grid, Dim3 block, u32 shared_bytes, CUstream handle, void** parameters) {
    Stream* stream = find_stream(handle);
    if (stream == nullptr || !handles<Function>().knows(function)) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    const Kernel& kernel = function->kernel;
    if (!fits(kernel, grid, block, shared_bytes) || shared_bytes > function->dynamic_shared_bytes) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (parameters == nullptr && !kernel.parameters.empty()) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    auto arguments = std::make_shared<Arguments>(kernel, parameters);
    return submit(*stream, [&kernel, grid, block, shared_bytes, arguments] {
        run_grid(kernel.name, grid, block, shared_bytes, kernel.run, arguments->pointers());
    });
}

}  // namespace emulator

using namespace emulator;

EXPORT CUresult cuModuleLoadData(CUmodule* handle, const void* image) {
    if (current_device() == nullptr) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    // What the emulated NVRTC makes.
    if (std::strncmp(static_cast<const char*>(image), "emulated", 8) != 0) {
        return CUDA_ERROR_INVALID_IMAGE;
    }
    *handle = handles<Module>().add(std::make_unique<Module>());
    return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleLoadDataEx(CUmodule* handle, const void* image, unsigned, int*, void**) {
    return cuModuleLoadData(handle, image);
}

EXPORT CUresult cuModuleUnload(CUmodule handle) {
    std::shared_ptr<Module> module = handles<Module>().remove(handle);
    if (module == nullptr) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    for (auto& entry : module->functions) {
        handles<Function>().remove(entry.second);
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    if (!handles<Module>().knows(module)) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    const Kernel* kernel = find_kernel(name);
    if (kernel == nullptr) {
        return CUDA_ERROR_NOT_FOUND;
    }
    std::lock_guard<std::mutex> lock(module->mutex);
    CUfunction& entry = module->functions[name];
    if (entry == nullptr) {
        entry = handles<Function>().add(std::make_unique<Function>(*kernel));
    }
    *function = entry;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncGetName(const char** name, CUfunction function) {
    if (!handles<Function>().knows(function)) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    *name = function->kernel.name;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
    if (!handles<Function>().knows(function)) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    const Kernel& kernel = function->kernel;
    switch (attribute) {
        case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
            *value = static_cast<int>(kernel.max_threads);
            return CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_NUM_REGS:
            // What a compiler may use at most, given the launch bounds.
            *value = static_cast<int>(std::min(255u, 65536 / (kernel.max_threads * promised_blocks(kernel))));
            return CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_PTX_VERSION:
        case CU_FUNC_ATTRIBUTE_BINARY_VERSION:
            *value = 90;
            return CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
            *value = static_cast<int>(function->dynamic_shared_bytes);
            return CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
            *value = -1;
            return CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:  // of static shared memory: not known here
        case CU_FUNC_ATTRIBUTE_CONST_SIZE_BYTES:
        case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
        case CU_FUNC_ATTRIBUTE_CACHE_MODE_CA:
            *value = 0;
            return CUDA_SUCCESS;
    }
    return CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    if (!handles<Function>().knows(function)) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (attribute == CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT) {
        return value >= -1 && value <= 100 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
    }
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value < 0 || u32(value) > MAX_SHARED_BYTES) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    function->dynamic_shared_bytes = static_cast<u32>(value);
    return CUDA_SUCCESS;
}

// As many as the launch bounds promise, if threads and dynamic shared memory allow.
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction function, int threads,
                                                            size_t shared_bytes) {
    if (!handles<Function>().knows(function)) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    const Kernel& kernel = function->kernel;
    if (threads <= 0 || u32(threads) > kernel.max_threads || shared_bytes > function->dynamic_shared_bytes) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    size_t by_threads = 2048 / ((static_cast<size_t>(threads) + 31) / 32 * 32);
    size_t by_memory = 228 * 1024 / (shared_bytes + 1024);
    size_t most = std::min(32u, promised_blocks(kernel));
    *blocks = static_cast<int>(std::min({by_threads, by_memory, most}));
    return CUDA_SUCCESS;
}

EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, CUfunction function, int threads,
                                                                     size_t shared_bytes, unsigned) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared_bytes);
}

EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                               unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream, void** parameters,
                               void** extra) {
    if (extra != nullptr) {
        return CUDA_ERROR_NOT_SUPPORTED;
    }
    return launch(function, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, stream, parameters);
}

// Blocks run one after another, so those that wait for one another (cooperative launches, clusters) cannot be had.
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
    for (unsigned i = 0; i < config->attribute_count; i++) {
        const CUlaunchAttribute& attribute = config->attributes[i];
        bool cluster = attribute.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION &&
                       u64(attribute.cluster.x) * attribute.cluster.y * attribute.cluster.z > 1;
        if (cluster || (attribute.id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE && attribute.cooperative != 0)) {
            return CUDA_ERROR_NOT_SUPPORTED;
        }
    }
    return cuLaunchKernel(function, config->grid_x, config->grid_y, config->grid_z, config->block_x, config->block_y,
                          config->block_z, config->shared_bytes, config->stream, parameters, extra);
}
