// The first of the two passes: sums over pixels, of the branches (forward) or of branches * grad
// (backward).
#include "columns.cuh"

namespace psa::cuda {
namespace {

// Pixels of one channel: elements [low, high) of the runs x (a branch) and g (its gradient).
template <class T>
struct PixelRow {
  Run<const T> x, g;
  int low, high;
  int first;  // start of the first window: the last element up to low where x is aligned
};

template <class T, bool kProduct>
PSA_DEVICE PixelRow<T> make_row(const SumArgs& args, int64_t b, int split, int r) {
  const Shape& shape = args.shape;
  int s = divide(r, shape.channels), c = r - s * shape.C;
  const Strided& branch = args.branches[s];
  PixelRow<T> row;
  row.x = {static_cast<const T*>(branch.data) + b * branch.batch, shape.run};
  row.g = row.x;
  if constexpr (kProduct) {
    row.g.data = static_cast<const T*>(args.concat.data) + b * args.concat.batch;
    row.g.data += int64_t(shape.S - 1 - s) * shape.run;
  }
  int end = (c + 1) * int(shape.HW);
  row.low = c * int(shape.HW) + split * int(args.split_pixels);
  row.high = row.low + int(args.split_pixels);
  if (row.high > end) row.high = end;
  row.first = row.low - misaligned(row.x.data + row.low);
  return row;
}

// The 16-byte loads of one window that a thread has in flight.
struct InFlightLoads {
  Vec x, g;
};

// After this pass the backward reads the gradient again, but not the branches.
template <class T, bool kProduct>
PSA_DEVICE InFlightLoads issue_loads(const PixelRow<T>& row, int i) {
  InFlightLoads in_flight = {};
  in_flight.x = load_wide<kProduct ? CacheHint::evict_first : CacheHint::keep>(
      window_of(row.x, i, row.low, row.high));
  if (kProduct) in_flight.g = load_wide<CacheHint::keep>(window_of(row.g, i, row.low, row.high));
  return in_flight;
}

// Waits for the loads and returns the sum of their elements.
template <class T, bool kProduct>
PSA_DEVICE float accumulate(const PixelRow<T>& row, int i, InFlightLoads in_flight) {
  load_narrow(window_of(row.x, i, row.low, row.high), in_flight.x);
  if (kProduct) load_narrow(window_of(row.g, i, row.low, row.high), in_flight.g);
  return sum_of_elements<T, kProduct>(in_flight.x, in_flight.g, row.low - i, row.high - i);
}

// A warp sums one row; each lane has several windows in flight.
template <class T, bool kProduct>
PSA_DEVICE float sum_of_long_row(const PixelRow<T>& row) {
  constexpr int kStep = kWarp * kVec<T>;
  float sum = 0;
  for (int i = row.first + thread_index() % kWarp * kVec<T>; i < row.high;
       i += kLoadsInFlight * kStep) {
    InFlightLoads loads[kLoadsInFlight];
#pragma unroll
    for (int u = 0; u < kLoadsInFlight; ++u)
      loads[u] = issue_loads<T, kProduct>(row, i + u * kStep);
#pragma unroll
    for (int u = 0; u < kLoadsInFlight; ++u)
      sum += accumulate<T, kProduct>(row, i + u * kStep, loads[u]);
  }
  return sum_of_lanes(sum, kWarp);
}

// A group of args.lanes lanes sums rows of at most that many windows, one window for each lane.
// Each lane has the windows of several rows in flight.
template <class T, bool kProduct>
PSA_DEVICE void sum_short_rows(const SumArgs& args, int64_t b, int split, int begin, int end,
                               float* sums) {
  int lane = thread_index() % args.lanes, groups = kThreads / args.lanes;
  int r = begin + thread_index() / args.lanes;
  InFlightLoads loads[kLoadsInFlight];
#pragma unroll
  for (int u = 0; u < kLoadsInFlight; ++u) {
    if (r + u * groups >= end) break;
    PixelRow<T> row = make_row<T, kProduct>(args, b, split, r + u * groups);
    loads[u] = issue_loads<T, kProduct>(row, row.first + lane * kVec<T>);
  }
#pragma unroll
  for (int u = 0; u < kLoadsInFlight; ++u, r += groups) {
    float sum = 0;
    if (r < end) {
      PixelRow<T> row = make_row<T, kProduct>(args, b, split, r);
      sum = accumulate<T, kProduct>(row, row.first + lane * kVec<T>, loads[u]);
    }
    sum = sum_of_lanes(sum, args.lanes);
    if (lane == 0 && r < end) sums[r] = sum;
  }
}

template <class T, bool kProduct>
PSA_KERNEL(kThreads, kProduct ? 2 : 3)
sum_rows(PSA_PARAM(SumArgs) args) {
  int64_t slice = block_index() / args.blocks, b = slice / args.splits;
  int split = int(slice % args.splits), rows = args.shape.S * args.shape.C;
  int begin = int(block_index() % args.blocks) * args.rows;
  int end = begin + args.rows < rows ? begin + args.rows : rows;
  float* sums = args.sums + slice * rows;
  if (!args.long_rows) {
    sum_short_rows<T, kProduct>(args, b, split, begin, end, sums);
    return;
  }
  for (int r = begin + thread_index() / kWarp; r < end; r += kThreads / kWarp) {
    float sum = sum_of_long_row<T, kProduct>(make_row<T, kProduct>(args, b, split, r));
    if (thread_index() % kWarp == 0) sums[r] = sum;
  }
}

template <class T, bool kWide, bool kProduct>
PSA_KERNEL(kThreads, kProduct ? 2 : 3)
sum_columns(PSA_PARAM(SumArgs) args) {
  constexpr int kSize = kChannels<T, kWide>;
  const Shape& shape = args.shape;
  int64_t slice = block_index() / args.blocks, b = slice / args.splits;
  int64_t begin = slice % args.splits * args.split_pixels;
  int64_t end = begin + args.split_pixels < shape.HW ? begin + args.split_pixels : shape.HW;
  int first = int(block_index() % args.blocks) * args.tile;
  Column<kSize> column(shape, first, args.tile, args.tile_pixels, args.pixels_inner);
  float sum[kSize] = {};
  if (column.active) {
    const Strided& branch = args.branches[column.s];
    const T* x = static_cast<const T*>(branch.data) + b * branch.batch + column.c * branch.channel;
    const T* g = static_cast<const T*>(args.concat.data) + b * args.concat.batch +
                 column.k * args.concat.channel;
    for (int64_t base = begin + column.pixel; base < end;
         base += kLoadsInFlight * args.tile_pixels) {
      Raw<T, kWide> in_x[kLoadsInFlight] = {}, in_g[kLoadsInFlight] = {};
#pragma unroll
      for (int u = 0; u < kLoadsInFlight; ++u) {
        int64_t pixel = base + u * args.tile_pixels;
        if (pixel >= end) break;
        in_x[u] = load_raw<kWide, kProduct ? CacheHint::evict_first : CacheHint::keep>(
            x + pixel * branch.pixel);
        if (kProduct) in_g[u] = load_raw<kWide, CacheHint::keep>(g + pixel * args.concat.pixel);
      }
#pragma unroll
      for (int u = 0; u < kLoadsInFlight; ++u) {
        float in[kSize], grad[kSize];
        unpack_raw<T>(in_x[u], in);
        unpack_raw<T>(in_g[u], grad);
#pragma unroll
        for (int j = 0; j < kSize; ++j) sum[j] += kProduct ? in[j] * grad[j] : in[j];
      }
    }
  }
  float* sums = args.sums + slice * shape.S * shape.C;
  float* shared = reinterpret_cast<float*>(shared_memory());
  sum_columns_of(column, sum, args.tile, args.tile_pixels, shared, [&](int i, float total) {
    int k = first * kSize + i, position = divide(k, shape.channels);
    if (k < shape.S * shape.C)
      sums[(shape.S - 1 - position) * shape.C + k - position * shape.C] = total;
  });
}

template <class T, bool kProduct>
void launch_sums_of(const SumArgs& args, MemoryFormat memory_format, void* stream) {
  int64_t grid = args.shape.B * args.splits * args.blocks;
  if (memory_format == MemoryFormat::contiguous) {
    launch(sum_rows<T, kProduct>, "sum_rows", grid, kThreads, 1, 0, stream, args);
    return;
  }
  bool wide = memory_format == MemoryFormat::channels_last;
  int64_t floats = column_sum_floats(args.tile, args.tile_pixels, wide ? kVec<T> : 1);
  auto kernel = wide ? sum_columns<T, true, kProduct> : sum_columns<T, false, kProduct>;
  launch(kernel, "sum_columns", grid, kThreads, 1, int64_t(sizeof(float)) * floats, stream, args);
}

}  // namespace

void launch_sums(const SumArgs& args, Dtype dtype, MemoryFormat memory_format, void* stream) {
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    if (args.concat.data) {
      launch_sums_of<T, true>(args, memory_format, stream);
    } else {
      launch_sums_of<T, false>(args, memory_format, stream);
    }
  });
}

}  // namespace psa::cuda
