// The CUDA kernels' interface to the bindings. This header includes neither PyTorch nor CUDA.
#pragma once

#include "../psa.h"

namespace psa::cuda {

// Which kernels run. `automatic` takes one pass if a cluster's shared memory can hold a sample,
// else two passes.
enum class Path : int32_t { automatic, one_pass, two_pass };

// forward and backward launch their kernels on `stream`. `workspace` is device memory with any
// contents, aligned to 256 bytes, of the size that forward_workspace or backward_workspace returns.
// Every function throws std::invalid_argument if a path doesn't support the arguments, and
// std::runtime_error if CUDA reports an error.
int64_t forward_workspace(const Tail& tail, Path path, int device);
void forward(const Tail& tail, const Epilogue& epilogue, Path path, int device, void* workspace,
             void* stream);

int64_t backward_workspace(const Tail& tail, const Gradients& gradients, Path path, int device);
void backward(const Tail& tail, const Gradients& gradients, Path path, int device, void* workspace,
              void* stream);

}  // namespace psa::cuda
