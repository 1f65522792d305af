// Registers psa_tail_norm's CPU kernels: converts PyTorch's arguments to the types of psa.h and
// back. As in bindings.cpp, ops/checks.py reports users' errors.
#include <tuple>

#include "call.h"

namespace psa {
namespace {

// The tensors that the forward saves for the backward.
struct NormStats {
  Tensor squeeze, m2, attention, mean, var;
};

Norm make_norm(Tail& tail, const std::optional<Tensor>& gamma, const std::optional<Tensor>& beta,
               double eps, const NormStats& stats, const Tensor& x) {
  const auto data = [](const Tensor& t) { return const_cast<void*>(t.const_data_ptr()); };
  const auto vector = [&](const std::optional<Tensor>& v, const char* name) {
    if (!v) return Matrix{};
    check(*v, name, x, {tail.S * tail.C});
    return matrix(*v, name);
  };
  tail.squeeze = data(stats.squeeze);
  tail.attention = data(stats.attention);
  return {vector(gamma, "gamma"), vector(beta, "beta"), eps,
          data(stats.m2),         data(stats.mean),     data(stats.var)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    std::vector<Tensor> branches, const Tensor& fc1_weight, const Tensor& fc1_bias,
    const Tensor& fc2_weight, const Tensor& fc2_bias, const std::optional<Tensor>& gamma,
    const std::optional<Tensor>& beta, double eps) {
  const std::vector<Tensor> passed = branches;  // make_call may copy them in another format
  Call call = make_call(std::move(branches), {fc1_weight, fc1_bias, fc2_weight, fc2_bias});
  Tail& tail = call.tail;
  const Tensor& x = passed[0];
  const ScalarType type = accumulator_type(x);
  const auto per_sample = [&] { return empty_contiguous({tail.B, tail.S, tail.C}, type, x); };
  const auto per_channel = [&] { return empty_contiguous({tail.S * tail.C}, type, x); };
  const NormStats stats{per_sample(), per_sample(), per_sample(), per_channel(), per_channel()};
  const Norm norm = make_norm(tail, gamma, beta, eps, stats, x);
  const Tensor out =
      empty_image(tail.B, tail.S * tail.C, x.size(2), x.size(3), all_channels_last(passed), x);
  if (tail.B > 0) {
    tail.concat = strided(out, out.mutable_data_ptr());
    cpu::norm_forward(tail, norm, cpu_threads());
  } else {
    Tensor mean = stats.mean, var = stats.var;
    torch::stable::zero_(mean);
    torch::stable::zero_(var);
  }
  return {out, stats.squeeze, stats.m2, stats.attention, stats.mean, stats.var};
}

void check_stats(const NormStats& stats, const Tail& tail, const Tensor& x) {
  const auto check_one = [&](const Tensor& t, std::initializer_list<int64_t> sizes) {
    check(t, "a tensor saved by the forward", x, sizes);
    STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == accumulator_type(x),
                    "psa_tail_norm: the tensors saved by the forward must be contiguous, in the "
                    "accumulator's dtype");
  };
  for (const Tensor& t : {stats.squeeze, stats.m2, stats.attention}) {
    check_one(t, {tail.B, tail.S, tail.C});
  }
  for (const Tensor& t : {stats.mean, stats.var}) check_one(t, {tail.S * tail.C});
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>> backward(
    const Tensor& grad, std::vector<Tensor> branches, const Tensor& squeeze, const Tensor& m2,
    const Tensor& attention, const Tensor& mean, const Tensor& var, const Tensor& fc1_weight,
    const Tensor& fc1_bias, const Tensor& fc2_weight, const Tensor& fc2_bias,
    const std::optional<Tensor>& gamma, const std::optional<Tensor>& beta, double eps,
    bool branch_grads, bool fc_grads, bool norm_grads) {
  const std::vector<Tensor> passed = branches;
  const SETensors se{fc1_weight, fc1_bias, fc2_weight, fc2_bias};
  Call call = make_call(std::move(branches), se);
  Tail& tail = call.tail;
  const Tensor& x = passed[0];
  check(grad, "grad", x, {tail.B, tail.S * tail.C, x.size(2), x.size(3)});
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "psa_tail_norm: grad of another dtype");
  const NormStats stats{squeeze, m2, attention, mean, var};
  check_stats(stats, tail, x);
  const Norm norm = make_norm(tail, gamma, beta, eps, stats, x);
  GradientTensors result = make_gradients(passed, se, branch_grads, fc_grads);
  NormGradients gradients{result.gradients, {}, {}};
  std::vector<Tensor> norm_result;
  if (norm_grads) {
    for (const auto& [given, written] :
         {std::pair{&gamma, &gradients.gamma}, std::pair{&beta, &gradients.beta}}) {
      if (!*given) continue;
      norm_result.push_back(empty_contiguous({tail.S * tail.C}, (*given)->scalar_type(), x));
      *written = matrix(norm_result.back(), "a gradient", true);
    }
  }
  if (tail.B > 0) {
    call.concat = with_uniform_pixel_stride(grad);
    tail.concat = strided(call.concat);
    cpu::norm_backward(tail, norm, gradients, cpu_threads());
  } else {
    for (Tensor& g : result.fc) torch::stable::zero_(g);
    for (Tensor& g : norm_result) torch::stable::zero_(g);
  }
  return {result.branches, result.fc, norm_result};
}

}  // namespace
}  // namespace psa

STABLE_TORCH_LIBRARY_IMPL(epsanet_fused, CPU, m) {
  m.impl("psa_tail_norm_native", TORCH_BOX(&psa::forward));
  m.impl("psa_tail_norm_native_backward", TORCH_BOX(&psa::backward));
}
