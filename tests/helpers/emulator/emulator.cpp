// Runs the CUDA kernels' sources on a CPU: a fiber for each thread, all blocks of a cluster at
// once, one cluster after another. A thread runs until it must wait.
//
// What a card forgives or hides by luck fails here: shared memory starts as NaN and is NaN again
// once its block has ended, and a bulk copy's target is NaN until someone waits for it; threads
// take their turns forwards, backwards or shuffled, so that a missing barrier reads what isn't
// there yet; wide accesses must be aligned and lie in a known tensor; bytes written beyond the
// shared memory that was asked for are noticed; a barrier or shuffle that some thread never reaches
// is reported.
#include <setjmp.h>
#include <ucontext.h>

#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "../../csrc/cuda/kernels.h"
#include "intrinsics.h"

namespace emulator {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 * 1024;
constexpr int64_t kMargin = 256;  // bytes around shared memory that nobody may write
constexpr unsigned char kPoison = 0xff;

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
};

// One phase of a barrier in shared memory.
struct Phase {
  bool armed = false, complete = false;
  uint32_t expected = 0, issued = 0;
  std::vector<Copy> copies;
};

struct Warp {
  float values[2][kWarp];  // of this shuffle and of the one before
  int arrived = 0, generation = 0;
};

struct Block {
  std::vector<unsigned char> memory;
  unsigned char* shared;
  int64_t shared_bytes;
  int arrived = 0, generation = 0, ended = 0;
  std::vector<Warp> warps;
  std::map<uint64_t*, Phase> barriers;
};

struct Fiber {
  Place place;
  Block* block;
  std::unique_ptr<char[]> stack;
  ucontext_t context;
  jmp_buf resume;
  bool started = false, done = true;
  const int* waits_for = nullptr;  // a generation, until it is past `ticket`
  int ticket = 0, cluster_ticket = 0;
  uint64_t* barrier = nullptr;
};

enum Order { forwards, backwards, shuffled };

struct State {
  int order = forwards;
  psa::cuda::Limits limits = {90, 132, 232448, 233472};
  std::vector<std::pair<const char*, int64_t>> tensors;
  std::string launches;
  int64_t wide_accesses = 0;  // of 16 bytes of global memory
  std::mt19937 random;

  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Block> blocks;
  int cluster_arrived = 0, cluster_generation = 0, cluster_threads = 0;
  const std::function<void()>* kernel = nullptr;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  ucontext_t scheduler_context;
  std::string error;
} state;

void to_scheduler() {
  Fiber* fiber = state.current;
  if (_setjmp(fiber->resume) == 0) _longjmp(state.scheduler, 1);
}

// A fiber outlives its launch, and is used for the next one.
void fiber_main() {
  for (;;) {
    (*state.kernel)();
    Fiber* fiber = state.current;
    fiber->done = true;
    Block& block = *fiber->block;
    if (++block.ended == fiber->place.threads) {
      std::memset(block.shared, kPoison, size_t(block.shared_bytes));
    }
    to_scheduler();
  }
}

void switch_to(Fiber* fiber) {
  state.current = fiber;
  place = fiber->place;
  if (_setjmp(state.scheduler) != 0) return;
  if (fiber->started) _longjmp(fiber->resume, 1);
  fiber->started = true;
  fiber->stack.reset(new char[kStack]);
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = kStack;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, fiber_main, 0);
  setcontext(&fiber->context);
}

void wait_past(const int* generation, int ticket) {
  state.current->waits_for = generation;
  state.current->ticket = ticket;
  to_scheduler();
}

bool in_shared(const void* p, int64_t bytes) {
  auto at = static_cast<const unsigned char*>(p);
  const Block& block = *state.current->block;
  return at >= block.shared && at + bytes <= block.shared + block.shared_bytes;
}

void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) fail("a misaligned access of 16 bytes");
}

Phase& phase_of(uint64_t* barrier) {
  auto& barriers = state.current->block->barriers;
  auto found = barriers.find(barrier);
  if (found == barriers.end()) fail("a barrier is used that nobody has initialised");
  return found->second;
}

// Whether all of a barrier's bytes are under way: then they arrive now.
bool complete(Phase& phase) {
  if (phase.complete) return true;
  if (!phase.armed || phase.issued != phase.expected) return false;
  for (const Copy& copy : phase.copies) std::memcpy(copy.to, copy.from, copy.bytes);
  return phase.complete = true;
}

bool can_run(Fiber& fiber) {
  if (fiber.done) return false;
  if (fiber.waits_for) {
    if (*fiber.waits_for <= fiber.ticket) return false;
    fiber.waits_for = nullptr;
  }
  if (fiber.barrier) {
    if (!complete(fiber.block->barriers[fiber.barrier])) return false;
    fiber.barrier = nullptr;
  }
  return true;
}

void set_up(Block& block, int threads, int64_t shared_bytes) {
  block = Block();
  block.memory.assign(size_t(shared_bytes + 2 * kMargin + 128), kPoison);
  auto start = reinterpret_cast<uintptr_t>(block.memory.data()) + kMargin;
  block.shared = reinterpret_cast<unsigned char*>((start + 127) / 128 * 128);
  block.shared_bytes = shared_bytes;
  block.warps.resize(size_t((threads + kWarp - 1) / kWarp));
}

