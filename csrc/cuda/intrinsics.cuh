// All code that only nvcc compiles: PTX, built-in variables, launches. The kernels use the device
// through these functions alone; tests/helpers/emulator/intrinsics.h defines the same ones for a
// CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

// A kernel with at most `threads` threads in a block, `blocks` of which shall fit a multiprocessor.
#define PSA_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define PSA_PARAM(Type) const __grid_constant__ Type
#define PSA_DEVICE __device__ __forceinline__
#define PSA_HOST_DEVICE __host__ __device__ __forceinline__

namespace psa::cuda {

PSA_DEVICE int thread_index() {
  return int(threadIdx.x);
}
PSA_DEVICE int block_threads() {
  return int(blockDim.x);
}
PSA_DEVICE int64_t block_index() {
  return blockIdx.x;
}
PSA_DEVICE int64_t block_count() {
  return gridDim.x;
}

// The block's dynamic shared memory, aligned to 128 bytes.
PSA_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

PSA_DEVICE void sync_block() {
  __syncthreads();
}

// Returns the value of lane (own lane ^ mask). All 32 lanes of the warp must call it.
PSA_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

PSA_DEVICE float exponential(float x) {
  return expf(x);
}

// 16 bytes, as four words.
struct alignas(16) Vec {
  uint32_t word[4];
};

// Loads from shared memory.
PSA_DEVICE Vec load_shared(const void* p) {
  uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}

// Loads from global memory that no thread of the kernel writes.
PSA_DEVICE Vec load_global(const void* p) {
  uint4 v = __ldg(static_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}

// Likewise, for memory that is not read again soon: the caches evict it first.
PSA_DEVICE Vec load_global_evict_first(const void* p) {
  uint4 v = __ldcs(static_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}

PSA_DEVICE void store_global(void* p, Vec v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
               "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

PSA_DEVICE float float_of_bits(uint32_t bits) {
  return __uint_as_float(bits);
}
PSA_DEVICE uint32_t bits_of_float(float x) {
  return __float_as_uint(x);
}

PSA_DEVICE float float_of_half(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
PSA_DEVICE uint16_t half_of_float(float x) {
  return __half_as_ushort(__float2half_rn(x));
}
PSA_DEVICE uint16_t bfloat_of_float(float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// Two 16-bit numbers in one word, the first in the low half.
PSA_DEVICE uint32_t halves_of_floats(float low, float high) {
  __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&pair);
}
PSA_DEVICE uint32_t bfloats_of_floats(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&pair);
}

// An mbarrier in shared memory. Bulk copies complete it; each is used for one phase only.
using Barrier = uint64_t;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define PSA_HAS_CLUSTERS 1

PSA_DEVICE uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

PSA_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}
PSA_DEVICE int cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return int(size);
}
// After cluster_wait a block sees all writes that other blocks made before their cluster_arrive.
PSA_DEVICE void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
PSA_DEVICE void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// Reads *p from the shared memory of block `rank` of the cluster.
PSA_DEVICE float load_remote(const float* p, int rank) {
  uint32_t address;
  float value;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

// One thread initialises a barrier, calls fence_barriers(), then arms the barrier with the number
// of bytes that it will copy.
PSA_DEVICE void barrier_init(Barrier* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
PSA_DEVICE void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
PSA_DEVICE void barrier_expect(Barrier* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
PSA_DEVICE void barrier_wait(Barrier* barrier) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier))
      : "memory");
}

// Starts an asynchronous copy of `bytes`, a multiple of 16, from global to shared memory, both
// aligned to 16. Threads see the bytes after barrier_wait. L2 evicts the source first: it is not
// read again.
PSA_DEVICE void bulk_copy(void* to, const void* from, uint32_t bytes, Barrier* barrier) {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}
#endif

// Raises the kernel's limit of dynamic shared memory on the current device to `bytes`. The limit
// never shrinks: another host thread may be about to launch the kernel with more.
inline cudaError_t allow_shared(const void* kernel, int bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> allowed;
  int device;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  std::lock_guard<std::mutex> lock(mutex);
  int& limit = allowed[{kernel, device}];
  if (bytes <= limit) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) limit = bytes;
  return error;
}

// Launches a kernel that takes one struct. Clusters of more than one block need sm_90.
template <class Params>
void launch(void (*kernel)(Params), const char* name, int64_t blocks, int threads, int cluster,
            int64_t shared_bytes, void* stream, const Params& params) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) {
    throw std::invalid_argument(std::string(name) + ": the problem needs more than 2^31 blocks");
  }
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    error = allow_shared(reinterpret_cast<const void*>(kernel), int(shared_bytes));
  }
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  void* arguments[] = {const_cast<Params*>(&params)};
  if (error == cudaSuccess) {
    error = cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();  // clears the error, or the next launch would report it
    throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
  }
}

}  // namespace psa::cuda
