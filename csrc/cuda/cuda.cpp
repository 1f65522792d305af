// The CUDA half's interface: chooses kernels and cuts their grids. All decisions that a measurement
// on a card may change are in this file's small functions.
#include "cuda.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "problem.h"

namespace psa::cuda {
namespace {

constexpr int64_t kLargestGate = 96 * 1024;  // bytes of shared memory, on any card
constexpr int64_t kReservedShared = 1024;    // that CUDA keeps of each block's

// Threads over a tile of columns and over pixels.
struct Tile {
  int32_t tile, pixels;
  bool pixels_inner;
  int64_t tiles;
};

Tile tile_of(const Problem& p, Layout layout) {
  Tile t = {};
  int64_t units = p.SC();
  if (layout == Layout::columns) {
    units /= 16 / p.size;
    t.tiles = divide_up(units, 64);
    t.tile = int32_t(divide_up(units, t.tiles));
    t.pixels = kThreads / t.tile;
    return t;
  }
  const Strided& part = p.parts[0];
  t.pixels_inner = p.shape.HW > 1 && part.pixel < part.channel;
  if (t.pixels_inner) {
    t.pixels = 1;
    while (t.pixels < p.shape.HW && t.pixels < 128) t.pixels *= 2;
    t.tile = int32_t(std::min<int64_t>(units, kThreads / t.pixels));
  } else {
    t.tile = int32_t(std::min<int64_t>(units, 128));
    t.pixels = kThreads / t.tile;
  }
  t.tiles = divide_up(units, t.tile);
  return t;
}

template <class T>
void copy_tensors(const Strided (&from)[kMaxBranches], T (&to)[kMaxBranches]) {
  std::copy(from, from + kMaxBranches, to);
}

// The first pass: enough blocks to fill the card four times, if the pixels can be split so.
Sums sums_of(const Problem& p, float* sums) {
  Sums q = {};
  q.shape = p.shape;
  copy_tensors(p.parts, q.parts);
  if (p.backward()) q.cat = p.cat;
  q.sums = sums;
  int64_t HW = p.shape.HW, vec = 16 / p.size, smallest_split;
  if (p.layout == Layout::runs) {
    bool aligned = HW % vec == 0;
    for (int s = 0; s < p.shape.S; ++s) aligned = aligned && is_aligned(p.parts[s], p.size);
    int64_t windows = divide_up(HW + (aligned ? 0 : vec - 1), vec);
    q.long_rows = windows > kWarp;
    q.lanes = 1;
    while (q.lanes < windows && q.lanes < kWarp) q.lanes *= 2;
    q.rows = kThreads / q.lanes * (q.long_rows ? 1 : kFlight);
    q.blocks = int32_t(divide_up(p.SC(), q.rows));
    smallest_split = q.long_rows ? kWarp * kFlight * vec : HW;
  } else {
    Tile t = tile_of(p, p.layout);
    q.tile = t.tile;
    q.tile_pixels = t.pixels;
    q.pixels_inner = t.pixels_inner;
    q.blocks = int32_t(t.tiles);
    smallest_split = t.pixels * kFlight;
  }
  int64_t wanted = divide_up(4 * p.limits.processors, std::max<int64_t>(1, p.shape.B * q.blocks));
  int64_t splits = std::min(wanted, divide_up(HW, smallest_split));
  q.split_pixels = divide_up(divide_up(HW, splits), vec) * vec;
  q.splits = int32_t(divide_up(HW, q.split_pixels));
  return q;
}

// The second pass: blocks of 64 KB and more, to be worth a gate; smaller ones where that leaves
// processors idle.
Recalibrate recalibrate_of(const Problem& p, Layout layout) {
  Recalibrate q = {};
  q.shape = p.shape;
  copy_tensors(p.backward() ? p.grads : p.parts, q.parts);
  q.cat = p.cat;
  int64_t wanted = 2 * p.limits.processors, S = p.shape.S;
  if (layout == Layout::runs) {
    int64_t vectors = p.shape.run * p.size / 16 + 2;  // with one that is cut off at each end
    int64_t share = kThreads * kFlight;
    q.branches = p.shape.S;
    if (p.shape.B * divide_up(vectors, share) < wanted) {
      q.branches = 1;
      if (p.shape.B * S * divide_up(vectors, share) < wanted) share = kThreads;
    }
    int64_t shares = divide_up(vectors, share);
    q.share = int32_t(divide_up(vectors, shares));
    q.blocks = int32_t(shares * divide_up(S, q.branches));
  } else {
    Tile t = tile_of(p, layout);
    q.tile = t.tile;
    q.tile_pixels = t.pixels;
    q.pixels_inner = t.pixels_inner;
    q.block_pixels = 4 * kFlight * t.pixels;
    if (p.shape.B * t.tiles * divide_up(p.shape.HW, q.block_pixels) < wanted) q.block_pixels /= 4;
    q.blocks = int32_t(t.tiles * divide_up(p.shape.HW, q.block_pixels));
  }
  return q;
}

// Whether a sample's gate (and its tables) fit in a block of the second pass.
bool gate_fits(const Problem& p) {
  Recalibrate q = {};
  q.shape = p.shape;
  q.gate.R = int32_t(p.tail.se.R);
  int64_t bytes = recalibrate_shared_bytes(q, p.layout, p.backward());
  return bytes <= std::min(kLargestGate, p.limits.shared_per_block);
}

// Cuts the workspace; with no memory, it counts the bytes.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}

