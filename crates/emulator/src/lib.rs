//! A GPU for tests: CUDA's driver API on the CPU, running the kernel sources of `kernels`.
