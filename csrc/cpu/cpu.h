// The CPU kernels' interface to the bindings.
#pragma once

#include "../psa.h"

namespace psa::cpu {

using Body = void (*)(int64_t begin, int64_t end, void* context);

// A thread pool: the bindings pass PyTorch's, so that the kernels don't depend on PyTorch.
struct Threads {
  int64_t count;
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);
};

void forward(const Tail& tail, const Epilogue& epilogue, const Threads& threads);
void backward(const Tail& tail, const Gradients& gradients, const Threads& threads);

// The kernels of psa_tail_norm.
void norm_forward(const Tail& tail, const Norm& norm, const Threads& threads);
void norm_backward(const Tail& tail, const Norm& norm, const NormGradients& gradients,
                   const Threads& threads);

// The instruction set in use: the widest that this CPU has, unless the environment variable
// EPSANET_FUSED_CPU_CAPABILITY names a smaller one. Throws std::invalid_argument if the CPU doesn't
// have the one it names.
const char* capability();

}  // namespace psa::cpu