bool margins_are_whole(const Block& block) {
  auto begin = block.memory.data(), end = begin + block.memory.size();
  auto poisoned = [](unsigned char x) { return x == kPoison; };
  return std::all_of(begin, static_cast<const unsigned char*>(block.shared), poisoned) &&
         std::all_of(static_cast<const unsigned char*>(block.shared) + block.shared_bytes, end,
                     poisoned);
}

// Runs fiber i until it must wait. Whether it could run at all.
bool run_fiber(size_t i) {
  Fiber& fiber = *state.fibers[i];
  if (!can_run(fiber)) return false;
  switch_to(&fiber);
  if (!state.error.empty()) throw std::runtime_error(state.error);
  return true;
}

// A turn for every thread of the cluster, in any order.
bool run_mixed(size_t count) {
  std::vector<size_t> turns(count);
  std::iota(turns.begin(), turns.end(), size_t(0));
  std::shuffle(turns.begin(), turns.end(), state.random);
  bool progress = false;
  for (size_t i : turns) progress |= run_fiber(i);
  return progress;
}

// Each warp runs until all of it must wait, and each block likewise: the others lag far behind.
bool run_unfair(int threads, int cluster) {
  auto turn = [](int i, int size) { return state.order == backwards ? size - 1 - i : i; };
  bool progress = false;
  for (int rank = 0; rank < cluster; ++rank) {
    for (bool block = true; block; progress |= block) {
      block = false;
      for (int first = 0; first < threads; first += kWarp) {
        for (bool warp = true; warp; block |= warp) {
          warp = false;
          for (int i = first; i < first + kWarp; ++i) {
            warp |= run_fiber(size_t(turn(rank, cluster) * threads + turn(i, threads)));
          }
        }
      }
    }
  }
  return progress;
}

void run_cluster(int64_t first_block, int64_t blocks, int threads, int cluster,
                 int64_t shared_bytes) {
  size_t count = size_t(threads) * size_t(cluster);
  state.blocks.resize(size_t(cluster));
  for (Block& block : state.blocks) set_up(block, threads, shared_bytes);
  while (state.fibers.size() < count) state.fibers.push_back(std::make_unique<Fiber>());
  for (size_t i = 0; i < count; ++i) {
    Fiber& fiber = *state.fibers[i];
    int rank = int(i) / threads;
    fiber.block = &state.blocks[size_t(rank)];
    fiber.place = {int(i) % threads,   threads, first_block + rank, blocks, rank, cluster,
                   fiber.block->shared};
    fiber.done = false;
    fiber.waits_for = nullptr;
    fiber.barrier = nullptr;
  }
  state.cluster_arrived = state.cluster_generation = 0;
  state.cluster_threads = int(count);

  while (std::any_of(state.fibers.begin(), state.fibers.begin() + ptrdiff_t(count),
                     [](const auto& fiber) { return !fiber->done; })) {
    bool progress = state.order == shuffled ? run_mixed(count) : run_unfair(threads, cluster);
    if (!progress) throw std::runtime_error("some threads wait for others forever");
  }
  for (const Block& block : state.blocks) {
    if (!margins_are_whole(block)) throw std::runtime_error("written beyond shared memory");
  }
}

}  // namespace

Place place;

void fail(const std::string& message) {
  if (state.error.empty()) state.error = message;
  _longjmp(state.scheduler, 1);
}

void sync_block() {
  Block& block = *state.current->block;
  int ticket = block.generation;
  if (++block.arrived == place.threads) {
    block.arrived = 0;
    ++block.generation;
  }
  wait_past(&block.generation, ticket);
}

float shuffle_xor(float value, int mask) {
  int thread = place.thread, lane = thread % kWarp;
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
  if (rank < 0 || rank >= place.cluster || !in_shared(p, sizeof(float))) {
    fail("a remote read of what isn't the cluster's");
  }
  auto offset = reinterpret_cast<const unsigned char*>(p) - place.shared;
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
  if (bytes == 0 || bytes % 16) fail("a bulk copy of a number of bytes that isn't allowed");
  std::memset(to, kPoison, bytes);
  Phase& phase = phase_of(barrier);
  phase.issued += bytes;
  phase.copies.push_back({to, from, bytes});
}

void check_shared(const void* p, int64_t bytes) {
  check_aligned(p);
  if (!in_shared(p, bytes)) fail("an access to what isn't the block's shared memory");
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
    state.fibers.clear();  // they stand in the middle of a kernel
    throw std::runtime_error(where + error.what());
  }
}

}  // namespace emulator

namespace psa::cuda {

Limits limits_of(int) {
  return emulator::state.limits;
}

}  // namespace psa::cuda

// What the tests set and ask.
extern "C" {

void emulator_configure(int arch, int processors, int64_t shared_per_block,
                        int64_t shared_per_processor, int order) {
  emulator::state.limits = {arch, processors, shared_per_block, shared_per_processor};
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
