// The emulator's scheduler: runs each CUDA thread as a fiber. All blocks of a cluster run at once,
// one cluster after another. A fiber runs until it must wait for others.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "../../../csrc/cuda/kernels.h"
#include "intrinsics.h"

namespace emulator {
namespace {

using psa::cuda::kWarp;
constexpr size_t kStack = 64 * 1024;
constexpr int64_t kMargin = 256;  // bytes around shared memory that no thread may write
constexpr unsigned char kPoison = 0xff;

// An asynchronous copy that has been issued.
struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
};

// The single phase of a barrier in shared memory.
struct Phase {
  bool armed = false, complete = false;
  uint32_t expected = 0, issued = 0;
  std::vector<Copy> copies;
};

struct Warp {
  float values[2][kWarp];  // of the current shuffle and of the previous one
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
  ThreadCoords coords;
  Block* block;
  std::unique_ptr<char[]> stack;
  ucontext_t context;
  jmp_buf resume;
  bool started = false, done = true;
  const int* waits_for = nullptr;  // a generation: the fiber waits until it exceeds `ticket`
  int ticket = 0, cluster_ticket = 0;
  uint64_t* barrier = nullptr;  // the fiber waits until this barrier is complete
};

// The order in which fibers take turns.
enum Order { forwards, backwards, shuffled };

struct State {
  int order = forwards;
  psa::cuda::DeviceLimits limits = {90, 132, 232448, 233472};
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

// A fiber outlives its launch; the next launch reuses it.
void fiber_main() {
  for (;;) {
    (*state.kernel)();
    Fiber* fiber = state.current;
    fiber->done = true;
    Block& block = *fiber->block;
    if (++block.ended == fiber->coords.threads) {
      std::memset(block.shared, kPoison, size_t(block.shared_bytes));
    }
    to_scheduler();
  }
}

void switch_to(Fiber* fiber) {
  state.current = fiber;
  coords = fiber->coords;
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
  if (found == barriers.end()) fail("a barrier is used before it is initialised");
  return found->second;
}

// True if all of a barrier's bytes have been issued; the copies then take place now.
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

bool margins_are_intact(const Block& block) {
  auto begin = block.memory.data(), end = begin + block.memory.size();
  auto poisoned = [](unsigned char x) { return x == kPoison; };
  return std::all_of(begin, static_cast<const unsigned char*>(block.shared), poisoned) &&
         std::all_of(static_cast<const unsigned char*>(block.shared) + block.shared_bytes, end,
                     poisoned);
}

// Runs fiber i until it must wait. Returns false if it can't run.
bool run_fiber(size_t i) {
  Fiber& fiber = *state.fibers[i];
  if (!can_run(fiber)) return false;
  switch_to(&fiber);
  if (!state.error.empty()) throw std::runtime_error(state.error);
  return true;
}

// Gives every thread of the cluster one turn, in random order. Returns true if any could run.
bool run_shuffled(size_t count) {
  std::vector<size_t> turns(count);
  std::iota(turns.begin(), turns.end(), size_t(0));
  std::shuffle(turns.begin(), turns.end(), state.random);
  bool progress = false;
  for (size_t i : turns) progress |= run_fiber(i);
  return progress;
}

// Calls turn() until it returns false. Returns true if any call returned true.
template <class Turn>
bool run_until_stuck(const Turn& turn) {
  bool progress = false;
  while (turn()) progress = true;
  return progress;
}

// Runs each warp until all of its threads must wait, and each block likewise, so that the other
// warps and blocks lag far behind. Returns true if any thread could run.
bool run_unfair(int threads, int cluster) {
  const auto position = [](int i, int size) { return state.order == backwards ? size - 1 - i : i; };
  bool progress = false;
  for (int rank = 0; rank < cluster; ++rank) {
    const auto run_warp = [&](int first) {
      bool ran = false;
      for (int i = first; i < first + kWarp; ++i) {
        ran |= run_fiber(size_t(position(rank, cluster) * threads + position(i, threads)));
      }
      return ran;
    };
    progress |= run_until_stuck([&] {
      bool ran = false;
      for (int first = 0; first < threads; first += kWarp) {
        ran |= run_until_stuck([&] { return run_warp(first); });
      }
      return ran;
    });
  }
  return progress;
}

// Runs all threads of one cluster to their end.
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
    fiber.coords = {int(i) % threads,   threads, first_block + rank, blocks, rank, cluster,
                    fiber.block->shared};
    fiber.done = false;
    fiber.waits_for = nullptr;
    fiber.barrier = nullptr;
  }
  state.cluster_arrived = state.cluster_generation = 0;
  state.cluster_threads = int(count);

  while (std::any_of(state.fibers.begin(), state.fibers.begin() + ptrdiff_t(count),
                     [](const auto& fiber) { return !fiber->done; })) {
    bool progress = state.order == shuffled ? run_shuffled(count) : run_unfair(threads, cluster);
    if (!progress) throw std::runtime_error("some threads wait for others forever");
  }
  for (const Block& block : state.blocks) {
    if (!margins_are_intact(block)) throw std::runtime_error("written beyond shared memory");
  }
}

}  // namespace

}  // namespace emulator
