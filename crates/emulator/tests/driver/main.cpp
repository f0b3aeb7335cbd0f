// Tests of the emulated driver, NVRTC and cuBLASLt, by calls as a host program makes them. Run with two devices of 1 GiB.
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "driver/cuda.h"
#include "simt.h"

#define EXPECT(condition)                                                              \
    do {                                                                               \
        if (!(condition)) {                                                            \
            std::printf("%s:%d: expected %s\n", __FILE__, __LINE__, #condition);       \
            std::exit(1);                                                              \
        }                                                                              \
    } while (false)

extern "C" {
CUresult cuInit(unsigned);
CUresult cuDeviceGetCount(int*);
CUresult cuDeviceGetAttribute(int*, CUdevice_attribute, CUdevice);
CUresult cuDevicePrimaryCtxRetain(CUcontext*, CUdevice);
CUresult cuCtxSetCurrent(CUcontext);
CUresult cuCtxSynchronize();
CUresult cuCtxEnablePeerAccess(CUcontext, unsigned);
CUresult cuMemAlloc_v2(CUdeviceptr*, size_t);
CUresult cuMemFree_v2(CUdeviceptr);
CUresult cuMemGetInfo_v2(size_t*, size_t*);
CUresult cuMemGetAllocationGranularity(size_t*, const CUmemAllocationProp*, int);
CUresult cuMemCreate(CUmemGenericAllocationHandle*, size_t, const CUmemAllocationProp*, unsigned long long);
CUresult cuMemRelease(CUmemGenericAllocationHandle);
CUresult cuMemExportToShareableHandle(void*, CUmemGenericAllocationHandle, int, unsigned long long);
CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle*, void*, int);
CUresult cuMemAddressReserve(CUdeviceptr*, size_t, size_t, CUdeviceptr, unsigned long long);
CUresult cuMemAddressFree(CUdeviceptr, size_t);
CUresult cuMemMap(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long);
CUresult cuMemSetAccess(CUdeviceptr, size_t, const CUmemAccessDesc*, size_t);
CUresult cuMemUnmap(CUdeviceptr, size_t);
CUresult cuMemHostAlloc(void**, size_t, unsigned);
CUresult cuMemFreeHost(void*);
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr, const void*, size_t, CUstream);
CUresult cuMemcpyDtoHAsync_v2(void*, CUdeviceptr, size_t, CUstream);
CUresult cuMemcpyDtoH_v2(void*, CUdeviceptr, size_t);
CUresult cuMemsetD32Async(CUdeviceptr, unsigned, size_t, CUstream);
CUresult cuStreamCreate(CUstream*, unsigned);
CUresult cuStreamDestroy_v2(CUstream);
CUresult cuStreamSynchronize(CUstream);
CUresult cuStreamQuery(CUstream);
CUresult cuLaunchHostFunc(CUstream, void (*)(void*), void*);
CUresult cuStreamWaitEvent(CUstream, CUevent, unsigned);
CUresult cuStreamBeginCapture_v2(CUstream, CUstreamCaptureMode);
CUresult cuStreamEndCapture(CUstream, CUgraph*);
CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus*);
CUresult cuEventCreate(CUevent*, unsigned);
CUresult cuEventRecord(CUevent, CUstream);
CUresult cuEventSynchronize(CUevent);
CUresult cuEventQuery(CUevent);
CUresult cuEventElapsedTime_v2(float*, CUevent, CUevent);
CUresult cuEventDestroy_v2(CUevent);
CUresult cuGraphInstantiateWithFlags(CUgraphExec*, CUgraph, unsigned long long);
CUresult cuGraphLaunch(CUgraphExec, CUstream);
CUresult cuGraphGetNodes(CUgraph, CUgraphNode*, size_t*);
CUresult cuGraphDestroy(CUgraph);
CUresult cuGraphExecDestroy(CUgraphExec);
CUresult cuModuleLoadData(CUmodule*, const void*);
CUresult cuModuleGetFunction(CUfunction*, CUmodule, const char*);
CUresult cuModuleUnload(CUmodule);
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int);
CUresult cuLaunchKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void**,
                        void**);
CUresult cuGetErrorName(CUresult, const char**);

