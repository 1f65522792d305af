// Chooses the instruction set, once per process.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace psa::cpu {
namespace {

constexpr const char* kVariable = "EPSANET_FUSED_CPU_CAPABILITY";

struct Kernels {
  const char* name;
  bool runs_here;
  decltype(&cpu::forward) forward;
  decltype(&cpu::backward) backward;
  decltype(&cpu::norm_forward) norm_forward;
  decltype(&cpu::norm_backward) norm_backward;
};

#define PSA_KERNELS(name, runs_here) \
  {#name, runs_here, name::forward, name::backward, name::norm_forward, name::norm_backward}

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#ifdef __x86_64__
    __builtin_cpu_init();
    // Not every compiler can query f16c; every CPU with AVX2 has it.
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 =
        has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    static const Kernels table[] = {
#ifdef __x86_64__
        PSA_KERNELS(avx512_bf16, has_bf16),
        PSA_KERNELS(avx512, has_avx512),
        PSA_KERNELS(avx2, has_avx2),
#endif
        PSA_KERNELS(baseline, true),
    };
    const char* wanted = std::getenv(kVariable);
    std::string runnable;
    for (const Kernels& k : table) {
      if (!k.runs_here) continue;
      if (wanted == nullptr || *wanted == '\0' || std::string(k.name) == wanted) return k;
      runnable += (runnable.empty() ? "" : ", ") + std::string(k.name);
    }
    throw std::invalid_argument("psa_tail: the environment variable " + std::string(kVariable) +
                                " must be one of " + runnable + " on this CPU, got " + wanted);
  }();
  return chosen;
}

#undef PSA_KERNELS

}  // namespace

const char* capability() {
  return kernels().name;
}

void forward(const Tail& tail, const Epilogue& epilogue, const Threads& threads) {
  kernels().forward(tail, epilogue, threads);
}

void backward(const Tail& tail, const Gradients& gradients, const Threads& threads) {
  kernels().backward(tail, gradients, threads);
}

void norm_forward(const Tail& tail, const Norm& norm, const Threads& threads) {
  kernels().norm_forward(tail, norm, threads);
}

void norm_backward(const Tail& tail, const Norm& norm, const NormGradients& gradients,
                   const Threads& threads) {
  kernels().norm_backward(tail, norm, gradients, threads);
}

}  // namespace psa::cpu
