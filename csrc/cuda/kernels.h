// The kernels' arguments and launches, as cuda.cpp uses them. This header includes no CUDA header.
//
// "concat" is the tensor (B, S * C, HW) that holds the S branches in reverse order. A "run" is a
// range of contiguous elements. The comment above each struct gives the kernel's grid and the work
// of one block.
#pragma once

#include "../psa.h"

namespace psa::cuda {

constexpr int kMaxBranches = 32;
constexpr int kMaxCluster = 8;  // blocks
constexpr int kWarp = 32;
constexpr int kThreads = 256;      // of a block, in all kernels that read branches
constexpr int kLoadsInFlight = 4;  // 16-byte loads that a thread issues before it uses the first

// The memory format that all branches, their gradients and concat have in common.
enum class MemoryFormat {
  contiguous,     // NCHW: each sample of a branch is a run of C * HW elements
  channels_last,  // contiguous channels; each 16-byte vector of them is aligned
  strided,        // anything else
};

struct DeviceLimits {
  int arch;  // 80, 90, ...
  int multiprocessors;
  int64_t shared_per_block, shared_per_multiprocessor;  // bytes
};
DeviceLimits device_limits(int device);

// Divides numbers below 2^31 by a fixed divisor, with a multiplication and a shift; see divide().
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
  int32_t run;               // C * HW; only for MemoryFormat::contiguous
  Divisor channels, pixels;  // divide by C and by HW; pixels only for MemoryFormat::contiguous
};

// The SE module and the softmax: squeeze to attention, or the gradient of attention to that of
// squeeze; see gate.cuh. All arrays are contiguous, (B, S, C) or (B, S, R).
struct SEArgs {
  SEWeights weights;
  int32_t R;
  const float* sums;  // (B, splits, S, C), of the branches or of the branches * concat
  int32_t splits;
  bool precomputed;  // se_alone ran before: read its results below
  float *squeeze, *attention;
  float* exp_gate;   // scratch of se_alone
  float* grad_mean;  // gradient of squeeze over HW: what each pixel gets through the mean
  // Scratch of se_alone; in the backward fc_grad reads them too. Null if neither kernel runs.
  float *hidden, *grad_pre1, *grad_pre2;
};

// Partial sums over pixels. Grid: B * splits * blocks; a block sums `rows` of the S * C rows of
// pixels, or a tile of channels.
struct SumArgs {
  Shape shape;
  Strided branches[kMaxBranches];
  Strided concat;  // no data: sums of the branches alone
  float* sums;
  int32_t splits, blocks;
  int64_t split_pixels;
  // MemoryFormat::contiguous: `lanes` of a warp share a row. A long row takes several steps; of
  // short rows each group of lanes sums at most kLoadsInFlight.
  int32_t rows, lanes;
  bool long_rows;
  // Otherwise: a block takes `tile` vectors (or elements) of concat's S * C channels and
  // `tile_pixels` pixels at once.
  int32_t tile, tile_pixels;
  bool pixels_inner;  // neighbouring threads take neighbouring pixels, not channels
};
void launch_sums(const SumArgs& args, Dtype dtype, MemoryFormat memory_format, void* stream);

// Forward: concat = max(branch * attention * scale + shift, floor).
// Backward: gradient of a branch = concat * attention + grad_mean.
// Grid: B * blocks, the last sample first; a block writes some vectors of a branch's run, or some
// pixels of a tile of channels.
struct RecalibrateArgs {
  Shape shape;
  Strided branches[kMaxBranches];  // backward: their gradients, without data if not requested
  Strided concat;
  SEArgs se;
  Matrix scale, shift;
  float floor;  // 0 with relu, else -infinity
  int32_t blocks;
  // MemoryFormat::contiguous: the vectors of a run that a block writes, at most kLoadsInFlight for
  // each thread, in each of `block_branches` branches.
  int32_t block_vectors, block_branches;
  // Otherwise: as in SumArgs, and the pixels that a block writes.
  int64_t block_pixels;
  int32_t tile, tile_pixels;
  bool pixels_inner;
};
int64_t recalibrate_shared_bytes(const RecalibrateArgs& args, MemoryFormat memory_format,
                                 bool backward);
void launch_recalibrate(const RecalibrateArgs& args, Dtype dtype, MemoryFormat memory_format,
                        bool backward, void* stream);

// se_alone: the SE module in a kernel of its own, if its arrays don't fit in a block's shared
// memory. Grid: B.
struct SEKernelArgs {
  Shape shape;
  SEArgs se;
};
void launch_se(const SEKernelArgs& args, bool backward, void* stream);

// The whole tail of a sample by one cluster, which holds the sample in shared memory. Grid:
// B * cluster.
struct OnePassArgs {
  Shape shape;
  Strided branches[kMaxBranches];
  Strided grads[kMaxBranches];  // backward: without data if not requested
  Strided concat;
  SEArgs se;
  Matrix scale, shift;
  float floor;                // as in RecalibrateArgs
  int32_t cluster;            // blocks
  int32_t chunk_size;         // elements of each branch's C * HW that one block holds
  int32_t tile, tile_pixels;  // MemoryFormat::channels_last: as in SumArgs
};
int64_t one_pass_shared_bytes(const OnePassArgs& args, Dtype dtype, MemoryFormat memory_format,
                              bool backward);
void launch_one_pass(const OnePassArgs& args, Dtype dtype, MemoryFormat memory_format,
                     bool backward, void* stream);

// The gradients of the fc tensors: sums over rows = B * S; with weights of each branch, over every
// S-th row. Grid: modules * R * tiles of channels.
struct FcGradArgs {
  int64_t rows;
  int32_t C, R, modules;  // modules: S, or 1 if the branches share one
  const float *squeeze, *hidden, *grad_pre1, *grad_pre2;
  Matrix fc1_weight, fc1_bias, fc2_weight, fc2_bias;
};
void launch_fc_grad(const FcGradArgs& args, void* stream);

}  // namespace psa::cuda
