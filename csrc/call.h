// Shared by the operators' bindings: checks the arguments and converts them to the types of psa.h.
#pragma once

#include <utility>

#include "cpu/cpu.h"
#include "tensors.h"

namespace psa {

// The four tensors of the SE module.
struct SETensors {
  const Tensor &fc1_weight, &fc1_bias, &fc2_weight, &fc2_bias;
};

inline bool is_per_branch(const SETensors& se) {
  return se.fc1_weight.dim() == 3;
}

// The arguments as psa.h has them, and the tensors that must stay alive while kernels run.
struct Call {
  std::vector<Tensor> branches;
  std::vector<Strided> strided_branches;
  Tensor concat;
  Tail tail;
};

inline Call make_call(std::vector<Tensor> branches, const SETensors& se) {
  STD_TORCH_CHECK(branches.size() >= 2 && branches[0].dim() == 4,
                  "psa_tail: branches must hold at least two tensors (B, C, H, W)");
  const Tensor& x = branches[0];
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  STD_TORCH_CHECK(C >= 1 && H >= 1 && W >= 1, "psa_tail: branches must have C, H, W >= 1");
  const int64_t S = int64_t(branches.size());
  const bool per_branch = is_per_branch(se);
  STD_TORCH_CHECK(se.fc1_weight.dim() >= 2 && se.fc1_weight.size(per_branch) >= 1,
                  "psa_tail: fc1_weight must be (R, C) or (S, R, C) with R >= 1");
  const int64_t R = se.fc1_weight.size(per_branch);
  if (per_branch) {
    check(se.fc1_weight, "fc1_weight", x, {S, R, C});
    check(se.fc1_bias, "fc1_bias", x, {S, R});
    check(se.fc2_weight, "fc2_weight", x, {S, C, R});
    check(se.fc2_bias, "fc2_bias", x, {S, C});
  } else {
    check_weight(se.fc1_weight, "fc1_weight", x, R, C);
    check(se.fc1_bias, "fc1_bias", x, {R});
    check_weight(se.fc2_weight, "fc2_weight", x, C, R);
    check(se.fc2_bias, "fc2_bias", x, {C});
  }
  for (const Tensor& branch : branches) {
    check(branch, "a branch", x, {B, C, H, W});
    STD_TORCH_CHECK(branch.scalar_type() == x.scalar_type(), "psa_tail: branches of two dtypes");
  }
  Call call;
  call.tail = {B, S, C, H * W, dtype_of(x, "branches"), nullptr, {}, {}, nullptr, nullptr};
  const auto of = [&](const Tensor& m, const char* name) {
    return matrix(m, name, false, per_branch);
  };
  call.tail.se = {R,
                  per_branch,
                  of(se.fc1_weight, "fc1_weight"),
                  of(se.fc1_bias, "fc1_bias"),
                  of(se.fc2_weight, "fc2_weight"),
                  of(se.fc2_bias, "fc2_bias")};
  for (const Tensor& branch : branches) {
    call.branches.push_back(with_uniform_pixel_stride(branch));
    call.strided_branches.push_back(strided(call.branches.back()));
  }
  call.tail.branches = call.strided_branches.data();
  return call;
}

inline ScalarType accumulator_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The backward's new tensors, and the same as psa.h has them.
struct GradientTensors {
  std::vector<Tensor> branches, fc;
  std::vector<Strided> strided_branches;
  Gradients gradients{};
};

// Allocates the requested gradients, each in the memory format of its branch.
inline GradientTensors make_gradients(const std::vector<Tensor>& branches, const SETensors& se,
                                      bool branch_grads, bool fc_grads) {
  GradientTensors result;
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
    auto& g = result.gradients;
    g.fc = true;
    for (const auto& [tensor, grad] :
         {std::pair{&se.fc1_weight, &g.fc1_weight}, std::pair{&se.fc1_bias, &g.fc1_bias},
          std::pair{&se.fc2_weight, &g.fc2_weight}, std::pair{&se.fc2_bias, &g.fc2_bias}}) {
      const auto sizes = tensor->sizes();
      const std::vector<int64_t> copied(sizes.begin(), sizes.end());
      result.fc.push_back(empty_contiguous(copied, tensor->scalar_type(), *tensor));
      *grad = matrix(result.fc.back(), "a gradient", true, is_per_branch(se));
    }
  }
  return result;
}

// PyTorch's own thread pool.
inline cpu::Threads cpu_threads() {
  return {int64_t(torch::stable::get_num_threads()),
          [](int64_t begin, int64_t end, int64_t grain, cpu::Body body, void* context) {
            STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
          }};
}

}  // namespace psa
