// The CPU kernels for AVX-512 with bfloat16 conversions.
#include "kernels.h"

#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(                                                               \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif
#define PSA_NAMESPACE avx512_bf16
#define PSA_VECTOR_BYTES 64
#define PSA_AVX512_BF16
#include "all_kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
