// The first of the two passes: sums over pixels, of the branches (squeeze) or of branches * grad.
#include "columns.cuh"

namespace psa::cuda {
namespace {

// A row of pixels [low, high) of the runs x and g, which have the same coordinates.
template <class T>
struct Row {
  Run<const T> x, g;
  int low, high;
  int first;  // where the windows start: at or before low, where x is aligned
};

template <class T, bool kProduct>
PSA_DEVICE Row<T> row_of(const Sums& p, int64_t b, int split, int r) {
  const Shape& n = p.shape;
  int s = divide(r, n.channels), c = r - s * n.C;
  const Strided& part = p.parts[s];
  Row<T> row;
  row.x = {static_cast<const T*>(part.data) + b * part.batch, n.run};
  row.g = row.x;
  if constexpr (kProduct) {
    row.g.data = static_cast<const T*>(p.cat.data) + b * p.cat.batch;
    row.g.data += int64_t(n.S - 1 - s) * n.run;
  }
  int end = (c + 1) * int(n.HW);
  row.low = c * int(n.HW) + split * int(p.split_pixels);
  row.high = row.low + int(p.split_pixels);
  if (row.high > end) row.high = end;
  row.first = row.low - misaligned(row.x.data + row.low);
  return row;
}

// What a thread has in flight.
struct Flight {
  Vec x, g;
};

// The branches are read for the last time where there is a gradient, which is read again.
template <class T, bool kProduct>
PSA_DEVICE Flight take_off(const Row<T>& row, int i) {
  Flight f = {};
  f.x = load_wide<kProduct ? Read::last : Read::again>(window_of(row.x, i, row.low, row.high));
  if (kProduct) f.g = load_wide<Read::again>(window_of(row.g, i, row.low, row.high));
  return f;
}

// The sum of what arrives.
template <class T, bool kProduct>
PSA_DEVICE float land(const Row<T>& row, int i, Flight f) {
  load_narrow(window_of(row.x, i, row.low, row.high), f.x);
  if (kProduct) load_narrow(window_of(row.g, i, row.low, row.high), f.g);
  return sum_of_elements<T, kProduct>(f.x, f.g, row.low - i, row.high - i);
}

// One row by a warp: several windows of it in flight.
template <class T, bool kProduct>
PSA_DEVICE float sum_of_long_row(const Row<T>& row) {
  constexpr int kStep = kWarp * kVec<T>;
  float sum = 0;
  for (int i = row.first + thread_index() % kWarp * kVec<T>; i < row.high; i += kFlight * kStep) {
    Flight flights[kFlight];
#pragma unroll
    for (int u = 0; u < kFlight; ++u) flights[u] = take_off<T, kProduct>(row, i + u * kStep);
#pragma unroll
    for (int u = 0; u < kFlight; ++u) sum += land<T, kProduct>(row, i + u * kStep, flights[u]);
  }
  return sum_of_lanes(sum, kWarp);
}

// Rows of at most p.lanes windows, one for each lane of a group; several rows in flight.
template <class T, bool kProduct>
PSA_DEVICE void sum_short_rows(const Sums& p, int64_t b, int split, int begin, int end,
                               float* sums) {
  int lane = thread_index() % p.lanes, groups = kThreads / p.lanes;
  int r = begin + thread_index() / p.lanes;
  Flight flights[kFlight];
#pragma unroll
  for (int u = 0; u < kFlight; ++u) {
    if (r + u * groups >= end) break;
    Row<T> row = row_of<T, kProduct>(p, b, split, r + u * groups);
    flights[u] = take_off<T, kProduct>(row, row.first + lane * kVec<T>);
  }
#pragma unroll
  for (int u = 0; u < kFlight; ++u, r += groups) {
    float sum = 0;
    if (r < end) {
      Row<T> row = row_of<T, kProduct>(p, b, split, r);
      sum = land<T, kProduct>(row, row.first + lane * kVec<T>, flights[u]);
    }
    sum = sum_of_lanes(sum, p.lanes);
    if (lane == 0 && r < end) sums[r] = sum;
  }
}

template <class T, bool kProduct>
PSA_KERNEL(kThreads, kProduct ? 2 : 3)
sum_rows(PSA_PARAM(Sums) p) {
  int64_t slice = block_index() / p.blocks, b = slice / p.splits;
  int split = int(slice % p.splits), rows = p.shape.S * p.shape.C;
  int begin = int(block_index() % p.blocks) * p.rows;
  int end = begin + p.rows < rows ? begin + p.rows : rows;
  float* sums = p.sums + slice * rows;
  if (!p.long_rows) {
    sum_short_rows<T, kProduct>(p, b, split, begin, end, sums);
    return;
  }
  for (int r = begin + thread_index() / kWarp; r < end; r += kThreads / kWarp) {
    float sum = sum_of_long_row<T, kProduct>(row_of<T, kProduct>(p, b, split, r));
    if (thread_index() % kWarp == 0) sums[r] = sum;
  }
}

template <class T, bool kWide, bool kProduct>
PSA_KERNEL(kThreads, kProduct ? 2 : 3)
sum_columns(PSA_PARAM(Sums) p) {
  constexpr int kSize = kChannels<T, kWide>;
  const Shape& n = p.shape;
  int64_t slice = block_index() / p.blocks, b = slice / p.splits;
  int64_t begin = slice % p.splits * p.split_pixels;
  int64_t end = begin + p.split_pixels < n.HW ? begin + p.split_pixels : n.HW;
  int first = int(block_index() % p.blocks) * p.tile;
  Column<kSize> column(n, first, p.tile, p.tile_pixels, p.pixels_inner);
  float sum[kSize] = {};
  if (column.active) {
    const Strided& part = p.parts[column.s];
    const T* x = static_cast<const T*>(part.data) + b * part.batch + column.c * part.channel;
    const T* g = static_cast<const T*>(p.cat.data) + b * p.cat.batch + column.k * p.cat.channel;
    for (int64_t q = begin + column.pixel; q < end; q += kFlight * p.tile_pixels) {
      Raw<T, kWide> in_x[kFlight] = {}, in_g[kFlight] = {};
#pragma unroll
      for (int u = 0; u < kFlight; ++u) {
        int64_t pixel = q + u * p.tile_pixels;
        if (pixel >= end) break;
        in_x[u] = load_raw<kWide, kProduct ? Read::last : Read::again>(x + pixel * part.pixel);
        if (kProduct) in_g[u] = load_raw<kWide, Read::again>(g + pixel * p.cat.pixel);
      }
#pragma unroll
      for (int u = 0; u < kFlight; ++u) {
        float a[kSize], w[kSize];
        unpack_raw<T>(in_x[u], a);
        unpack_raw<T>(in_g[u], w);
#pragma unroll
        for (int j = 0; j < kSize; ++j) sum[j] += kProduct ? a[j] * w[j] : a[j];
      }
    }
  }
  float* sums = p.sums + slice * n.S * n.C;
  float* shared = reinterpret_cast<float*>(shared_memory());
  sum_columns_of(column, sum, p.tile, p.tile_pixels, shared, [&](int i, float total) {
    int k = first * kSize + i, place = divide(k, n.channels);
    if (k < n.S * n.C) sums[(n.S - 1 - place) * n.C + k - place * n.C] = total;
  });
}

template <class T, bool kProduct>
void launch_sums_of(const Sums& p, Layout layout, void* stream) {
  int64_t grid = p.shape.B * p.splits * p.blocks;
  if (layout == Layout::runs) {
    launch(sum_rows<T, kProduct>, "sum_rows", grid, kThreads, 1, 0, stream, p);
  } else if (layout == Layout::columns) {
    int64_t shared = sizeof(float) * column_sum_floats(p.tile, p.tile_pixels, kVec<T>);
    launch(sum_columns<T, true, kProduct>, "sum_columns", grid, kThreads, 1, shared, stream, p);
  } else {
    int64_t shared = sizeof(float) * column_sum_floats(p.tile, p.tile_pixels, 1);
    launch(sum_columns<T, false, kProduct>, "sum_columns", grid, kThreads, 1, shared, stream, p);
  }
}

}  // namespace

void launch_sums(const Sums& p, Dtype dtype, Layout layout, void* stream) {
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    if (p.cat.data) {
      launch_sums_of<T, true>(p, layout, stream);
    } else {
      launch_sums_of<T, false>(p, layout, stream);
    }
  });
}

}  // namespace psa::cuda
