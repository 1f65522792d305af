// Chooses the instruction set, once.
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
};

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#ifdef __x86_64__
    __builtin_cpu_init();
    // Not every compiler knows to ask for f16c; whatever has AVX2 has had it for longer.
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 =
        has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    static const Kernels table[] = {
#ifdef __x86_64__
        {"avx512_bf16", has_bf16, avx512_bf16::forward, avx512_bf16::backward},
        {"avx512", has_avx512, avx512::forward, avx512::backward},
        {"avx2", has_avx2, avx2::forward, avx2::backward},
#endif
        {"baseline", true, baseline::forward, baseline::backward},
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

}  // namespace psa::cpu
