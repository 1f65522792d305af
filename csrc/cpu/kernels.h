// Declares the kernels of each instruction set, in a namespace of its own. Includes all other
// headers that the kernels need, before their sources set the compiler's target.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <type_traits>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "cpu.h"

namespace psa::cpu {

#define PSA_DECLARE(name)                                                                \
  namespace name {                                                                       \
  void forward(const Tail& tail, const Epilogue& epilogue, const Threads& threads);      \
  void backward(const Tail& tail, const Gradients& gradients, const Threads& threads);   \
  void norm_forward(const Tail& tail, const Norm& norm, const Threads& threads);         \
  void norm_backward(const Tail& tail, const Norm& norm, const NormGradients& gradients, \
                     const Threads& threads);                                            \
  }
PSA_DECLARE(baseline)
PSA_DECLARE(avx2)
PSA_DECLARE(avx512)
PSA_DECLARE(avx512_bf16)
#undef PSA_DECLARE

}  // namespace psa::cpu
