// The CPU kernels for AVX2.
#include "kernels.h"

#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define PSA_NAMESPACE avx2
#define PSA_VECTOR_BYTES 32
#include "all_kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
