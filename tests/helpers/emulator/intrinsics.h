// csrc/cuda/intrinsics.cuh for a CPU: with PSA_EMULATED defined, the kernels' sources include this
// file instead. emulator.cpp lists the errors that the emulator reports.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#define PSA_KERNEL(threads, blocks) void
#define PSA_PARAM(Type) const Type
#define PSA_DEVICE inline
#define PSA_HOST_DEVICE inline
#define PSA_HAS_CLUSTERS 1

namespace emulator {

// Ends the launch with a std::runtime_error.
[[noreturn]] void fail(const std::string& message);

// The coordinates of the running thread.
struct ThreadCoords {
  int thread, threads;
  int64_t block, blocks;
  int rank, cluster;
  unsigned char* shared;
};
extern ThreadCoords coords;

void sync_block();
float shuffle_xor(float value, int mask);
void cluster_arrive();
void cluster_wait();
float load_remote(const float* p, int rank);
void barrier_init(uint64_t* barrier);
void fence_barriers();
void barrier_expect(uint64_t* barrier, uint32_t bytes);
void barrier_wait(uint64_t* barrier);
void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier);

// Fail unless an access of `bytes` is aligned to 16 and lies in shared memory or a known tensor.
void check_shared(const void* p, int64_t bytes);
void check_global(const void* p, int64_t bytes);

void launch(const char* name, int64_t blocks, int threads, int cluster, int64_t shared_bytes,
            const std::function<void()>& kernel);

}  // namespace emulator

namespace psa::cuda {

inline int thread_index() {
  return emulator::coords.thread;
}
inline int block_threads() {
  return emulator::coords.threads;
}
inline int64_t block_index() {
  return emulator::coords.block;
}
inline int64_t block_count() {
  return emulator::coords.blocks;
}
inline unsigned char* shared_memory() {
  return emulator::coords.shared;
}
inline void sync_block() {
  emulator::sync_block();
}
inline float shuffle_xor(float value, int mask) {
  return emulator::shuffle_xor(value, mask);
}
inline float exponential(float x) {
  return std::exp(x);
}

struct alignas(16) Vec {
  uint32_t word[4];
};
inline Vec load_shared(const void* p) {
  emulator::check_shared(p, 16);
  Vec v;
  std::memcpy(&v, p, 16);
  return v;
}
inline Vec load_global(const void* p) {
  emulator::check_global(p, 16);
  Vec v;
  std::memcpy(&v, p, 16);
  return v;
}
inline Vec load_global_evict_first(const void* p) {
  return load_global(p);
}
inline void store_global(void* p, Vec v) {
  emulator::check_global(p, 16);
  std::memcpy(p, &v, 16);
}

inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of_half(uint16_t bits) {
  uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, digits = bits & 1023;
  if (exponent == 31) return float_of_bits(sign | 0x7f800000 | digits << 13);
  if (exponent == 0) return (sign ? -1.f : 1.f) * std::ldexp(float(digits), -24);
  return float_of_bits(sign | (exponent + 112) << 23 | digits << 13);
}
inline uint16_t half_of_float(float x) {
  uint32_t bits = bits_of_float(x);
  uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return 0x7fff;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 and more: infinity
  if (bits < 0x38800000) {                       // below the smallest normal number
    return sign | uint16_t(std::nearbyint(std::ldexp(std::fabs(x), 24)));
  }
  return sign | uint16_t((bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13);
}
inline uint16_t bfloat_of_float(float x) {
  if (std::isnan(x)) return 0x7fff;
  uint32_t bits = bits_of_float(x);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint32_t halves_of_floats(float low, float high) {
  return half_of_float(low) | uint32_t(half_of_float(high)) << 16;
}
inline uint32_t bfloats_of_floats(float low, float high) {
  return bfloat_of_float(low) | uint32_t(bfloat_of_float(high)) << 16;
}

inline int cluster_rank() {
  return emulator::coords.rank;
}
inline int cluster_size() {
  return emulator::coords.cluster;
}
inline void cluster_arrive() {
  emulator::cluster_arrive();
}
inline void cluster_wait() {
  emulator::cluster_wait();
}
inline float load_remote(const float* p, int rank) {
  return emulator::load_remote(p, rank);
}

using Barrier = uint64_t;
inline void barrier_init(Barrier* barrier) {
  emulator::barrier_init(barrier);
}
inline void fence_barriers() {
  emulator::fence_barriers();
}
inline void barrier_expect(Barrier* barrier, uint32_t bytes) {
  emulator::barrier_expect(barrier, bytes);
}
inline void barrier_wait(Barrier* barrier) {
  emulator::barrier_wait(barrier);
}
inline void bulk_copy(void* to, const void* from, uint32_t bytes, Barrier* barrier) {
  emulator::bulk_copy(to, from, bytes, barrier);
}

template <class Params>
void launch(void (*kernel)(Params), const char* name, int64_t blocks, int threads, int cluster,
            int64_t shared_bytes, void*, const Params& params) {
  emulator::launch(name, blocks, threads, cluster, shared_bytes, [&] { kernel(params); });
}

}  // namespace psa::cuda
