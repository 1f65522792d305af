// The CPU kernels for avx512_bf16.
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
#include "vec.h"
#include "rows.h"
#include "gate.h"
#include "tail.h"
#include "gate_backward.h"
#include "passes.h"
#include "norm_rows.h"
#include "norm.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
