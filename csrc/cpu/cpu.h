// The CPU half, as the operator calls it.
#pragma once

#include "../psa.h"

namespace psa::cpu {

using Body = void (*)(int64_t begin, int64_t end, void* context);

// How to run on several threads; PyTorch's own pool, handed in so that no kernel knows of PyTorch.
struct Threads {
  int64_t count;
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);
};

void forward(const Tail& tail, const Epilogue& epilogue, const Threads& threads);
void backward(const Tail& tail, const Gradients& gradients, const Threads& threads);

// Of psa_tail_norm.
void norm_forward(const Tail& tail, const Norm& norm, const Threads& threads);
void norm_backward(const Tail& tail, const Norm& norm, const NormGradients& gradients,
                   const Threads& threads);

// The instruction set in use: the widest that this CPU has, unless the environment variable
// EPSANET_FUSED_CPU_CAPABILITY names a smaller one.
const char* capability();

}  // namespace psa::cpu
