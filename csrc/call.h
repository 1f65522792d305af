// What the operators' bindings share: their arguments, checked and in the terms of psa.h.
#pragma once

#include "cpu/cpu.h"
#include "tensors.h"

namespace psa {

// The operator's arguments, and what of them has to be kept alive while kernels run.
struct Call {
  std::vector<Tensor> branches;
  std::vector<Strided> strided_branches;
  Tensor cat;
  Tail tail;
};

inline Call make_call(std::vector<Tensor> branches, const Tensor& fc1_weight,
                      const Tensor& fc1_bias, const Tensor& fc2_weight, const Tensor& fc2_bias) {
  STD_TORCH_CHECK(branches.size() >= 2 && branches[0].dim() == 4,
                  "psa_tail: branches must hold at least two tensors (B, C, H, W)");
  const Tensor& x = branches[0];
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  STD_TORCH_CHECK(C >= 1 && H >= 1 && W >= 1, "psa_tail: branches must have C, H, W >= 1");
  STD_TORCH_CHECK(fc1_weight.dim() >= 2 && fc1_weight.size(0) >= 1,
                  "psa_tail: fc1_weight must be (R, C) with R >= 1");
  const int64_t R = fc1_weight.size(0);
  check_weight(fc1_weight, "fc1_weight", x, R, C);
  check(fc1_bias, "fc1_bias", x, {R});
  check_weight(fc2_weight, "fc2_weight", x, C, R);
  check(fc2_bias, "fc2_bias", x, {C});
  Call call;
  for (Tensor& branch : branches) {
    check(branch, "a branch", x, {B, C, H, W});
    STD_TORCH_CHECK(branch.scalar_type() == x.scalar_type(), "psa_tail: branches of two dtypes");
  }
  const int64_t S = int64_t(branches.size());
  call.tail = {B, S, C, H * W, dtype_of(x, "branches"), nullptr, {}, {}, nullptr, nullptr};
  call.tail.se = {R, matrix(fc1_weight, "fc1_weight"), matrix(fc1_bias, "fc1_bias"),
                  matrix(fc2_weight, "fc2_weight"), matrix(fc2_bias, "fc2_bias")};
  for (Tensor& branch : branches) {
    call.branches.push_back(pixels_in_a_run(branch));
    call.strided_branches.push_back(strided(call.branches.back()));
  }
  call.tail.branches = call.strided_branches.data();
  return call;
}

inline ScalarType accumulator_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

struct Gradient {
  std::vector<Tensor> branches, fc;
  std::vector<Strided> strided_branches;
  Gradients gradients{};
};

inline Gradient make_gradient(const std::vector<Tensor>& branches, const std::vector<Tensor>& fc,
                              bool branch_grads, bool fc_grads) {
  Gradient result;
  if (branch_grads) {
    for (const Tensor& x : branches) {
      const Tensor grad =
          empty_image(x.size(0), x.size(1), x.size(2), x.size(3), is_channels_last(x), x);
      result.strided_branches.push_back(strided(grad, grad.mutable_data_ptr()));
      result.branches.push_back(grad);
    }
    result.gradients.branches = result.strided_branches.data();
  }
  if (fc_grads) {
    for (const Tensor& p : fc) {
      const auto sizes = p.sizes();
      std::vector<int64_t> copied(sizes.begin(), sizes.end());
      result.fc.push_back(empty_contiguous(copied, p.scalar_type(), p));
    }
    auto& g = result.gradients;
    Matrix* matrices[] = {&g.fc1_weight, &g.fc1_bias, &g.fc2_weight, &g.fc2_bias};
    for (int i = 0; i < 4; ++i) *matrices[i] = matrix(result.fc[i], "a gradient", true);
    g.fc = true;
  }
  return result;
}

// PyTorch's own pool.
inline cpu::Threads cpu_threads() {
  return {int64_t(torch::stable::get_num_threads()),
          [](int64_t begin, int64_t end, int64_t grain, cpu::Body body, void* context) {
            STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
          }};
}

}  // namespace psa