int nvrtcCreateProgram(void**, const char*, const char*, int, const char* const*, const char* const*);
int nvrtcCompileProgram(void*, int, const char* const*);
int nvrtcGetCUBINSize(void*, size_t*);
int nvrtcGetCUBIN(void*, char*);
int nvrtcDestroyProgram(void**);

int cublasLtCreate(void**);
int cublasLtMatmulDescCreate(void**, int, int);
int cublasLtMatmulDescSetAttribute(void*, int, const void*, size_t);
int cublasLtMatrixLayoutCreate(void**, int, u64, u64, i64);
int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*, void*,
                   void*, const void*, void*, size_t, CUstream);
}

static CUmodule module;
static CUfunction add;

// x[i] += value, on the stream.
static CUresult launch_add(CUstream stream, CUdeviceptr x, float value, i32 count) {
    void* parameters[] = {&x, &value, &count};
    unsigned blocks = (static_cast<unsigned>(count) + 255) / 256;
    return cuLaunchKernel(add, blocks, 1, 1, 256, 1, 1, 0, stream, parameters, nullptr);
}

static float first(CUstream stream, CUdeviceptr x) {
    float value = 0.0f;
    EXPECT(cuMemcpyDtoHAsync_v2(&value, x, 4, stream) == CUDA_SUCCESS);
    EXPECT(cuStreamSynchronize(stream) == CUDA_SUCCESS);
    return value;
}

static void compile_and_load() {
    const char* source = "#include \"device.cuh\"\n";
    const char* header = "";
    const char* name = "device.cuh";
    const char* option = "--gpu-architecture=sm_90a";
    void* program = nullptr;
    EXPECT(nvrtcCreateProgram(&program, source, "test.cu", 0, nullptr, nullptr) == 0);
    EXPECT(nvrtcCompileProgram(program, 1, &option) == 6);  // the header is missing
    EXPECT(nvrtcDestroyProgram(&program) == 0);
    EXPECT(nvrtcCreateProgram(&program, source, "test.cu", 1, &header, &name) == 0);
    EXPECT(nvrtcCompileProgram(program, 1, &option) == 0);
    size_t bytes = 0;
    EXPECT(nvrtcGetCUBINSize(program, &bytes) == 0 && bytes > 8);
    std::vector<char> image(bytes);
    EXPECT(nvrtcGetCUBIN(program, image.data()) == 0);
    EXPECT(nvrtcDestroyProgram(&program) == 0);

    EXPECT(cuModuleLoadData(&module, "\177ELF") == CUDA_ERROR_INVALID_IMAGE);
    EXPECT(cuModuleLoadData(&module, image.data()) == CUDA_SUCCESS);
    EXPECT(cuModuleGetFunction(&add, module, "no_such_kernel") == CUDA_ERROR_NOT_FOUND);
    EXPECT(cuModuleGetFunction(&add, module, "test_add") == CUDA_SUCCESS);
}

static void devices() {
    int count = 0, major = 0;
    CUcontext contexts[2];
    EXPECT(cuDeviceGetCount(&count) == CUDA_ERROR_NOT_INITIALIZED);
    EXPECT(cuInit(0) == CUDA_SUCCESS);
    EXPECT(cuDeviceGetCount(&count) == CUDA_SUCCESS && count == 2);
    EXPECT(cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 0) == CUDA_SUCCESS && major == 9);
    EXPECT(cuDevicePrimaryCtxRetain(&contexts[0], 0) == CUDA_SUCCESS);
    EXPECT(cuDevicePrimaryCtxRetain(&contexts[1], 1) == CUDA_SUCCESS);
    EXPECT(cuDevicePrimaryCtxRetain(&contexts[1], 2) == CUDA_ERROR_INVALID_DEVICE);
    EXPECT(cuDevicePrimaryCtxRetain(&contexts[1], 1) == CUDA_SUCCESS);
    EXPECT(cuCtxSetCurrent(contexts[0]) == CUDA_SUCCESS);
    EXPECT(cuCtxEnablePeerAccess(contexts[1], 0) == CUDA_SUCCESS);
    EXPECT(cuCtxEnablePeerAccess(contexts[1], 0) == CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
    const char* name = nullptr;
    EXPECT(cuGetErrorName(CUDA_ERROR_OUT_OF_MEMORY, &name) == CUDA_SUCCESS);
    EXPECT(std::strcmp(name, "CUDA_ERROR_OUT_OF_MEMORY") == 0);
}

