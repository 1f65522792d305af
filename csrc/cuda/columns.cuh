// Channels in columns: each thread keeps to one vector of channels (or one channel, whatever its
// strides) and walks over pixels. Threads are spread over a tile of the cat's S * C and over
// pixels.
#pragma once

#include "device.cuh"

namespace psa::cuda {

// What a thread has in flight: a vector of channels of one pixel, or a single element.
template <class T, bool kWide>
using Raw = std::conditional_t<kWide, Vec, T>;
template <class T, bool kWide>
constexpr int kChannels = kWide ? kVec<T> : 1;

template <bool kWide, Read kRead, class T>
PSA_DEVICE Raw<T, kWide> load_raw(const T* p) {
  if constexpr (kWide) {
    return kRead == Read::last ? load_global_last(p) : load_global(p);
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

// Where a thread is: channels k to k + kSize of the cat are channels c on of branch s.
template <int kSize>
struct Column {
  bool active;
  int index;  // in the tile, in units of kSize channels
  int pixel;  // of those that the block takes at once
  int k, s, c;

  PSA_DEVICE Column(const Shape& n, int first, int tile, int tile_pixels, bool pixels_inner) {
    int inner = pixels_inner ? tile_pixels : tile;
    int a = thread_index() % inner, b = thread_index() / inner;
    index = pixels_inner ? b : a;
    pixel = pixels_inner ? a : b;
    k = (first + index) * kSize;
    active = index < tile && pixel < tile_pixels && k < n.S * n.C;
    int place = divide(k, n.channels);
    s = n.S - 1 - place;
    c = k - place * n.C;
  }
};

PSA_HOST_DEVICE int64_t column_sum_floats(int tile, int tile_pixels, int size) {
  return int64_t(tile_pixels) * (tile * size + 1);
}

// Adds up the tile's columns over its threads, in a fixed order, in shared memory of
// column_sum_floats; store(channel in the tile, sum) is called once for each.
template <int kSize, class Store>
PSA_DEVICE void sum_columns_of(const Column<kSize>& column, const float (&sum)[kSize], int tile,
                               int tile_pixels, float* shared, Store store) {
  int width = tile * kSize, pitch = width + 1;  // odd or not: rows start in different banks
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
