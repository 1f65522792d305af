// The kernels' parameters and launches, as cuda.cpp sees them. No CUDA header in here.
//
// Words: the *parts* are the S branches or their gradients, the *cat* is the tensor (B, S * C, HW)
// that holds them in reverse. A block's *share* of the work is named beside each struct.
#pragma once

#include "../psa.h"

namespace psa::cuda {

constexpr int kMaxBranches = 32;
constexpr int kMaxCluster = 8;
constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of a block, in all kernels that stream
constexpr int kFlight = 4;     // loads that a thread has in flight

// How all parts and the cat lie in memory.
enum class Layout {
  runs,     // NCHW: C * HW contiguous elements in each sample of a part
  columns,  // channels_last: contiguous channels, each vector of them aligned
  strided,  // anything else
};

struct Limits {
  int arch;  // 80, 90, ...
  int processors;
  int64_t shared_per_block, shared_per_processor;  // bytes
};
Limits limits_of(int device);

// Divides numbers below 2^31 by one that is the same for all.
struct Divisor {
  uint32_t value, magic, shift;

  Divisor() = default;
  explicit Divisor(int64_t divisor) : value(uint32_t(divisor)), shift(0) {
    while ((int64_t(1) << shift) < divisor) ++shift;
    magic = uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - value)) / value + 1);
  }
};

struct Shape {
  int64_t B, HW;
  int32_t S, C;
  int32_t run;               // C * HW where the layout is runs
  Divisor channels, pixels;  // by C; by HW where the layout is runs
};

// Squeeze to attention, or their gradients back; see gate.cuh. (B, S, C) or (B, S, R), contiguous.
struct Gate {
  Excitation se;
  int32_t R;
  const float* sums;  // (B, splits, S, C), of the parts or of the parts * cat
  int32_t splits;
  bool done;  // a gate kernel ran before: what follows is to be read
  float *squeeze, *attention;
  float* exponential;  // scratch of the gate kernel
  float* spread;
  // Scratch of the gate kernel, and in the backward what fc's gradients are made of, else null.
  float *hidden, *grad_pre1, *grad_pre2;
};

// Partial sums over pixels. Grid: B * splits * blocks, a block for `rows` of the S * C rows of
// pixels, or for a tile of columns.
struct Sums {
  Shape shape;
  Strided parts[kMaxBranches];
  Strided cat;  // no data: sums of the parts alone
  float* sums;
  int32_t splits, blocks;
  int64_t split_pixels;
  // Layout::runs: lanes of a warp that share a row, and whether they take more than one step; if
  // not, there are at most kFlight rows for each group of lanes.
  int32_t rows, lanes;
  bool long_rows;
  // Else: vectors (or elements) of the cat's S * C in a block, and pixels it takes at once.
  int32_t tile, tile_pixels;
  bool pixels_inner;  // neighbouring threads take neighbouring pixels, not channels
};
void launch_sums(const Sums& p, Dtype dtype, Layout layout, void* stream);

// Forward: cat = max(part * attention * scale + shift, floor).
// Backward: part = cat * attention + spread.
// Grid: B * blocks, samples in reverse; a block has a share of each part's run, or of the pixels.
struct Recalibrate {
  Shape shape;
  Strided parts[kMaxBranches];  // in the backward without data where not asked for
  Strided cat;
  Gate gate;
  Matrix scale, shift;
  float floor;  // 0 with relu, else -infinity
  int32_t blocks;
  // Layout::runs: vectors of a run, at most kFlight for each thread, and branches that a block has.
  int32_t share, branches;
  // Else as in Sums, with the pixels that a block has.
  int64_t block_pixels;
  int32_t tile, tile_pixels;
  bool pixels_inner;
};
int64_t recalibrate_shared_bytes(const Recalibrate& p, Layout layout, bool backward);
void launch_recalibrate(const Recalibrate& p, Dtype dtype, Layout layout, bool backward,
                        void* stream);

// The gate alone, for what is too large for a block's shared memory. Grid: B.
struct GateAlone {
  Shape shape;
  Gate gate;
};
void launch_gate(const GateAlone& p, bool backward, void* stream);

// Everything of a sample by one cluster that holds it in shared memory. Grid: B * cluster.
struct OnePass {
  Shape shape;
  Strided parts[kMaxBranches];
  Strided grads[kMaxBranches];  // backward; without data where not asked for
  Strided cat;
  Gate gate;
  Matrix scale, shift;
  float floor;
  int32_t cluster;
  int32_t piece;  // elements of each part's run of C * HW that a block of the cluster holds
  int32_t tile, tile_pixels;  // Layout::columns, as in Sums
};
int64_t one_pass_shared_bytes(const OnePass& p, Dtype dtype, Layout layout, bool backward);
void launch_one_pass(const OnePass& p, Dtype dtype, Layout layout, bool backward, void* stream);

// fc's gradients: sums over rows = B * S. Grid: tiles of channels * R.
struct FcGrad {
  int64_t rows;
  int32_t C, R;
  const float *squeeze, *hidden, *grad_pre1, *grad_pre2;
  Matrix fc1_weight, fc1_bias, fc2_weight, fc2_bias;
};
void launch_fc_grad(const FcGrad& p, void* stream);

}  // namespace psa::cuda
