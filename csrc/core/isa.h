// Which instruction set the CPU kernels use: chosen once per process from what the machine and the
// build offer.
//
// A <stem>_cpu.cpp defines `namespace vtok::VTOK_ISA { void <function>(const Params&); }` and ends
// with VTOK_CPU_DISPATCH(<function>, Params), which defines `void vtok::<function>_cpu(const
// Params&)`. CMake compiles the file once per instruction set, each time with another VTOK_ISA.
#pragma once

namespace vtok {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The best instruction set of this machine that was also built, or the one that the environment
// variable VTOK_CPU_ISA (baseline, avx2, avx512) names; throws std::invalid_argument if that one
// cannot run here.
Isa cpu_isa();
const char* name_of(Isa isa);  // "baseline" is SSE2 on x86-64 and NEON on AArch64

}  // namespace vtok

#ifndef VTOK_ISA
#define VTOK_ISA baseline
#define VTOK_ISA_IS_BASELINE 1
#endif

#if !defined(VTOK_ISA_IS_BASELINE)
#define VTOK_CPU_DISPATCH(function, Params)
#elif defined(VTOK_HAVE_X86_ISA)
#define VTOK_CPU_DISPATCH(function, Params)                   \
  namespace vtok {                                            \
  namespace avx2 {                                            \
  void function(const Params&);                               \
  }                                                           \
  namespace avx512 {                                          \
  void function(const Params&);                               \
  }                                                           \
  void function##_cpu(const Params& params) {                 \
    switch (cpu_isa()) {                                      \
      case Isa::kAvx512: return avx512::function(params);     \
      case Isa::kAvx2: return avx2::function(params);         \
      case Isa::kBaseline: return baseline::function(params); \
    }                                                         \
  }                                                           \
  }
#else
#define VTOK_CPU_DISPATCH(function, Params)   \
  namespace vtok {                            \
  void function##_cpu(const Params& params) { \
    return baseline::function(params);        \
  }                                           \
  }
#endif
