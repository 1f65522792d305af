// The CPU kernels for AVX-512.
#include "kernels.h"

#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define PSA_NAMESPACE avx512
#define PSA_VECTOR_BYTES 64
#include "all_kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
