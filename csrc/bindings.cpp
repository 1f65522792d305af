// Registers psa_tail's C++ kernels: converts PyTorch's arguments to the types of psa.h and back.
//
// The bindings use only PyTorch's stable ABI, so that one library works with every torch from 2.10
// on. ops/checks.py reports users' errors; the checks here keep memory safe if somebody calls the
// registered operator directly.
#include <tuple>

#include "call.h"

#ifdef PSA_WITH_CUDA
#include "cuda/cuda.h"
// Weak: a CPU-only PyTorch doesn't define it, and never calls the functions below for CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace psa {
namespace {

// Runs the kernels on the CPU.
struct OnCpu {
  static void forward(const Tail& tail, const Epilogue& epilogue, const Tensor&, int64_t) {
    cpu::forward(tail, epilogue, cpu_threads());
  }
  static void backward(const Tail& tail, const Gradients& gradients, const Tensor&, int64_t) {
    cpu::backward(tail, gradients, cpu_threads());
  }
};

#ifdef PSA_WITH_CUDA
// Runs the kernels on the current stream of a CUDA device.
struct OnCuda {
  static void* stream(int32_t device) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "psa_tail: this PyTorch has no CUDA half");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    return stream;
  }
  static void forward(const Tail& tail, const Epilogue& epilogue, const Tensor& like,
                      int64_t path_number) {
    const int32_t device = like.get_device();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const auto path = static_cast<cuda::Path>(path_number);
    const Tensor workspace =
        empty_contiguous({cuda::forward_workspace(tail, path, device)}, ScalarType::Byte, like);
    cuda::forward(tail, epilogue, path, device, workspace.mutable_data_ptr(), stream(device));
  }
  static void backward(const Tail& tail, const Gradients& gradients, const Tensor& like,
                       int64_t path_number) {
    const int32_t device = like.get_device();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const auto path = static_cast<cuda::Path>(path_number);
    const Tensor workspace = empty_contiguous(
        {cuda::backward_workspace(tail, gradients, path, device)}, ScalarType::Byte, like);
    cuda::backward(tail, gradients, path, device, workspace.mutable_data_ptr(), stream(device));
  }
};
#endif

