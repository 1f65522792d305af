#include "device.cuh"

namespace psa::cuda {

static int attribute(cudaDeviceAttr what, int device) {
  int value = 0;
  cudaError_t error = cudaDeviceGetAttribute(&value, what, device);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("cudaDeviceGetAttribute: ") + cudaGetErrorString(error));
  }
  return value;
}

Limits limits_of(int device) {
  Limits limits;
  limits.arch = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                attribute(cudaDevAttrComputeCapabilityMinor, device);
  limits.processors = attribute(cudaDevAttrMultiProcessorCount, device);
  limits.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  limits.shared_per_processor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  return limits;
}

}  // namespace psa::cuda
