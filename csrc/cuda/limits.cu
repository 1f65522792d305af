// Queries the limits of a device.
#include "device.cuh"

namespace psa::cuda {

static int attribute(cudaDeviceAttr attr, int device) {
  int value = 0;
  cudaError_t error = cudaDeviceGetAttribute(&value, attr, device);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("cudaDeviceGetAttribute: ") + cudaGetErrorString(error));
  }
  return value;
}

DeviceLimits device_limits(int device) {
  DeviceLimits limits;
  limits.arch = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                attribute(cudaDevAttrComputeCapabilityMinor, device);
  limits.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  limits.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  limits.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  return limits;
}

}  // namespace psa::cuda
