// Chooses the kernels and their grids, divides the workspace and launches them. All decisions that
// depend on measurements are in the make_ and choose_ functions of this file.
#include "cuda.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "problem.h"

namespace psa::cuda {
namespace {

constexpr int64_t kMaxSEBytes = 96 * 1024;  // shared memory of a block of the second pass
constexpr int64_t kReservedShared = 1024;   // bytes of shared memory that CUDA reserves per block

// How a block's threads cover a tile of channels (in vectors or elements) and some pixels.
struct Tile {
  int32_t tile, pixels;
  bool pixels_inner;
  int64_t tiles;
};

Tile make_tile(const Problem& p, MemoryFormat memory_format) {
  Tile t = {};
  int64_t units = p.SC();
  if (memory_format == MemoryFormat::channels_last) {
    units /= 16 / p.element_size;
    t.tiles = divide_up(units, 64);
    t.tile = int32_t(divide_up(units, t.tiles));
    t.pixels = kThreads / t.tile;
    return t;
  }
  const Strided& branch = p.branches[0];
  t.pixels_inner = p.shape.HW > 1 && branch.pixel < branch.channel;
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

// The first pass splits the pixels so that there are four blocks for each multiprocessor, if rows
// are long enough.
SumArgs make_sum_args(const Problem& p, float* sums) {
  SumArgs args = {};
  args.shape = p.shape;
  copy_tensors(p.branches, args.branches);
  if (p.backward()) args.concat = p.concat;
  args.sums = sums;
  int64_t HW = p.shape.HW, vec = 16 / p.element_size, smallest_split;
  if (p.memory_format == MemoryFormat::contiguous) {
    bool aligned = HW % vec == 0;
    for (int s = 0; s < p.shape.S; ++s)
      aligned = aligned && is_aligned(p.branches[s], p.element_size);
    int64_t windows = divide_up(HW + (aligned ? 0 : vec - 1), vec);
    args.long_rows = windows > kWarp;
    args.lanes = 1;
    while (args.lanes < windows && args.lanes < kWarp) args.lanes *= 2;
    args.rows = kThreads / args.lanes * (args.long_rows ? 1 : kLoadsInFlight);
    args.blocks = int32_t(divide_up(p.SC(), args.rows));
    smallest_split = args.long_rows ? kWarp * kLoadsInFlight * vec : HW;
  } else {
    Tile t = make_tile(p, p.memory_format);
    args.tile = t.tile;
    args.tile_pixels = t.pixels;
    args.pixels_inner = t.pixels_inner;
    args.blocks = int32_t(t.tiles);
    smallest_split = t.pixels * kLoadsInFlight;
  }
  int64_t wanted =
      divide_up(4 * p.limits.multiprocessors, std::max<int64_t>(1, p.shape.B * args.blocks));
  int64_t splits = std::min(wanted, divide_up(HW, smallest_split));
  args.split_pixels = divide_up(divide_up(HW, splits), vec) * vec;
  args.splits = int32_t(divide_up(HW, args.split_pixels));
  return args;
}

// The second pass: a block writes at least 64 KB, to make up for computing the SE module; less if
// multiprocessors would be idle otherwise.
RecalibrateArgs make_recalibrate_args(const Problem& p, MemoryFormat memory_format) {
  RecalibrateArgs args = {};
  args.shape = p.shape;
  copy_tensors(p.backward() ? p.grads : p.branches, args.branches);
  args.concat = p.concat;
  int64_t wanted = 2 * p.limits.multiprocessors, S = p.shape.S;
  if (memory_format == MemoryFormat::contiguous) {
    int64_t vectors = p.shape.run * p.element_size / 16 + 2;  // + 2: one may be cut at each end
    int64_t block_vectors = kThreads * kLoadsInFlight;
    args.block_branches = p.shape.S;
    if (p.shape.B * divide_up(vectors, block_vectors) < wanted) {
      args.block_branches = 1;
      if (p.shape.B * S * divide_up(vectors, block_vectors) < wanted) block_vectors = kThreads;
    }
    int64_t branch_blocks = divide_up(vectors, block_vectors);
    args.block_vectors = int32_t(divide_up(vectors, branch_blocks));
    args.blocks = int32_t(branch_blocks * divide_up(S, args.block_branches));
  } else {
    Tile t = make_tile(p, memory_format);
    args.tile = t.tile;
    args.tile_pixels = t.pixels;
    args.pixels_inner = t.pixels_inner;
    args.block_pixels = 4 * kLoadsInFlight * t.pixels;
    if (p.shape.B * t.tiles * divide_up(p.shape.HW, args.block_pixels) < wanted)
      args.block_pixels /= 4;
    args.blocks = int32_t(t.tiles * divide_up(p.shape.HW, args.block_pixels));
  }
  return args;
}

// True if the SE module's arrays and the tables fit in the shared memory of a second-pass block.
bool se_fits(const Problem& p) {
  RecalibrateArgs args = {};
  args.shape = p.shape;
  args.se.R = int32_t(p.tail.se.R);
  int64_t bytes = recalibrate_shared_bytes(args, p.memory_format, p.backward());
  return bytes <= std::min(kMaxSEBytes, p.limits.shared_per_block);
}

// Hands out parts of the workspace; without memory, it only counts the bytes.
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

// Arrays in the workspace; null if the kernels don't need them.
struct Scratch {
  float *sums, *exp_gate, *grad_mean, *hidden, *grad_pre1, *grad_pre2;
};

Scratch make_scratch(const Problem& p, bool one_pass, Workspace& workspace) {
  Scratch s = {};
  int64_t SC = p.shape.B * p.SC(), SR = p.shape.B * p.SR();
  bool separate_se = !one_pass && (!se_fits(p) || (p.backward() && !p.branch_grads()));
  if (!one_pass) s.sums = workspace.floats(SC * make_sum_args(p, nullptr).splits);
  if (separate_se && !p.backward()) s.exp_gate = workspace.floats(SC);
  if (separate_se && p.backward()) s.grad_mean = workspace.floats(SC);
  if (separate_se || p.fc_grads()) s.hidden = workspace.floats(SR);
  if (p.backward() && (separate_se || p.fc_grads())) s.grad_pre1 = workspace.floats(SR);
  if (p.backward() && (separate_se || p.fc_grads())) s.grad_pre2 = workspace.floats(SC);
  return s;
}

SEArgs make_se_args(const Problem& p, const Scratch& scratch) {
  SEArgs se = {};
  se.weights = p.tail.se;
  se.R = int32_t(p.tail.se.R);
  se.sums = scratch.sums;
  se.squeeze = static_cast<float*>(p.tail.squeeze);
  se.attention = static_cast<float*>(p.tail.attention);
  se.exp_gate = scratch.exp_gate;
  se.grad_mean = scratch.grad_mean;
  se.hidden = scratch.hidden;
  se.grad_pre1 = scratch.grad_pre1;
  se.grad_pre2 = scratch.grad_pre2;
  return se;
}

// Returns the reason why one pass can't run, or "". Its bulk copies need dense, aligned samples.
std::string one_pass_unsupported_reason(const Problem& p) {
  if (p.limits.arch < 90) return "needs compute capability 9.0 or more";
  bool dense = p.memory_format == MemoryFormat::contiguous;
  if (p.memory_format == MemoryFormat::channels_last) {
    dense = p.shape.C * p.shape.HW <= kMaxRun &&
            all_of(p, [&](Access t) { return p.shape.HW == 1 || t.tensor.pixel == t.channels; });
  }
  if (!dense) return "needs dense branches in one memory format";
  bool aligned = p.shape.C * p.shape.HW * p.element_size % 16 == 0 &&
                 all_of(p, [&](Access t) { return is_aligned(t.tensor, p.element_size); });
  if (!aligned) return "needs samples that begin at multiples of 16 bytes";
  if (p.backward() && !p.branch_grads()) return "is for gradients of the branches";
  return "";
}

OnePassArgs make_one_pass_args(const Problem& p, int cluster) {
  OnePassArgs args = {};
  args.shape = p.shape;
  copy_tensors(p.branches, args.branches);
  copy_tensors(p.grads, args.grads);
  args.concat = p.concat;
  args.se.R = int32_t(p.tail.se.R);
  args.cluster = cluster;
  if (p.memory_format == MemoryFormat::contiguous) {
    int64_t vec = 16 / p.element_size;
    args.chunk_size = int32_t(divide_up(divide_up(p.shape.run, cluster), vec) * vec);
  } else {
    Tile t = make_tile(p, p.memory_format);
    args.chunk_size = int32_t(divide_up(p.shape.HW, cluster) * p.shape.C);
    args.tile = t.tile;
    args.tile_pixels = t.pixels;
  }
  return args;
}

// The cluster size for one pass, or 0 if no cluster can hold a sample. It is the smallest of which
// three blocks fit a multiprocessor (while one block computes the SE module, others load), else
// two, else one. Small batches get larger clusters, as long as multiprocessors are idle.
int choose_cluster(const Problem& p) {
  auto blocks_per_multiprocessor = [&](int cluster) -> int64_t {
    int64_t bytes = one_pass_shared_bytes(make_one_pass_args(p, cluster), p.tail.dtype,
                                          p.memory_format, p.backward());
    if (bytes > p.limits.shared_per_block) return 0;
    return p.limits.shared_per_multiprocessor / (bytes + kReservedShared);
  };
  for (int blocks : {3, 2, 1}) {
    for (int cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
      if (blocks_per_multiprocessor(cluster) < blocks) continue;
      while (cluster < kMaxCluster && 2 * p.shape.B * cluster <= p.limits.multiprocessors)
        cluster *= 2;
      return cluster;
    }
  }
  return 0;
}

// Returns the cluster size for one pass, or 0 for two passes. One pass reads each element once, so
// `automatic` takes it whenever it can run.
int choose_path(const Problem& p, Path path) {
  if (path == Path::two_pass || p.shape.B == 0) return 0;
  std::string reason = one_pass_unsupported_reason(p);
  int cluster = reason.empty() ? choose_cluster(p) : 0;
  if (reason.empty() && !cluster) reason = "needs a sample that fits in shared memory";
  require(cluster || path == Path::automatic, "the one-pass kernel " + reason);
  return cluster;
}

// `epilogue` is null in a backward.
template <class Params>
void set_epilogue(Params& args, const Epilogue* epilogue) {
  args.floor = epilogue && epilogue->relu ? 0 : -std::numeric_limits<float>::infinity();
  if (!epilogue) return;
  args.scale = epilogue->scale;
  args.shift = epilogue->shift;
}

void run_two_pass(const Problem& p, const Scratch& scratch, const Epilogue* epilogue,
                  void* stream) {
  SumArgs sums = make_sum_args(p, scratch.sums);
  launch_sums(sums, p.tail.dtype, p.memory_format, stream);
  SEArgs se = make_se_args(p, scratch);
  se.splits = sums.splits;
  bool separate_se = scratch.exp_gate || scratch.grad_mean;
  if (separate_se) launch_se({p.shape, se}, p.backward(), stream);
  if (p.backward() && !p.branch_grads()) return;
  // If shared memory is too small for the SE module, it is too small for the tables of runs.
  bool no_tables = separate_se && p.memory_format == MemoryFormat::contiguous;
  MemoryFormat memory_format = no_tables ? MemoryFormat::strided : p.memory_format;
  RecalibrateArgs args = make_recalibrate_args(p, memory_format);
  args.se = se;
  args.se.precomputed = separate_se;
  set_epilogue(args, epilogue);
  launch_recalibrate(args, p.tail.dtype, memory_format, p.backward(), stream);
}

void run_one_pass(const Problem& p, const Scratch& scratch, const Epilogue* epilogue, int cluster,
                  void* stream) {
  OnePassArgs args = make_one_pass_args(p, cluster);
  args.se = make_se_args(p, scratch);
  set_epilogue(args, epilogue);
  launch_one_pass(args, p.tail.dtype, p.memory_format, p.backward(), stream);
}

void launch_tail(const Problem& p, const Epilogue* epilogue, Path path, void* memory,
                 void* stream) {
  int cluster = choose_path(p, path);
  Workspace workspace(memory);
  Scratch scratch = make_scratch(p, cluster > 0, workspace);
  if (p.shape.B > 0 && (!p.backward() || p.branch_grads() || p.fc_grads())) {
    if (cluster) {
      run_one_pass(p, scratch, epilogue, cluster, stream);
    } else {
      run_two_pass(p, scratch, epilogue, stream);
    }
  }
  if (!p.fc_grads()) return;
  const Gradients& grads = *p.gradients;
  FcGradArgs args = {p.shape.B * p.shape.S,
                     p.shape.C,
                     int32_t(p.tail.se.R),
                     p.tail.se.per_branch ? p.shape.S : 1,
                     static_cast<float*>(p.tail.squeeze),
                     scratch.hidden,
                     scratch.grad_pre1,
                     scratch.grad_pre2,
                     grads.fc1_weight,
                     grads.fc1_bias,
                     grads.fc2_weight,
                     grads.fc2_bias};
  launch_fc_grad(args, stream);
}

int64_t workspace_bytes(const Problem& p, Path path) {
  Workspace workspace(nullptr);
  make_scratch(p, choose_path(p, path) > 0, workspace);
  return workspace.bytes();
}

}  // namespace

int64_t forward_workspace(const Tail& tail, Path path, int device) {
  return workspace_bytes(make_problem(tail, nullptr, device), path);
}

void forward(const Tail& tail, const Epilogue& epilogue, Path path, int device, void* workspace,
             void* stream) {
  launch_tail(make_problem(tail, nullptr, device), &epilogue, path, workspace, stream);
}

int64_t backward_workspace(const Tail& tail, const Gradients& gradients, Path path, int device) {
  return workspace_bytes(make_problem(tail, &gradients, device), path);
}

void backward(const Tail& tail, const Gradients& gradients, Path path, int device, void* workspace,
              void* stream) {
  launch_tail(make_problem(tail, &gradients, device), nullptr, path, workspace, stream);
}

}  // namespace psa::cuda
