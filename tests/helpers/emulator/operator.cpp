// The functions of csrc/cuda/cuda.h, for ctypes. Each returns the message of an exception, or ""
// for success.
#include <exception>
#include <stdexcept>
#include <string>

#include "../../../csrc/cuda/cuda.h"

namespace {

template <class F>
const char* guarded(F f) {
  static std::string message;
  message.clear();
  try {
    f();
  } catch (const std::invalid_argument& error) {
    message = std::string("invalid: ") + error.what();
  } catch (const std::exception& error) {
    message = std::string("error: ") + error.what();
  }
  return message.c_str();
}

}  // namespace

extern "C" {

const char* emulator_forward_workspace(const psa::Tail* tail, int path, int64_t* bytes) {
  return guarded([&] { *bytes = psa::cuda::forward_workspace(*tail, psa::cuda::Path(path), 0); });
}

const char* emulator_forward(const psa::Tail* tail, const psa::Epilogue* epilogue, int path,
                             void* workspace) {
  return guarded(
      [&] { psa::cuda::forward(*tail, *epilogue, psa::cuda::Path(path), 0, workspace, nullptr); });
}

const char* emulator_backward_workspace(const psa::Tail* tail, const psa::Gradients* gradients,
                                        int path, int64_t* bytes) {
  return guarded(
      [&] { *bytes = psa::cuda::backward_workspace(*tail, *gradients, psa::cuda::Path(path), 0); });
}

const char* emulator_backward(const psa::Tail* tail, const psa::Gradients* gradients, int path,
                              void* workspace) {
  return guarded([&] {
    psa::cuda::backward(*tail, *gradients, psa::cuda::Path(path), 0, workspace, nullptr);
  });
}
}
