// Converts PyTorch's tensors to the types of psa.h, checks them and allocates new ones.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "psa.h"

namespace psa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    default:
      STD_TORCH_CHECK(false, "psa_tail: ", name, " must be float16, bfloat16, float32 or float64");
  }
}

inline Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                            ScalarType dtype, const Tensor& like) {
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(),
                                                         strides.data(), code, device_type,
                                                         device_index, &handle));
  return Tensor(handle);
}

inline Tensor empty_contiguous(const std::vector<int64_t>& sizes, ScalarType dtype,
                               const Tensor& like) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) {
    strides[i - 1] = strides[i] * (sizes[i] > 0 ? sizes[i] : 1);
  }
  return empty_strided(sizes, strides, dtype, like);
}

inline Tensor empty_image(int64_t B, int64_t C, int64_t H, int64_t W, bool channels_last,
                          const Tensor& like) {
  if (!channels_last) return empty_contiguous({B, C, H, W}, like.scalar_type(), like);
  return empty_strided({B, C, H, W}, {H * W * C, 1, W * C, C}, like.scalar_type(), like);
}

// The rule of utils/memory_format.py, which the fake kernels follow too.
inline bool is_channels_last(const Tensor& x) {
  const auto size = x.sizes(), stride = x.strides();
  const int64_t C = size[1], H = size[2], W = size[3];
  if (C == 1 || H * W == 1 || x.is_contiguous()) return false;
  return stride[1] == 1 && (stride[3] >= C || W == 1) && (stride[2] >= C * W || H == 1);
}

inline bool all_channels_last(const std::vector<Tensor>& tensors) {
  for (const Tensor& x : tensors) {
    if (!is_channels_last(x)) return false;
  }
  return true;
}

// Returns x if one stride leads from each pixel to the next, across rows too; else a copy.
inline Tensor with_uniform_pixel_stride(const Tensor& x) {
  const auto size = x.sizes(), stride = x.strides();
  if (size[2] == 1 || size[3] == 1 || stride[2] == size[3] * stride[3]) return x;
  return torch::stable::contiguous(x, is_channels_last(x)
                                          ? torch::headeronly::MemoryFormat::ChannelsLast
                                          : torch::headeronly::MemoryFormat::Contiguous);
}

// The stride of a dimension of size one is meaningless. This returns the stride that a dense tensor
// would have there, so that the kernels recognize such tensors as dense.
inline Strided strided(const Tensor& x, void* data) {
  const auto size = x.sizes(), stride = x.strides();
  const int64_t C = size[1], HW = size[2] * size[3];
  const int64_t pixel = HW == 1 ? 1 : size[3] > 1 ? stride[3] : stride[2];
  const int64_t channel = C == 1 ? HW : stride[1];
  return {data, size[0] == 1 ? C * HW : stride[0], channel, pixel};
}
inline Strided strided(const Tensor& x) {
  return strided(x, const_cast<void*>(x.const_data_ptr()));
}

// With per_branch, the first dimension is that of the branches.
inline Matrix matrix(const Tensor& m, const char* name, bool writable = false,
                     bool per_branch = false) {
  const auto stride = m.strides();
  void* data = writable ? m.mutable_data_ptr() : const_cast<void*>(m.const_data_ptr());
  const int64_t row = per_branch ? 1 : 0, column = row + 1;
  return {data, dtype_of(m, name), stride[row], m.dim() > column ? stride[column] : 0,
          per_branch ? stride[0] : 0};
}

inline bool has_sizes(const Tensor& x, std::initializer_list<int64_t> sizes) {
  const auto actual = x.sizes();
  return actual.size() == sizes.size() && std::equal(actual.begin(), actual.end(), sizes.begin());
}

inline void check_device(const Tensor& x, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(x.device() == like.device(), "psa_tail: ", name,
                  " is on another device than branches[0]");
}

inline void check(const Tensor& x, const char* name, const Tensor& like,
                  std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(has_sizes(x, sizes), "psa_tail: ", name, " has another shape than it must have");
  check_device(x, name, like);
}

// Checks for (rows, columns), or (rows, columns, 1, 1) as the weight of a 1x1 convolution has.
inline void check_weight(const Tensor& x, const char* name, const Tensor& like, int64_t rows,
                         int64_t columns) {
  STD_TORCH_CHECK(has_sizes(x, {rows, columns}) || has_sizes(x, {rows, columns, 1, 1}),
                  "psa_tail: ", name, " has another shape than it must have");
  check_device(x, name, like);
}

}  // namespace psa
