// The second of the two passes. Every block computes its sample's SE module from the sums of the
// first pass. Forward: it scales the branches into concat, in reverse order. Backward: it scales
// the gradient of concat into those of the branches, and adds grad_mean.
#include "affine.cuh"
#include "columns.cuh"

namespace psa::cuda {
namespace {

// Computes the SE module of sample b, or reads the results of se_alone. One block of each sample
// shall `publish` them.
template <bool kBackward>
PSA_DEVICE SEResult se_result(const RecalibrateArgs& args, int64_t b, bool publish) {
  const SEArgs& se = args.se;
  int SC = args.shape.S * args.shape.C;
  if (se.precomputed) return {se.attention + b * SC, kBackward ? se.grad_mean + b * SC : nullptr};
  return se_of_sample<kBackward>(args, b, reinterpret_cast<float*>(shared_memory()), publish,
                                 [&](int i) { return sum_of_splits(se, SC, b, i); });
}

template <class T, bool kBackward>
PSA_KERNEL(kThreads, 3)
recalibrate_runs(PSA_PARAM(RecalibrateArgs) args) {
  const Shape& shape = args.shape;
  int64_t block = block_count() - 1 - block_index(), b = block / args.blocks;
  int sample_block = int(block % args.blocks),
      groups = (shape.S + args.block_branches - 1) / args.block_branches;
  int s_begin = sample_block % groups * args.block_branches,
      begin = sample_block / groups * args.block_vectors;
  int s_end = s_begin + args.block_branches < shape.S ? s_begin + args.block_branches : shape.S;

  SEResult se = se_result<kBackward>(args, b, sample_block == 0);
  float* shared = reinterpret_cast<float*>(shared_memory());
  AffineTables tables =
      make_affine_tables<kBackward>(args, se, shared + se_floats(shape, args.se.R, kBackward));

  for (int s = s_begin; s < s_end; ++s) {
    const Strided& branch = args.branches[s];
    if (!branch.data) continue;  // this gradient isn't requested
    Run<T> in_branch = {static_cast<T*>(branch.data) + b * branch.batch, shape.run};
    Run<T> in_concat = {static_cast<T*>(args.concat.data) + b * args.concat.batch, shape.run};
    in_concat.data += int64_t(shape.S - 1 - s) * shape.run;
    Run<T> to = kBackward ? in_branch : in_concat;
    Run<const T> from = {kBackward ? in_concat.data : in_branch.data, shape.run};

    // The windows are aligned for the stores; a thread issues all of its loads before it uses one.
    constexpr int kStep = kThreads * kVec<T>;
    int skew = misaligned(to.data), end = (begin + args.block_vectors) * kVec<T> - skew;
    if (end > shape.run) end = shape.run;
    int i = (begin + thread_index()) * kVec<T> - skew;
    Vec x[kLoadsInFlight];
#pragma unroll
    for (int u = 0; u < kLoadsInFlight; ++u) {
      int high = i + u * kStep < end ? shape.run : 0;
      x[u] = load_wide<CacheHint::evict_first>(window_of(from, i + u * kStep, 0, high));
    }
#pragma unroll
    for (int u = 0; u < kLoadsInFlight; ++u, i += kStep) {
      if (i >= end) break;
      load_narrow(window_of(from, i, 0, shape.run), x[u]);
      Vec y = recalibrated_window<T>(x[u], i, s, shape, tables, args.floor);
      store_window(window_of(to, i, 0, shape.run), y);
    }
  }
}

template <class T, bool kWide, bool kBackward>
PSA_KERNEL(kThreads, 3)
recalibrate_columns(PSA_PARAM(RecalibrateArgs) args) {
  constexpr int kSize = kChannels<T, kWide>;
  const Shape& shape = args.shape;
  int64_t block = block_count() - 1 - block_index(), b = block / args.blocks;
  int64_t sample_block = block % args.blocks;
  int units = shape.S * shape.C / kSize, tiles = (units + args.tile - 1) / args.tile;
  int64_t begin = sample_block / tiles * args.block_pixels;
  int64_t end = begin + args.block_pixels < shape.HW ? begin + args.block_pixels : shape.HW;

  SEResult se = se_result<kBackward>(args, b, sample_block == 0);
  Column<kSize> column(shape, int(sample_block % tiles) * args.tile, args.tile, args.tile_pixels,
                       args.pixels_inner);
  if (!column.active) return;
  const Strided& branch = args.branches[column.s];
  if (!branch.data) return;  // this gradient isn't requested
  Affine y[kSize];
#pragma unroll
  for (int j = 0; j < kSize; ++j) y[j] = affine_of<kBackward>(args, se, column.s, column.c + j);

  T* in_branch = static_cast<T*>(branch.data) + b * branch.batch + column.c * branch.channel;
  T* in_concat =
      static_cast<T*>(args.concat.data) + b * args.concat.batch + column.k * args.concat.channel;
  const T* from = kBackward ? in_concat : in_branch;
  T* to = kBackward ? in_branch : in_concat;
  int64_t from_pixel = kBackward ? args.concat.pixel : branch.pixel;
  int64_t to_pixel = kBackward ? branch.pixel : args.concat.pixel;
  for (int64_t first = begin + column.pixel; first < end;
       first += kLoadsInFlight * args.tile_pixels) {
    Raw<T, kWide> in[kLoadsInFlight];
#pragma unroll
    for (int u = 0; u < kLoadsInFlight; ++u) {
      int64_t pixel = first + u * args.tile_pixels;
      if (pixel >= end) break;
      in[u] = load_raw<kWide, CacheHint::evict_first>(from + pixel * from_pixel);
    }
#pragma unroll
    for (int u = 0; u < kLoadsInFlight; ++u) {
      int64_t pixel = first + u * args.tile_pixels;
      if (pixel >= end) break;
      float x[kSize];
      unpack_raw<T>(in[u], x);
#pragma unroll
      for (int j = 0; j < kSize; ++j)
        x[j] = recalibrated(x[j], y[j].weight, y[j].shift, args.floor);
      store_raw(to + pixel * to_pixel, x);
    }
  }
}

template <class T, bool kBackward>
void launch_recalibrate_of(const RecalibrateArgs& args, MemoryFormat memory_format, void* stream) {
  int64_t grid = args.shape.B * args.blocks;
  int64_t shared = recalibrate_shared_bytes(args, memory_format, kBackward);
  bool runs = memory_format == MemoryFormat::contiguous;
  auto kernel = runs ? recalibrate_runs<T, kBackward>
                : memory_format == MemoryFormat::channels_last
                    ? recalibrate_columns<T, true, kBackward>
                    : recalibrate_columns<T, false, kBackward>;
  const char* name = runs ? "recalibrate_runs" : "recalibrate_columns";
  launch(kernel, name, grid, kThreads, 1, shared, stream, args);
}

template <bool kBackward>
PSA_KERNEL(kThreads, 3)
se_alone(PSA_PARAM(SEKernelArgs) args) {
  const SEArgs& se = args.se;
  const Shape& shape = args.shape;
  int64_t b = block_index(), SC = int64_t(shape.S) * shape.C, SR = int64_t(shape.S) * se.R;
  SEMemory m = {};
  m.squeeze = se.squeeze + b * SC;
  m.attention = se.attention + b * SC;
  m.hidden = se.hidden + b * SR;
  auto total = [&](int i) { return sum_of_splits(se, int(SC), b, i); };
  if constexpr (kBackward) {
    m.grad_attention = m.grad_mean = se.grad_mean + b * SC;
    m.grad_pre1 = se.grad_pre1 + b * SR;
    m.grad_pre2 = se.grad_pre2 + b * SC;
    se_backward(se, shape, b, m, total);
  } else {
    m.exp_gate = se.exp_gate + b * SC;
    se_forward(se, shape, b, m, false, total);
  }
}

}  // namespace

int64_t recalibrate_shared_bytes(const RecalibrateArgs& args, MemoryFormat memory_format,
                                 bool backward) {
  const Shape& shape = args.shape;
  // Then cuda.cpp doesn't choose the kernel over runs, whose tables need shared memory.
  if (args.se.precomputed) return 0;
  int64_t tables = memory_format == MemoryFormat::contiguous ? 2 * int64_t(shape.S) * shape.C : 0;
  return int64_t(sizeof(float)) * (se_floats(shape, args.se.R, backward) + tables);
}

void launch_recalibrate(const RecalibrateArgs& args, Dtype dtype, MemoryFormat memory_format,
                        bool backward, void* stream) {
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    if (backward) {
      launch_recalibrate_of<T, true>(args, memory_format, stream);
    } else {
      launch_recalibrate_of<T, false>(args, memory_format, stream);
    }
  });
}

void launch_se(const SEKernelArgs& args, bool backward, void* stream) {
  if (backward) {
    launch(se_alone<true>, "se_alone", args.shape.B, kThreads, 1, 0, stream, args);
  } else {
    launch(se_alone<false>, "se_alone", args.shape.B, kThreads, 1, 0, stream, args);
  }
}

}  // namespace psa::cuda
