// What the operator asks of the kernels of a device. No torch and no CUDA in here.
//
// Shapes and names are those of the paper: S branches (B, C, H, W), whose concatenation in reverse,
// the "cat", is (B, S * C, H, W). H and W are one run of HW pixels.
#pragma once

#include <cstdint>

namespace psa {

enum class Dtype : int32_t { float16, bfloat16, float32, float64 };

inline int64_t size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// A tensor (B, C or S * C, HW), its strides in elements. A stride may be 0.
struct Strided {
  void* data;
  int64_t batch, channel, pixel;
};

// One of the small tensors: (rows, columns) with strides in elements, or a vector of rows. Each has
// a dtype of its own. No data where the argument isn't given.
struct Matrix {
  void* data;
  Dtype dtype;
  int64_t row, column;
};

// The SE module: fc1_weight (R, C), fc1_bias (R), fc2_weight (C, R), fc2_bias (C).
struct Excitation {
  int64_t R;
  Matrix fc1_weight, fc1_bias, fc2_weight, fc2_bias;
};

// What forward and backward share. Sums are in float, or in double for float64: the type of squeeze
// and attention, which are contiguous (B, S, C), written by the forward and read by the backward.
struct Tail {
  int64_t B, S, C, HW;
  Dtype dtype;              // of the branches, their gradients and the cat
  const Strided* branches;  // S of them
  Strided cat;              // forward: the output, to write; backward: its gradient, to read
  Excitation se;
  void* squeeze;
  void* attention;
};

// out = relu(scale * out + shift): vectors of S * C in the order of the output's channels.
struct Epilogue {
  Matrix scale, shift;
  bool relu;
};

// What the backward writes; null where it isn't asked for.
struct Gradients {
  const Strided* branches;  // S of them
  bool fc;                  // whether the four matrices below are to be written
  Matrix fc1_weight, fc1_bias, fc2_weight, fc2_bias;
};

// The norm between the cat and its relu. Gamma and beta, mean and (biased) variance are vectors of
// S * C in the order of the output's channels; the deviation is (B, S, C), the sum over a sample's
// pixels of the squared difference to the squeeze. The last three are contiguous, in the sums'
// type, written by the forward and read by the backward.
struct Norm {
  Matrix gamma, beta;
  double eps;
  void* deviation;
  void* mean;
  void* var;
};

// What the backward writes with a norm; no data where it isn't asked for.
struct NormGradients {
  Gradients tail;
  Matrix gamma, beta;
};

}  // namespace psa
