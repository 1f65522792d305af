// The interface between the operators' bindings and the kernels of a device. It needs neither
// PyTorch nor CUDA.
//
// Shapes and names are those of the paper: S branches of shape (B, C, H, W). "concat" is their
// concatenation along the channels in reverse order, branch S - 1 first: (B, S * C, H, W). The
// kernels see H and W as one dimension of HW pixels.
#pragma once

#include <cstdint>

namespace psa {

enum class Dtype : int32_t { float16, bfloat16, float32, float64 };

inline int64_t size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// A tensor (B, C, HW) or (B, S * C, HW) with its strides in elements. A stride may be 0.
struct Strided {
  void* data;
  int64_t batch, channel, pixel;
};

// A matrix (rows, columns), or a vector of rows, with its strides in elements and a dtype of its
// own. `data` is null if the argument isn't given. With one for each branch, `branch` leads from
// one to the next; else it is 0.
struct Matrix {
  void* data;
  Dtype dtype;
  int64_t row, column, branch;
};

// The SE module: fc1_weight (R, C), fc1_bias (R), fc2_weight (C, R), fc2_bias (C); of all branches,
// or of each.
struct SEWeights {
  int64_t R;
  bool per_branch;
  Matrix fc1_weight, fc1_bias, fc2_weight, fc2_bias;
};

// The arguments of both forward and backward. The accumulator's type is float, or double for
// float64. squeeze and attention are contiguous (B, S, C) in the accumulator's type; the forward
// writes them and the backward reads them.
struct Tail {
  int64_t B, S, C, HW;
  Dtype dtype;              // of the branches, their gradients and concat
  const Strided* branches;  // S of them
  Strided concat;           // forward: the output, written; backward: its gradient, read
  SEWeights se;
  void* squeeze;
  void* attention;
};

// out = relu(scale * out + shift): vectors of S * C in the order of the output's channels.
struct Epilogue {
  Matrix scale, shift;
  bool relu;
};

// The gradients that the backward writes.
struct Gradients {
  const Strided* branches;  // S of them, or null if they aren't requested
  bool fc;                  // whether to write the four gradients below
  Matrix fc1_weight, fc1_bias, fc2_weight, fc2_bias;
};

// The batch norm between concat and its ReLU. gamma, beta, mean and (biased) var are vectors of
// S * C in the order of the output's channels. m2 (B, S, C) is the sum over a sample's pixels of
// the squared difference from squeeze. m2, mean and var are contiguous, in the accumulator's type;
// the forward writes them and the backward reads them.
struct Norm {
  Matrix gamma, beta;
  double eps;
  void* m2;
  void* mean;
  void* var;
};

// The gradients that the backward writes with a norm; those of gamma and beta have no data if they
// aren't requested.
struct NormGradients {
  Gradients tail;
  Matrix gamma, beta;
};

}  // namespace psa