  float* floats(int64_t count) {
    char* start = memory_ ? memory_ + bytes_ : nullptr;
    bytes_ += divide_up(count * int64_t(sizeof(float)), 256) * 256;
    return reinterpret_cast<float*>(start);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

struct Scratch {
  float *sums, *exponential, *spread, *hidden, *grad_pre1, *grad_pre2;
};

Scratch scratch_of(const Problem& p, bool one_pass, Workspace& workspace) {
  Scratch s = {};
  int64_t SC = p.shape.B * p.SC(), SR = p.shape.B * p.SR();
  bool alone = !one_pass && (!gate_fits(p) || (p.backward() && !p.branch_grads()));
  if (!one_pass) s.sums = workspace.floats(SC * sums_of(p, nullptr).splits);
  if (alone && !p.backward()) s.exponential = workspace.floats(SC);
  if (alone && p.backward()) s.spread = workspace.floats(SC);
  if (alone || p.fc_grads()) s.hidden = workspace.floats(SR);
  if (p.backward() && (alone || p.fc_grads())) s.grad_pre1 = workspace.floats(SR);
  if (p.backward() && (alone || p.fc_grads())) s.grad_pre2 = workspace.floats(SC);
  return s;
}

Gate gate_parameters(const Problem& p, const Scratch& scratch) {
  Gate gate = {};
  gate.se = p.tail.se;
  gate.R = int32_t(p.tail.se.R);
  gate.sums = scratch.sums;
  gate.squeeze = static_cast<float*>(p.tail.squeeze);
  gate.attention = static_cast<float*>(p.tail.attention);
  gate.exponential = scratch.exponential;
  gate.spread = scratch.spread;
  gate.hidden = scratch.hidden;
  gate.grad_pre1 = scratch.grad_pre1;
  gate.grad_pre2 = scratch.grad_pre2;
  return gate;
}

// One pass needs whole samples, dense and aligned, for the bulk copies.
std::string one_pass_obstacle(const Problem& p) {
  if (p.limits.arch < 90) return "needs compute capability 9.0 or more";
  bool dense = p.layout == Layout::runs;
  if (p.layout == Layout::columns) {
    dense = p.shape.C * p.shape.HW <= kLargestRun &&
            all_of(p, [&](Access t) { return p.shape.HW == 1 || t.tensor.pixel == t.channels; });
  }
  if (!dense) return "needs dense branches in one memory format";
  bool aligned = p.shape.C * p.shape.HW * p.size % 16 == 0 &&
                 all_of(p, [&](Access t) { return is_aligned(t.tensor, p.size); });
  if (!aligned) return "needs samples that begin at multiples of 16 bytes";
  if (p.backward() && !p.branch_grads()) return "is for gradients of the branches";
  return "";
}

OnePass one_pass_of(const Problem& p, int cluster) {
  OnePass q = {};
  q.shape = p.shape;
  copy_tensors(p.parts, q.parts);
  copy_tensors(p.grads, q.grads);
  q.cat = p.cat;
  q.gate.R = int32_t(p.tail.se.R);
  q.cluster = cluster;
  if (p.layout == Layout::runs) {
    int64_t vec = 16 / p.size;
    q.piece = int32_t(divide_up(divide_up(p.shape.run, cluster), vec) * vec);
  } else {
    Tile t = tile_of(p, p.layout);
    q.piece = int32_t(divide_up(p.shape.HW, cluster) * p.shape.C);
    q.tile = t.tile;
    q.tile_pixels = t.pixels;
  }
  return q;
}

// The cluster for one pass, 0 if none can hold a sample: the smallest with three of its blocks to a
// processor (while one block computes its gate, others stream), else with two, else with one.
// Small batches get larger clusters, as long as processors are idle.
int cluster_of(const Problem& p) {
  auto resident = [&](int cluster) -> int64_t {
    int64_t bytes =
        one_pass_shared_bytes(one_pass_of(p, cluster), p.tail.dtype, p.layout, p.backward());
    if (bytes > p.limits.shared_per_block) return 0;
    return p.limits.shared_per_processor / (bytes + kReservedShared);
  };
  for (int blocks : {3, 2, 1}) {
    for (int cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
      if (resident(cluster) < blocks) continue;
      while (cluster < kMaxCluster && 2 * p.shape.B * cluster <= p.limits.processors) cluster *= 2;
      return cluster;
    }
  }
  return 0;
}

// Which path runs: the cluster for one pass, or 0 for two passes. One pass reads each element once,
// so `automatic` takes it wherever it can.
int choose(const Problem& p, Path path) {
  if (path == Path::two_pass || p.shape.B == 0) return 0;
  std::string obstacle = one_pass_obstacle(p);
  int cluster = obstacle.empty() ? cluster_of(p) : 0;
  if (obstacle.empty() && !cluster) obstacle = "needs a sample that fits in shared memory";
  require(cluster || path == Path::automatic, "the one-pass kernel " + obstacle);
  return cluster;
}

// Of a forward; null in a backward.
template <class Params>
void set_epilogue(Params& q, const Epilogue* epilogue) {
  q.floor = epilogue && epilogue->relu ? 0 : -std::numeric_limits<float>::infinity();
  if (!epilogue) return;
  q.scale = epilogue->scale;
  q.shift = epilogue->shift;
}

void run_two_pass(const Problem& p, const Scratch& scratch, const Epilogue* epilogue,
                  void* stream) {
  Sums sums = sums_of(p, scratch.sums);
  launch_sums(sums, p.tail.dtype, p.layout, stream);
  Gate gate = gate_parameters(p, scratch);
  gate.splits = sums.splits;
  bool alone = scratch.exponential || scratch.spread;
  if (alone) launch_gate({p.shape, gate}, p.backward(), stream);
  if (p.backward() && !p.branch_grads()) return;
  // Without a gate in shared memory there is no room for a run's tables either.
  Layout layout = alone && p.layout == Layout::runs ? Layout::strided : p.layout;
  Recalibrate q = recalibrate_of(p, layout);
  q.gate = gate;
  q.gate.done = alone;
  set_epilogue(q, epilogue);
  launch_recalibrate(q, p.tail.dtype, layout, p.backward(), stream);
}

void run_one_pass(const Problem& p, const Scratch& scratch, const Epilogue* epilogue, int cluster,
                  void* stream) {
  OnePass q = one_pass_of(p, cluster);
  q.gate = gate_parameters(p, scratch);
  set_epilogue(q, epilogue);
  launch_one_pass(q, p.tail.dtype, p.layout, p.backward(), stream);
}

void run(const Problem& p, const Epilogue* epilogue, Path path, void* memory, void* stream) {
  int cluster = choose(p, path);
  Workspace workspace(memory);
  Scratch scratch = scratch_of(p, cluster > 0, workspace);
  if (p.shape.B > 0 && (!p.backward() || p.branch_grads() || p.fc_grads())) {
    if (cluster) {
      run_one_pass(p, scratch, epilogue, cluster, stream);
    } else {
      run_two_pass(p, scratch, epilogue, stream);
    }
  }
  if (!p.fc_grads()) return;
  const Gradients& to = *p.gradients;
  FcGrad q = {p.shape.B * p.shape.S,
              p.shape.C,
              int32_t(p.tail.se.R),
              static_cast<float*>(p.tail.squeeze),
              scratch.hidden,
              scratch.grad_pre1,
              scratch.grad_pre2,
              to.fc1_weight,
              to.fc1_bias,
              to.fc2_weight,
              to.fc2_bias};
  launch_fc_grad(q, stream);
}

int64_t workspace_bytes(const Problem& p, Path path) {
  Workspace workspace(nullptr);
  scratch_of(p, choose(p, path) > 0, workspace);
  return workspace.bytes();
}

}  // namespace

int64_t forward_workspace(const Tail& tail, Path path, int device) {
  return workspace_bytes(problem_of(tail, nullptr, device), path);
}

void forward(const Tail& tail, const Epilogue& epilogue, Path path, int device, void* workspace,
             void* stream) {
  run(problem_of(tail, nullptr, device), &epilogue, path, workspace, stream);
}

int64_t backward_workspace(const Tail& tail, const Gradients& gradients, Path path, int device) {
  return workspace_bytes(problem_of(tail, &gradients, device), path);
}

void backward(const Tail& tail, const Gradients& gradients, Path path, int device, void* workspace,
              void* stream) {
  run(problem_of(tail, &gradients, device), nullptr, path, workspace, stream);
}

}  // namespace psa::cuda