static void memory() {
    size_t free = 0, total = 0;
    CUdeviceptr large = 0, small = 0;
    EXPECT(cuMemGetInfo_v2(&free, &total) == CUDA_SUCCESS && free == total && total == size_t(1) << 30);
    EXPECT(cuMemAlloc_v2(&large, total - 512) == CUDA_SUCCESS);
    EXPECT(cuMemAlloc_v2(&small, 513) == CUDA_ERROR_OUT_OF_MEMORY);
    EXPECT(cuMemAlloc_v2(&small, 100) == CUDA_SUCCESS && small % 256 == 0);
    EXPECT(cuMemGetInfo_v2(&free, &total) == CUDA_SUCCESS && free == 256);
    u32 word = 0;
    EXPECT(cuMemcpyDtoH_v2(&word, large + (total - 516), 4) == CUDA_SUCCESS && word == ~0u);
    EXPECT(cuMemcpyDtoH_v2(&word, small + 98, 4) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemFree_v2(large + 256) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemFree_v2(large) == CUDA_SUCCESS);
    EXPECT(cuMemFree_v2(large) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemFree_v2(small) == CUDA_SUCCESS);
    EXPECT(cuMemGetInfo_v2(&free, &total) == CUDA_SUCCESS && free == total);
}

// Memory that two mappings share, as two processes would; see also the suites of `comm`, where they are two.
static void shared_memory(CUstream stream) {
    const CUmemAllocationProp properties = {CU_MEM_ALLOCATION_TYPE_PINNED,
                                            CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                            {CU_MEM_LOCATION_TYPE_DEVICE, 0},
                                            nullptr,
                                            {}};
    const CUmemAccessDesc access[] = {{{CU_MEM_LOCATION_TYPE_DEVICE, 0}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE}};
    size_t unit = 0, free = 0, total = 0;
    CUmemGenericAllocationHandle made = 0, imported = 0;
    CUdeviceptr own = 0, theirs = 0;
    int file = -1;
    EXPECT(cuMemGetAllocationGranularity(&unit, &properties, 0) == CUDA_SUCCESS && unit == size_t(2) << 20);
    EXPECT(cuMemCreate(&made, unit / 2, &properties, 0) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemCreate(&made, size_t(2) << 30, &properties, 0) == CUDA_ERROR_OUT_OF_MEMORY);
    EXPECT(cuMemCreate(&made, unit, &properties, 0) == CUDA_SUCCESS);
    EXPECT(cuMemExportToShareableHandle(&file, made, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0) == CUDA_SUCCESS && file > 2);
    void* number = reinterpret_cast<void*>(static_cast<intptr_t>(file));
    EXPECT(cuMemImportFromShareableHandle(&imported, nullptr, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemImportFromShareableHandle(&imported, number, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) == CUDA_SUCCESS);
    EXPECT(close(file) == 0);
    EXPECT(cuMemAddressReserve(&own, unit, 0, 0, 0) == CUDA_SUCCESS && own % unit == 0);
    EXPECT(cuMemAddressReserve(&theirs, unit, 0, 0, 0) == CUDA_SUCCESS && theirs != own);
    EXPECT(cuMemMap(own, unit, 0, made, 0) == CUDA_SUCCESS && cuMemMap(theirs, unit, 0, imported, 0) == CUDA_SUCCESS);
    EXPECT(cuMemMap(own, unit, 0, made, 0) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemRelease(made) == CUDA_SUCCESS && cuMemRelease(imported) == CUDA_SUCCESS);
    EXPECT(cuMemRelease(made) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemsetD32Async(own, 0, 1, stream) == CUDA_ERROR_INVALID_VALUE);  // not opened to the device yet
    EXPECT(cuMemSetAccess(own, unit, access, 1) == CUDA_SUCCESS && cuMemSetAccess(theirs, unit, access, 1) == CUDA_SUCCESS);
    u32 word = 0;
    EXPECT(cuMemcpyDtoH_v2(&word, theirs, 4) == CUDA_SUCCESS && word == ~0u);
    EXPECT(cuMemsetD32Async(own, __float_as_uint(1.5f), 1, stream) == CUDA_SUCCESS);
    EXPECT(launch_add(stream, theirs, 1.0f, 1) == CUDA_SUCCESS);
    EXPECT(first(stream, own) == 2.5f);
    EXPECT(cuMemFree_v2(own) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemAddressFree(own, unit) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemUnmap(own, unit) == CUDA_SUCCESS && cuMemUnmap(own, unit) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(first(stream, theirs) == 2.5f);
    EXPECT(cuMemUnmap(theirs, unit) == CUDA_SUCCESS);
    EXPECT(cuMemAddressFree(own, unit) == CUDA_SUCCESS && cuMemAddressFree(theirs, unit) == CUDA_SUCCESS);
    EXPECT(cuMemGetInfo_v2(&free, &total) == CUDA_SUCCESS && total - free == 4096);
}

static void launches(CUstream stream, CUdeviceptr x) {
    CUdeviceptr bad = x;
    void* parameters[] = {&bad};
    EXPECT(cuLaunchKernel(add, 1, 1, 1, 512, 1, 1, 0, stream, parameters, nullptr) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuLaunchKernel(add, 1, 1, 1, 32, 1, 1, 64 << 10, stream, parameters, nullptr) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuFuncSetAttribute(add, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 228 << 10) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemsetD32Async(x, __float_as_uint(1.0f), 1000, stream) == CUDA_SUCCESS);
    EXPECT(launch_add(stream, x, 2.0f, 1000) == CUDA_SUCCESS);
    EXPECT(first(stream, x) == 3.0f);
}

static void pinned(CUstream stream, CUdeviceptr x) {
    void* host = nullptr;
    CUevent start, end;
    EXPECT(cuMemHostAlloc(&host, 4000, 0) == CUDA_SUCCESS);
    EXPECT(cuEventCreate(&start, 0) == CUDA_SUCCESS && cuEventCreate(&end, 0) == CUDA_SUCCESS);
    EXPECT(cuEventRecord(start, stream) == CUDA_SUCCESS);
    float* numbers = static_cast<float*>(host);
    for (i32 i = 0; i < 1000; i++) {
        numbers[i] = static_cast<float>(i);
    }
    EXPECT(cuMemcpyHtoDAsync_v2(x, host, 4000, stream) == CUDA_SUCCESS);
    EXPECT(launch_add(stream, x, 1.0f, 1000) == CUDA_SUCCESS);
    EXPECT(cuMemcpyDtoHAsync_v2(host, x, 4000, stream) == CUDA_SUCCESS);
    EXPECT(cuEventRecord(end, stream) == CUDA_SUCCESS);
    // Late, nothing has happened before somebody waits.
    bool late = std::getenv("PHALANX_EMULATOR_LATE")[0] == '1', beside = std::getenv("PHALANX_EMULATOR_BESIDE")[0] == '1';
    EXPECT(beside || numbers[7] == (late ? 7.0f : 8.0f));
    EXPECT(cuEventSynchronize(end) == CUDA_SUCCESS);
    EXPECT(numbers[7] == 8.0f);
    float milliseconds = -1.0f;
    EXPECT(cuEventElapsedTime_v2(&milliseconds, start, end) == CUDA_SUCCESS && milliseconds >= 0.0f);

    // A second stream that waits for the first.
    CUstream second;
    EXPECT(cuStreamCreate(&second, 1) == CUDA_SUCCESS);
    EXPECT(launch_add(stream, x, 1.0f, 1000) == CUDA_SUCCESS);
    EXPECT(cuEventRecord(end, stream) == CUDA_SUCCESS);
    EXPECT(cuStreamWaitEvent(second, end, 0) == CUDA_SUCCESS);
    EXPECT(launch_add(second, x, 1.0f, 1000) == CUDA_SUCCESS);
    EXPECT(first(second, x) == 3.0f);
    EXPECT(cuStreamDestroy_v2(second) == CUDA_SUCCESS);
    EXPECT(cuStreamSynchronize(second) == CUDA_ERROR_INVALID_HANDLE);
    EXPECT(cuEventDestroy_v2(start) == CUDA_SUCCESS && cuEventDestroy_v2(end) == CUDA_SUCCESS);
    EXPECT(cuMemFreeHost(host) == CUDA_SUCCESS);
}

// The host goes on while the device waits for it: only where streams run beside it.
static void waiting(CUstream stream) {
    if (std::getenv("PHALANX_EMULATOR_BESIDE")[0] != '1') {
        return;
    }
    static std::atomic<bool> may_end{false};
    CUevent end;
    EXPECT(cuEventCreate(&end, 0) == CUDA_SUCCESS);
    EXPECT(cuLaunchHostFunc(stream, [](void*) { while (!may_end) {} }, nullptr) == CUDA_SUCCESS);
    EXPECT(cuEventRecord(end, stream) == CUDA_SUCCESS);
    EXPECT(cuEventQuery(end) == CUDA_ERROR_NOT_READY && cuStreamQuery(stream) == CUDA_ERROR_NOT_READY);
    may_end = true;
    EXPECT(cuEventSynchronize(end) == CUDA_SUCCESS && cuEventQuery(end) == CUDA_SUCCESS);
    EXPECT(cuStreamSynchronize(stream) == CUDA_SUCCESS && cuStreamQuery(stream) == CUDA_SUCCESS);
    EXPECT(cuEventDestroy_v2(end) == CUDA_SUCCESS);
}

static void graphs(CUstream stream, CUdeviceptr x) {
    CUgraph graph;
    CUgraphExec executable;
    CUstreamCaptureStatus status;
    EXPECT(cuMemsetD32Async(x, 0, 1000, stream) == CUDA_SUCCESS);
    EXPECT(cuStreamBeginCapture_v2(nullptr, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL) == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    EXPECT(cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL) == CUDA_SUCCESS);
    EXPECT(cuStreamIsCapturing(stream, &status) == CUDA_SUCCESS && status == CU_STREAM_CAPTURE_STATUS_ACTIVE);
    EXPECT(launch_add(stream, x, 1.0f, 1000) == CUDA_SUCCESS);
    EXPECT(launch_add(stream, x, 2.0f, 1000) == CUDA_SUCCESS);
    EXPECT(cuStreamEndCapture(stream, &graph) == CUDA_SUCCESS);
    EXPECT(first(stream, x) == 0.0f);
    size_t count = 0;
    EXPECT(cuGraphGetNodes(graph, nullptr, &count) == CUDA_SUCCESS && count == 2);
    EXPECT(cuGraphInstantiateWithFlags(&executable, graph, 0) == CUDA_SUCCESS);
    EXPECT(cuGraphDestroy(graph) == CUDA_SUCCESS);
    EXPECT(cuGraphLaunch(executable, stream) == CUDA_SUCCESS && cuGraphLaunch(executable, stream) == CUDA_SUCCESS);
    EXPECT(first(stream, x) == 6.0f);
    EXPECT(cuGraphExecDestroy(executable) == CUDA_SUCCESS);

    // What a capture forbids ends it.
    CUdeviceptr y = 0;
    EXPECT(cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL) == CUDA_SUCCESS);
    EXPECT(cuMemAlloc_v2(&y, 256) == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    EXPECT(launch_add(stream, x, 1.0f, 1000) == CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    EXPECT(cuStreamEndCapture(stream, &graph) == CUDA_ERROR_STREAM_CAPTURE_INVALIDATED && graph == nullptr);
    EXPECT(cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL) == CUDA_SUCCESS);
    EXPECT(cuStreamSynchronize(stream) == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    EXPECT(cuStreamEndCapture(stream, &graph) == CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    EXPECT(first(stream, x) == 6.0f);
}

// d[m×n] = aᵀ · b, a stored k×m, in bf16; the result in f32.
static void multiplication(CUstream stream, CUdeviceptr memory) {
    const u64 m = 19, n = 3, k = 40;
    std::vector<u16> a(k * m), b(k * n);
    std::vector<float> d(m * n);
    for (size_t i = 0; i < a.size(); i++) {
        a[i] = static_cast<u16>(emulator_bf16(static_cast<float>(i % 13) - 6.0f));
    }
    for (size_t i = 0; i < b.size(); i++) {
        b[i] = static_cast<u16>(emulator_bf16(static_cast<float>(i % 7) - 3.0f));
    }
    void *library, *operation, *layout_a, *layout_b, *layout_d;
    i32 transposed = 1;
    EXPECT(cublasLtCreate(&library) == 0 && cublasLtMatmulDescCreate(&operation, 68, 0) == 0);
    EXPECT(cublasLtMatmulDescSetAttribute(operation, 3, &transposed, sizeof transposed) == 0);
    EXPECT(cublasLtMatrixLayoutCreate(&layout_a, 14, k, m, k) == 0);
    EXPECT(cublasLtMatrixLayoutCreate(&layout_b, 14, k, n, k) == 0);
    EXPECT(cublasLtMatrixLayoutCreate(&layout_d, 0, m, n, m) == 0);
    CUdeviceptr device_a = memory, device_b = memory + 2048, device_d = memory + 3072;
    EXPECT(cuMemcpyHtoDAsync_v2(device_a, a.data(), 2 * a.size(), stream) == CUDA_SUCCESS);
    EXPECT(cuMemcpyHtoDAsync_v2(device_b, b.data(), 2 * b.size(), stream) == CUDA_SUCCESS);
    float alpha = 1.0f, beta = 0.0f;
    void* pd = reinterpret_cast<void*>(device_d);
    EXPECT(cublasLtMatmul(library, operation, &alpha, reinterpret_cast<void*>(device_a), layout_a,
                          reinterpret_cast<void*>(device_b), layout_b, &beta, pd, layout_d, pd, layout_d, nullptr, nullptr, 0,
                          stream) == 0);
    EXPECT(cuMemcpyDtoHAsync_v2(d.data(), device_d, 4 * d.size(), stream) == CUDA_SUCCESS);
    EXPECT(cuStreamSynchronize(stream) == CUDA_SUCCESS);
    for (u64 row = 0; row < m; row++) {
        for (u64 col = 0; col < n; col++) {
            float sum = 0.0f;
            for (u64 i = 0; i < k; i++) {
                sum += __uint_as_float(u32(a[row * k + i]) << 16) * __uint_as_float(u32(b[col * k + i]) << 16);
            }
            EXPECT(d[col * m + row] == sum);
        }
    }
}

// A kernel writes behind an allocation: the process must end.
static void overrun() {
    CUdeviceptr x = 0;
    CUfunction wrong;
    EXPECT(cuMemAlloc_v2(&x, 4000) == CUDA_SUCCESS);
    EXPECT(cuModuleGetFunction(&wrong, module, "wrong_address") == CUDA_SUCCESS);
    void* parameters[] = {&x};
    EXPECT(cuLaunchKernel(wrong, 1, 1, 1, 32, 1, 1, 0, nullptr, parameters, nullptr) == CUDA_SUCCESS);
    std::printf("it went unnoticed\n");
}

int main(int count, char**) {
    devices();
    compile_and_load();
    if (count == 2) {
        overrun();
        return 0;
    }
    memory();
    CUstream stream;
    CUdeviceptr x = 0;
    EXPECT(cuStreamCreate(&stream, 1) == CUDA_SUCCESS);
    EXPECT(cuMemAlloc_v2(&x, 4000) == CUDA_SUCCESS);
    shared_memory(stream);
    launches(stream, x);
    pinned(stream, x);
    waiting(stream);
    graphs(stream, x);
    multiplication(stream, x);
    EXPECT(cuCtxSynchronize() == CUDA_SUCCESS);
    EXPECT(cuMemFree_v2(x) == CUDA_SUCCESS);
    EXPECT(cuStreamDestroy_v2(stream) == CUDA_SUCCESS);
    EXPECT(cuModuleUnload(module) == CUDA_SUCCESS);
    EXPECT(launch_add(nullptr, x, 1.0f, 1) == CUDA_ERROR_INVALID_HANDLE);
    std::printf("fine\n");
    return 0;
}
