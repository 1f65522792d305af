// Columns of channels, for channels_last and strided tensors: each thread takes one vector of
// channels (or one channel of any strides) and loops over pixels. The threads of a block cover a
// tile of concat's S * C channels, and several pixels at once.
#pragma once

#include "device.cuh"

namespace psa::cuda {

// One load of a thread: a vector of channels of one pixel, or a single element.
template <class T, bool kWide>
using Raw = std::conditional_t<kWide, Vec, T>;
template <class T, bool kWide>
constexpr int kChannels = kWide ? kVec<T> : 1;

template <bool kWide, CacheHint kHint, class T>
PSA_DEVICE Raw<T, kWide> load_raw(const T* p) {
  if constexpr (kWide) {
    return kHint == CacheHint::evict_first ? load_global_evict_first(p) : load_global(p);
  } else {
    return *p;
  }
}

template <class T, class In, int kSize>
PSA_DEVICE void unpack_raw(In v, float (&x)[kSize]) {
  if constexpr (std::is_same_v<In, Vec>) {
    unpack<T>(v, x);
  } else {
    x[0] = to_float(v);
  }
}

template <class T, int kSize>
PSA_DEVICE void store_raw(T* p, const float (&x)[kSize]) {
  if constexpr (kSize == 1) {
    *p = from_float<T>(x[0]);
  } else {
    store_global(p, pack<T>(x));
  }
}

// A thread's coordinates: channels [k, k + kSize) of concat are channels [c, c + kSize) of branch
// s.
template <int kSize>
struct Column {
  bool active;
  int index;  // within the tile, in units of kSize channels
  int pixel;  // within the pixels that the block takes at once
  int k, s, c;

  PSA_DEVICE Column(const Shape& shape, int first, int tile, int tile_pixels, bool pixels_inner) {
    int inner = pixels_inner ? tile_pixels : tile;
    int a = thread_index() % inner, b = thread_index() / inner;
    index = pixels_inner ? b : a;
    pixel = pixels_inner ? a : b;
    k = (first + index) * kSize;
    active = index < tile && pixel < tile_pixels && k < shape.S * shape.C;
    int position = divide(k, shape.channels);
    s = shape.S - 1 - position;
    c = k - position * shape.C;
  }
};

PSA_HOST_DEVICE int64_t column_sum_floats(int tile, int tile_pixels, int size) {
  return int64_t(tile_pixels) * (tile * size + 1);
}

// Sums each of the tile's channels over the block's threads, in a fixed order, and calls
// store(channel in the tile, sum) once for each channel. `shared` holds column_sum_floats floats.
template <int kSize, class Store>
PSA_DEVICE void sum_columns_of(const Column<kSize>& column, const float (&sum)[kSize], int tile,
                               int tile_pixels, float* shared, Store store) {
  int width = tile * kSize, pitch = width + 1;  // + 1: rows start in different banks
  if (column.index < tile && column.pixel < tile_pixels) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      shared[column.pixel * pitch + column.index * kSize + j] = sum[j];
    }
  }
  sync_block();
  for (int i = thread_index() / kWarp; i < width; i += kThreads / kWarp) {
    float total = 0;
    for (int pixel = thread_index() % kWarp; pixel < tile_pixels; pixel += kWarp) {
      total += shared[pixel * pitch + i];
    }
    total = sum_of_lanes(total, kWarp);
    if (thread_index() % kWarp == 0) store(i, total);
  }
}

}  // namespace psa::cuda
