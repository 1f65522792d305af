// Building blocks of the kernels: elements, vectors of 16 bytes, windows of a run, reductions.
#pragma once

#include <type_traits>

#ifdef PSA_EMULATED
#include "intrinsics.h"
#else
#include "intrinsics.cuh"
#endif
#include "kernels.h"

namespace psa::cuda {

// Types of elements; sums and products are computed in float.
struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

template <class T>
constexpr int kVec = 16 / int(sizeof(T));

PSA_DEVICE float to_float(float x) {
  return x;
}
PSA_DEVICE float to_float(Half x) {
  return float_of_half(x.bits);
}
PSA_DEVICE float to_float(Bfloat x) {
  return float_of_bits(uint32_t(x.bits) << 16);
}

template <class T>
PSA_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, Half>) {
    return {half_of_float(x)};
  } else if constexpr (std::is_same_v<T, Bfloat>) {
    return {bfloat_of_float(x)};
  } else {
    return x;
  }
}

template <class T>
PSA_DEVICE void unpack(Vec v, float (&x)[kVec<T>]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, Half>) {
      x[2 * i] = float_of_half(uint16_t(v.word[i]));
      x[2 * i + 1] = float_of_half(uint16_t(v.word[i] >> 16));
    } else if constexpr (std::is_same_v<T, Bfloat>) {
      x[2 * i] = float_of_bits(v.word[i] << 16);
      x[2 * i + 1] = float_of_bits(v.word[i] & 0xffff0000u);
    } else {
      x[i] = float_of_bits(v.word[i]);
    }
  }
}

template <class T>
PSA_DEVICE Vec pack(const float (&x)[kVec<T>]) {
  Vec v;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, Half>) {
      v.word[i] = halves_of_floats(x[2 * i], x[2 * i + 1]);
    } else if constexpr (std::is_same_v<T, Bfloat>) {
      v.word[i] = bfloats_of_floats(x[2 * i], x[2 * i + 1]);
    } else {
      v.word[i] = bits_of_float(x[i]);
    }
  }
  return v;
}

// A contiguous run of elements in global or shared memory.
template <class T>
struct Run {
  T* data;
  int32_t size;
};

template <class T>
PSA_DEVICE int misaligned(const T* p) {  // number of elements after the last 16-byte boundary
  return int(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T));
}

enum class CacheHint { keep, evict_first };  // evict_first: the memory is not read again soon

// The kVec elements at `data`, of which only [low, high) are used; 0 <= low and high <= kVec. A
// window is wide if one access of 16 bytes covers it without leaving the run.
template <class T>
struct Window {
  T* data;
  int low, high;
  bool wide;
};

// The window of elements [i, i + kVec) of a run, restricted to [low, high) of that run.
template <class T>
PSA_DEVICE Window<T> window_of(Run<T> run, int i, int low, int high) {
  T* data = run.data + i;
  low = low > i ? low - i : 0;
  high = high - i < kVec<T> ? high - i : kVec<T>;
  bool inside = i >= 0 && i + kVec<T> <= run.size;
  return {data, low, high, low < high && inside && misaligned(data) == 0};
}

// A load takes two steps, so that a thread can have several windows in flight. load_wide only
// issues the 16-byte load of a wide window, including elements outside of [low, high); load_narrow
// then loads the elements of a window that is not wide.
template <CacheHint kHint, class T>
PSA_DEVICE Vec load_wide(const Window<const T>& w) {
  Vec v = {{0, 0, 0, 0}};
  if (w.wide)
    v = kHint == CacheHint::evict_first ? load_global_evict_first(w.data) : load_global(w.data);
  return v;
}
template <class T>
PSA_DEVICE void load_narrow(const Window<const T>& w, Vec& v) {
  if (w.wide || w.low >= w.high) return;
#pragma unroll
  for (int j = 0; j < kVec<T>; ++j) {
    if (j < w.low || j >= w.high) continue;
    if constexpr (sizeof(T) == 4) {
      v.word[j] = bits_of_float(w.data[j]);
    } else {
      v.word[j / 2] |= uint32_t(w.data[j].bits) << (j % 2 * 16);
    }
  }
}

// Element j of a vector; j is a compile-time constant once the loop is unrolled.
template <class T>
PSA_DEVICE T element(const Vec& v, int j) {
  if constexpr (sizeof(T) == 4) {
    return float_of_bits(v.word[j]);
  } else {
    return {uint16_t(v.word[j / 2] >> (j % 2 * 16))};
  }
}

template <class T>
PSA_DEVICE void store_window(const Window<T>& w, Vec v) {
  if (w.wide) {
    store_global(w.data, v);
    return;
  }
#pragma unroll
  for (int j = 0; j < kVec<T>; ++j) {
    if (j >= w.low && j < w.high) w.data[j] = element<T>(v, j);
  }
}

PSA_DEVICE int divide(int n, Divisor d) {
  return int((uint32_t(uint64_t(uint32_t(n)) * d.magic >> 32) + uint32_t(n)) >> d.shift);
}

// Sums over groups of `lanes` neighbouring lanes, a power of two. All lanes of the warp must call
// it.
PSA_DEVICE float sum_of_lanes(float value, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// The sum of elements [low, high) of x, or of x * g.
template <class T, bool kProduct>
PSA_DEVICE float sum_of_elements(Vec x, Vec g, int low, int high) {
  float a[kVec<T>];
  unpack<T>(x, a);
  if constexpr (kProduct) {
    float b[kVec<T>];
    unpack<T>(g, b);
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) a[j] *= b[j];
  }
  if (low > 0 || high < kVec<T>) {
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) a[j] = j >= low && j < high ? a[j] : 0;
  }
#pragma unroll
  for (int step = kVec<T> / 2; step > 0; step /= 2) {
#pragma unroll
    for (int j = 0; j < step; ++j) a[j] += a[j + step];
  }
  return a[0];
}

PSA_DEVICE float load_element(const Matrix& m, int64_t row, int64_t column, int64_t branch = 0) {
  int64_t i = row * m.row + column * m.column + branch * m.branch;
  switch (m.dtype) {
    case Dtype::float16:
      return to_float(static_cast<const Half*>(m.data)[i]);
    case Dtype::bfloat16:
      return to_float(static_cast<const Bfloat*>(m.data)[i]);
    case Dtype::float32:
      return static_cast<const float*>(m.data)[i];
    default:
      return float(static_cast<const double*>(m.data)[i]);
  }
}

PSA_DEVICE void store_element(const Matrix& m, int64_t row, int64_t column, float x,
                              int64_t branch = 0) {
  int64_t i = row * m.row + column * m.column + branch * m.branch;
  switch (m.dtype) {
    case Dtype::float16:
      static_cast<Half*>(m.data)[i] = from_float<Half>(x);
      break;
    case Dtype::bfloat16:
      static_cast<Bfloat*>(m.data)[i] = from_float<Bfloat>(x);
      break;
    case Dtype::float32:
      static_cast<float*>(m.data)[i] = x;
      break;
    default:
      static_cast<double*>(m.data)[i] = x;
  }
}

// Calls f with a zero of the dtype's element type.
template <class F>
void dispatch(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float16:
      return f(Half{});
    case Dtype::bfloat16:
      return f(Bfloat{});
    default:
      return f(float{});
  }
}

}  // namespace psa::cuda
