// Opens the libraries of the folder that is given, as a host program does that was not linked to them, and makes a call to
// each.
#include <dlfcn.h>

#include <cstdio>
#include <string>

template <class F> static F* find(const std::string& folder, const char* library, const char* symbol) {
    void* handle = dlopen((folder + "/" + library).c_str(), RTLD_NOW | RTLD_LOCAL);
    void* found = handle != nullptr ? dlsym(handle, symbol) : nullptr;
    if (found == nullptr) {
        std::printf("%s, %s: %s\n", library, symbol, dlerror());
        return nullptr;
    }
    return reinterpret_cast<F*>(found);
}

int main(int count, char** arguments) {
    std::string folder = count == 2 ? arguments[1] : ".";
    auto* driver_version = find<int(int*)>(folder, "libcuda.so", "cuDriverGetVersion");
    auto* nvrtc_version = find<int(int*, int*)>(folder, "libnvrtc.so", "nvrtcVersion");
    auto* cublas_version = find<size_t()>(folder, "libcublasLt.so", "cublasLtGetVersion");
    if (driver_version == nullptr || nvrtc_version == nullptr || cublas_version == nullptr) {
        return 1;
    }
    int version = 0, major = 0, minor = 0;
    bool fine = driver_version(&version) == 0 && nvrtc_version(&major, &minor) == 0 && version == 13000 && major == 13 &&
                cublas_version() == 130000;
    std::printf(fine ? "fine\n" : "wrong versions\n");
    return fine ? 0 : 1;
}
