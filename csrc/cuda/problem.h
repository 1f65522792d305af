// Checks the operator's arguments for the CUDA kernels and finds their memory format.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace psa::cuda {

constexpr int64_t kMaxRun = int64_t(1) << 30;  // elements, counted in int32

inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// A tensor (B, channels, HW), for predicates about its strides.
struct Access {
  Strided tensor;
  int64_t channels;
};

inline bool is_contiguous(const Access& t, int64_t HW) {
  return (HW == 1 || t.tensor.pixel == 1) && (t.channels == 1 || t.tensor.channel == HW);
}

inline bool is_aligned(const Strided& t, int64_t size) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.batch * size % 16 == 0;
}

// True if each pixel's channels are contiguous and start at a multiple of 16 bytes.
inline bool is_channels_last(const Access& t, int64_t size) {
  return t.channels > 1 && t.tensor.channel == 1 && is_aligned(t.tensor, size) &&
         t.tensor.pixel * size % 16 == 0;
}

// The arguments of a forward or a backward.
struct Problem {
  const Tail& tail;
  const Gradients* gradients;  // null: forward
  DeviceLimits limits;
  Shape shape;
  int64_t element_size;  // bytes
  Strided branches[kMaxBranches], grads[kMaxBranches], concat;
  MemoryFormat memory_format;  // of all of them

  bool backward() const { return gradients != nullptr; }
  bool branch_grads() const { return gradients && gradients->branches; }
  bool fc_grads() const { return gradients && gradients->fc; }
  int64_t SC() const { return int64_t(shape.S) * shape.C; }
  int64_t SR() const { return int64_t(shape.S) * tail.se.R; }
};

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument("psa_tail: " + message);
}

// The stride of a dimension of size one is meaningless; this sets it to 0.
inline Strided with_canonical_strides(Strided t, const Tail& tail) {
  if (tail.B == 1) t.batch = 0;
  if (tail.HW == 1) t.pixel = 0;
  return t;
}

// True if the test holds for concat, the branches and their requested gradients.
template <class Test>
bool all_of(const Problem& p, Test test) {
  bool all = test(Access{p.concat, p.SC()});
  for (int s = 0; s < p.shape.S; ++s) {
    all = all && test(Access{p.branches[s], p.shape.C});
    if (p.grads[s].data) all = all && test(Access{p.grads[s], p.shape.C});
  }
  return all;
}

inline MemoryFormat memory_format_of(const Problem& p) {
  int64_t HW = p.shape.HW, vec = 16 / p.element_size;
  if (p.shape.C * HW <= kMaxRun && all_of(p, [&](Access t) { return is_contiguous(t, HW); })) {
    return MemoryFormat::contiguous;
  }
  if (p.shape.C % vec == 0 &&
      all_of(p, [&](Access t) { return is_channels_last(t, p.element_size); })) {
    return MemoryFormat::channels_last;
  }
  return MemoryFormat::strided;
}

inline Problem make_problem(const Tail& tail, const Gradients* gradients, int device) {
  require(tail.dtype != Dtype::float64,
          "the cuda kernels take branches of float16, bfloat16 or float32, not float64");
  require(tail.S >= 1 && tail.S <= kMaxBranches, "the cuda kernels take up to " +
                                                     std::to_string(kMaxBranches) +
                                                     " branches, not " + std::to_string(tail.S));
  require(tail.C >= 1 && tail.HW >= 1 && tail.se.R >= 1,
          "the cuda kernels need a channel, a pixel and a hidden unit at least");
  require(tail.S * std::max(tail.C, tail.se.R) <= kMaxRun,
          "the cuda kernels take up to 2^30 channels");
  Problem p = {tail, gradients, device_limits(device), {}, size_of(tail.dtype), {}, {}, {}, {}};
  p.shape.B = tail.B;
  p.shape.HW = tail.HW;
  p.shape.S = int32_t(tail.S);
  p.shape.C = int32_t(tail.C);
  p.shape.channels = Divisor(tail.C);
  p.concat = with_canonical_strides(tail.concat, tail);
  for (int s = 0; s < tail.S; ++s) {
    p.branches[s] = with_canonical_strides(tail.branches[s], tail);
    if (p.branch_grads()) p.grads[s] = with_canonical_strides(gradients->branches[s], tail);
  }
  p.memory_format = memory_format_of(p);
  if (p.memory_format == MemoryFormat::contiguous) {
    p.shape.run = int32_t(tail.C * tail.HW);
    p.shape.pixels = Divisor(tail.HW);
  }
  return p;
}

}  // namespace psa::cuda
