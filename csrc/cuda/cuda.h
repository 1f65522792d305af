// The CUDA half, as the operator calls it. No torch and no CUDA header in here either.
#pragma once

#include "../psa.h"

namespace psa::cuda {

// Which kernels run: `automatic` takes one pass where a sample fits on chip and that is expected to
// win, else two passes.
enum class Path : int32_t { automatic, one_pass, two_pass };

// What a launch needs besides its arguments. Every function throws std::invalid_argument where a
// path can't take a problem, and std::runtime_error where CUDA reports an error.
// `workspace` is device memory of the bytes asked for, aligned to 256, with any contents.
int64_t forward_workspace(const Tail& tail, Path path, int device);
void forward(const Tail& tail, const Epilogue& epilogue, Path path, int device, void* workspace,
             void* stream);

int64_t backward_workspace(const Tail& tail, const Gradients& gradients, Path path, int device);
void backward(const Tail& tail, const Gradients& gradients, Path path, int device, void* workspace,
              void* stream);

}  // namespace psa::cuda
