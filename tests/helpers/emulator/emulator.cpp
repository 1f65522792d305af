// Runs the CUDA kernels' sources on a CPU: defines the functions of intrinsics.h, launches, and the
// functions that harness.py calls.
//
// The emulator reports errors that a GPU may hide:
// - Shared memory is NaN at the start and again when its block has ended; the target of a bulk copy
//   is NaN until a thread has waited for the copy. A read that comes too early gives NaN.
// - Threads run forwards, backwards or shuffled, so that a missing barrier gives wrong results.
// - A 16-byte access must be aligned and lie within a known tensor or shared memory.
// - A write beyond the shared memory of the launch fails.
// - A barrier or shuffle that some thread never reaches fails.
#include "scheduler.h"

namespace emulator {

ThreadCoords coords;

void fail(const std::string& message) {
  if (state.error.empty()) state.error = message;
  _longjmp(state.scheduler, 1);
}

void sync_block() {
  Block& block = *state.current->block;
  int ticket = block.generation;
  if (++block.arrived == coords.threads) {
    block.arrived = 0;
    ++block.generation;
  }
  wait_past(&block.generation, ticket);
}

float shuffle_xor(float value, int mask) {
  int thread = coords.thread, lane = thread % kWarp;
  Warp& warp = state.current->block->warps[size_t(thread / kWarp)];
  int ticket = warp.generation;
  float* values = warp.values[ticket % 2];
  values[lane] = value;
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    ++warp.generation;
  }
  wait_past(&warp.generation, ticket);
  return values[lane ^ mask];
}

void cluster_arrive() {
  state.current->cluster_ticket = state.cluster_generation;
  if (++state.cluster_arrived == state.cluster_threads) {
    state.cluster_arrived = 0;
    ++state.cluster_generation;
  }
}

void cluster_wait() {
  wait_past(&state.cluster_generation, state.current->cluster_ticket);
}

float load_remote(const float* p, int rank) {
  if (rank < 0 || rank >= coords.cluster || !in_shared(p, sizeof(float))) {
    fail("a remote read outside of the cluster's shared memory");
  }
  auto offset = reinterpret_cast<const unsigned char*>(p) - coords.shared;
  float value;
  std::memcpy(&value, state.blocks[size_t(rank)].shared + offset, sizeof(value));
  return value;
}

void barrier_init(uint64_t* barrier) {
  if (!in_shared(barrier, 8)) fail("a barrier outside of shared memory");
  state.current->block->barriers[barrier] = Phase();
}

void fence_barriers() {}

void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  Phase& phase = phase_of(barrier);
  if (phase.armed) fail("a barrier is armed twice");
  phase.armed = true;
  phase.expected = bytes;
}

void barrier_wait(uint64_t* barrier) {
  phase_of(barrier);
  state.current->barrier = barrier;
  to_scheduler();
}

void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  check_global(from, bytes);
  check_shared(to, bytes);
  if (bytes == 0 || bytes % 16)
    fail("a bulk copy whose number of bytes isn't a positive multiple of 16");
  std::memset(to, kPoison, bytes);
  Phase& phase = phase_of(barrier);
  phase.issued += bytes;
  phase.copies.push_back({to, from, bytes});
}

void check_shared(const void* p, int64_t bytes) {
  check_aligned(p);
  if (!in_shared(p, bytes)) fail("an access outside of the block's shared memory");
}

void check_global(const void* p, int64_t bytes) {
  check_aligned(p);
  auto at = static_cast<const char*>(p);
  for (auto [start, size] : state.tensors) {
    if (at >= start && at + bytes <= start + size) {
      state.wide_accesses += bytes / 16;
      return;
    }
  }
  fail("a wide access outside of all tensors");
}

void launch(const char* name, int64_t blocks, int threads, int cluster, int64_t shared_bytes,
            const std::function<void()>& kernel) {
  std::string where = std::string(name) + ": ";
  if (blocks == 0) return;
  if (cluster > 1 && state.limits.arch < 90) throw std::runtime_error(where + "has no clusters");
  if (shared_bytes > state.limits.shared_per_block) {
    throw std::runtime_error(where + "too much shared memory");
  }
  if (blocks % cluster) throw std::runtime_error(where + "not a whole number of clusters");
  state.launches += std::string(name) + (cluster > 1 ? "*" + std::to_string(cluster) : "") + " ";
  state.kernel = &kernel;
  state.error.clear();
  try {
    for (int64_t block = 0; block < blocks; block += cluster) {
      run_cluster(block, blocks, threads, cluster, shared_bytes);
    }
  } catch (const std::runtime_error& error) {
    state.fibers.clear();  // they stopped in the middle of a kernel
    throw std::runtime_error(where + error.what());
  }
}

}  // namespace emulator

namespace psa::cuda {

DeviceLimits device_limits(int) {
  return emulator::state.limits;
}

}  // namespace psa::cuda

// The functions that harness.py calls besides those of operator.cpp.
extern "C" {

void emulator_configure(int arch, int multiprocessors, int64_t shared_per_block,
                        int64_t shared_per_multiprocessor, int order) {
  emulator::state.limits = {arch, multiprocessors, shared_per_block, shared_per_multiprocessor};
  emulator::state.order = order;
  emulator::state.random.seed(1);
  emulator::state.tensors.clear();
  emulator::state.launches.clear();
  emulator::state.wide_accesses = 0;
}

void emulator_add_tensor(const char* start, int64_t bytes) {
  emulator::state.tensors.push_back({start, bytes});
}

const char* emulator_launches() {
  return emulator::state.launches.c_str();
}

int64_t emulator_wide_accesses() {
  return emulator::state.wide_accesses;
}
}