// Runs the forward; allocate(tail, branches[0]) sets the memory of squeeze and attention.
template <class Device, class Allocate>
Tensor run_forward(std::vector<Tensor> branches, const SETensors& se,
                   const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                   bool relu, int64_t path, const Allocate& allocate) {
  const Tensor x = branches.empty() ? Tensor() : branches[0];
  const bool channels_last = !branches.empty() && x.dim() == 4 && all_channels_last(branches);
  Call call = make_call(std::move(branches), se);
  Tail& tail = call.tail;
  Epilogue epilogue{{}, {}, relu};
  if (scale) {
    check(*scale, "scale", x, {tail.S * tail.C});
    epilogue.scale = matrix(*scale, "scale");
  }
  if (shift) {
    check(*shift, "shift", x, {tail.S * tail.C});
    epilogue.shift = matrix(*shift, "shift");
  }
  const Tensor out = empty_image(tail.B, tail.S * tail.C, x.size(2), x.size(3), channels_last, x);
  allocate(tail, x);
  if (tail.B > 0) {
    tail.concat = strided(out, out.mutable_data_ptr());
    Device::forward(tail, epilogue, x, path);
  }
  return out;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> forward(std::vector<Tensor> branches, const Tensor& fc1_weight,
                                           const Tensor& fc1_bias, const Tensor& fc2_weight,
                                           const Tensor& fc2_bias,
                                           const std::optional<Tensor>& scale,
                                           const std::optional<Tensor>& shift, bool relu,
                                           int64_t path) {
  Tensor squeeze, attention;
  const Tensor out = run_forward<Device>(
      std::move(branches), {fc1_weight, fc1_bias, fc2_weight, fc2_bias}, scale, shift, relu, path,
      [&](Tail& tail, const Tensor& x) {
        squeeze = empty_contiguous({tail.B, tail.S, tail.C}, accumulator_type(x), x);
        attention = empty_contiguous({tail.B, tail.S, tail.C}, accumulator_type(x), x);
        tail.squeeze = squeeze.mutable_data_ptr();
        tail.attention = attention.mutable_data_ptr();
      });
  return {out, squeeze, attention};
}

// Returns the output alone: inference doesn't use squeeze and attention, and each further output
// costs host time. One allocation holds both.
template <class Device>
Tensor inference(std::vector<Tensor> branches, const Tensor& fc1_weight, const Tensor& fc1_bias,
                 const Tensor& fc2_weight, const Tensor& fc2_bias,
                 const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, bool relu,
                 int64_t path) {
  Tensor squeeze_and_attention;
  return run_forward<Device>(
      std::move(branches), {fc1_weight, fc1_bias, fc2_weight, fc2_bias}, scale, shift, relu, path,
      [&](Tail& tail, const Tensor& x) {
        const int64_t size = tail.B * tail.S * tail.C;
        squeeze_and_attention = empty_contiguous({2 * size}, accumulator_type(x), x);
        tail.squeeze = squeeze_and_attention.mutable_data_ptr();
        tail.attention = static_cast<char*>(tail.squeeze) +
                         size * (tail.dtype == Dtype::float64 ? sizeof(double) : sizeof(float));
      });
}

template <class Device>
std::tuple<std::vector<Tensor>, std::vector<Tensor>> backward(
    const Tensor& grad, std::vector<Tensor> branches, const Tensor& squeeze,
    const Tensor& attention, const Tensor& fc1_weight, const Tensor& fc1_bias,
    const Tensor& fc2_weight, const Tensor& fc2_bias, bool branch_grads, bool fc_grads,
    int64_t path) {
  // make_call may copy a branch; each gradient takes the memory format of the branch as passed.
  const std::vector<Tensor> passed = branches;
  const SETensors se{fc1_weight, fc1_bias, fc2_weight, fc2_bias};
  Call call = make_call(std::move(branches), se);
  Tail& tail = call.tail;
  const Tensor& x = passed[0];
  check(grad, "grad", x, {tail.B, tail.S * tail.C, x.size(2), x.size(3)});
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "psa_tail: grad of another dtype");
  for (const Tensor& saved : {squeeze, attention}) {
    check(saved, "squeeze or attention", x, {tail.B, tail.S, tail.C});
    STD_TORCH_CHECK(saved.is_contiguous() && saved.scalar_type() == accumulator_type(x),
                    "psa_tail: squeeze and attention must be contiguous, in the accumulator's "
                    "dtype");
  }
  GradientTensors result = make_gradients(passed, se, branch_grads, fc_grads);
  if (tail.B > 0) {
    call.concat = with_uniform_pixel_stride(grad);
    tail.concat = strided(call.concat);
    tail.squeeze = const_cast<void*>(squeeze.const_data_ptr());
    tail.attention = const_cast<void*>(attention.const_data_ptr());
    Device::backward(tail, result.gradients, x, path);
  } else {
    for (Tensor& g : result.fc) torch::stable::zero_(g);
  }
  return {result.branches, result.fc};
}

}  // namespace
}  // namespace psa

STABLE_TORCH_LIBRARY_IMPL(epsanet_fused, CPU, m) {
  m.impl("psa_tail_native", TORCH_BOX(&psa::forward<psa::OnCpu>));
  m.impl("psa_tail_inference", TORCH_BOX(&psa::inference<psa::OnCpu>));
  m.impl("psa_tail_native_backward", TORCH_BOX(&psa::backward<psa::OnCpu>));
}

#ifdef PSA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(epsanet_fused, CUDA, m) {
  m.impl("psa_tail_native", TORCH_BOX(&psa::forward<psa::OnCuda>));
  m.impl("psa_tail_inference", TORCH_BOX(&psa::inference<psa::OnCuda>));
  m.impl("psa_tail_native_backward", TORCH_BOX(&psa::backward<psa::OnCuda>));
}
#endif

// Describes the library: backends/compiled.py reads these strings by ctypes.
#define PSA_EXPORT extern "C" __attribute__((visibility("default"))) const char*

// The CPU's instruction set in use, null if the environment names one that can't run.
PSA_EXPORT epsanet_fused_cpu_capability() {
  try {
    return psa::cpu::capability();
  } catch (const std::exception&) {  // the environment names an unsupported instruction set
    return nullptr;
  }
}

// The CUDA architectures, "" if the library was built without CUDA.
PSA_EXPORT epsanet_fused_cuda_archs() {
#ifdef PSA_WITH_CUDA
  return PSA_WITH_CUDA;
#else
  return "";
#endif
}

// The reason for a build without CUDA, or "".
PSA_EXPORT epsanet_fused_build_note() {
  return PSA_BUILD_NOTE;
}
