// How functions shared by CPU and CUDA code are declared.
//
// Note [One source, several instruction sets]
// Each <stem>_cpu.cpp is compiled once per instruction set (baseline, AVX2, AVX-512). A function
// that is defined in a header and not inlined would be emitted by several of these objects under
// one name, and the linker might keep the AVX-512 copy for a machine that cannot run it. Shared
// functions are therefore `static` and always inlined.
#pragma once

#if defined(__CUDACC__) && !defined(VTOK_EMULATE_CUDA)
#define VTOK_FUNCTION static __host__ __device__ __forceinline__
#else
#define VTOK_FUNCTION static inline __attribute__((always_inline))
#endif
