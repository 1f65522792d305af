// psa_tail_norm by the CPU kernels: from PyTorch's arguments to psa.h and back. What users pass
// wrongly is told by checks.py, as for bindings.cpp.
#include <tuple>

#include "call.h"

namespace psa {
namespace {

// What the forward keeps for the backward.
struct Stats {
  Tensor squeeze, deviation, attention, mean, var;
};

Norm make_norm(Tail& tail, const std::optional<Tensor>& gamma, const std::optional<Tensor>& beta,
               double eps, const Stats& stats, const Tensor& x) {
  const auto data = [](const Tensor& t) { return const_cast<void*>(t.const_data_ptr()); };
  const auto vector = [&](const std::optional<Tensor>& v, const char* name) {
    if (!v) return Matrix{};
    check(*v, name, x, {tail.S * tail.C});
    return matrix(*v, name);
  };
  tail.squeeze = data(stats.squeeze);
  tail.attention = data(stats.attention);
  return {vector(gamma, "gamma"), vector(beta, "beta"), eps,
          data(stats.deviation),  data(stats.mean),     data(stats.var)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    std::vector<Tensor> branches, const Tensor& fc1_weight, const Tensor& fc1_bias,
    const Tensor& fc2_weight, const Tensor& fc2_bias, const std::optional<Tensor>& gamma,
    const std::optional<Tensor>& beta, double eps) {
  const std::vector<Tensor> own = branches;  // formats are those of the branches as they came
  Call call = make_call(std::move(branches), fc1_weight, fc1_bias, fc2_weight, fc2_bias);
  Tail& tail = call.tail;
  const Tensor& x = own[0];
  const ScalarType type = accumulator_type(x);
  const auto per_sample = [&] { return empty_contiguous({tail.B, tail.S, tail.C}, type, x); };
  const auto per_channel = [&] { return empty_contiguous({tail.S * tail.C}, type, x); };
  const Stats stats{per_sample(), per_sample(), per_sample(), per_channel(), per_channel()};
  const Norm norm = make_norm(tail, gamma, beta, eps, stats, x);
  const Tensor out =
      empty_image(tail.B, tail.S * tail.C, x.size(2), x.size(3), all_channels_last(own), x);
  if (tail.B > 0) {
    tail.cat = strided(out, out.mutable_data_ptr());
    cpu::norm_forward(tail, norm, cpu_threads());
  } else {
    Tensor mean = stats.mean, var = stats.var;
    torch::stable::zero_(mean);
    torch::stable::zero_(var);
  }
  return {out, stats.squeeze, stats.deviation, stats.attention, stats.mean, stats.var};
}

void check_stats(const Stats& stats, const Tail& tail, const Tensor& x) {
  const auto check_one = [&](const Tensor& t, std::initializer_list<int64_t> sizes) {
    check(t, "what the forward kept", x, sizes);
    STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == accumulator_type(x),
                    "psa_tail_norm: what the forward kept must be contiguous, in the "
                    "accumulator's dtype");
  };
  for (const Tensor& t : {stats.squeeze, stats.deviation, stats.attention}) {
    check_one(t, {tail.B, tail.S, tail.C});
  }
  for (const Tensor& t : {stats.mean, stats.var}) check_one(t, {tail.S * tail.C});
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>> backward(
    const Tensor& grad, std::vector<Tensor> branches, const Tensor& squeeze,
    const Tensor& deviation, const Tensor& attention, const Tensor& mean, const Tensor& var,
    const Tensor& fc1_weight, const Tensor& fc1_bias, const Tensor& fc2_weight,
    const Tensor& fc2_bias, const std::optional<Tensor>& gamma, const std::optional<Tensor>& beta,
    double eps, bool branch_grads, bool fc_grads, bool norm_grads) {
  const std::vector<Tensor> own = branches;
  Call call = make_call(std::move(branches), fc1_weight, fc1_bias, fc2_weight, fc2_bias);
  Tail& tail = call.tail;
  const Tensor& x = own[0];
  check(grad, "grad", x, {tail.B, tail.S * tail.C, x.size(2), x.size(3)});
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "psa_tail_norm: grad of another dtype");
  const Stats stats{squeeze, deviation, attention, mean, var};
  check_stats(stats, tail, x);
  const Norm norm = make_norm(tail, gamma, beta, eps, stats, x);
  Gradient result =
      make_gradient(own, {fc1_weight, fc1_bias, fc2_weight, fc2_bias}, branch_grads, fc_grads);
  NormGradients gradients{result.gradients, {}, {}};
  std::vector<Tensor> affine;
  if (norm_grads) {
    for (const auto& [given, written] :
         {std::pair{&gamma, &gradients.gamma}, std::pair{&beta, &gradients.beta}}) {
      if (!*given) continue;
      affine.push_back(empty_contiguous({tail.S * tail.C}, (*given)->scalar_type(), x));
      *written = matrix(affine.back(), "a gradient", true);
    }
  }
  if (tail.B > 0) {
    call.cat = pixels_in_a_run(grad);
    tail.cat = strided(call.cat);
    cpu::norm_backward(tail, norm, gradients, cpu_threads());
  } else {
    for (Tensor& g : result.fc) torch::stable::zero_(g);
    for (Tensor& g : affine) torch::stable::zero_(g);
  }
  return {result.branches, result.fc, affine};
}

}  // namespace
}  // namespace psa

STABLE_TORCH_LIBRARY_IMPL(epsanet_fused, CPU, m) {
  m.impl("psa_tail_norm_native", TORCH_BOX(&psa::forward));
  m.impl("psa_tail_norm_native_backward", TORCH_BOX(&psa::backward));
}
