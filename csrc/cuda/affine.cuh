// From the gate's results to recalibrated elements.
#pragma once

#include "gate.cuh"

namespace psa::cuda {

// y = x * factor + addend: what the gate's results, and an epilogue, mean for one channel.
struct Affine {
  float factor, addend;
};

template <bool kBackward, class Params>
PSA_DEVICE Affine affine_of(const Params& p, const Recalibration& gate, int s, int c) {
  int i = s * p.shape.C + c;
  if constexpr (kBackward) return {gate.attention[i], gate.spread[i]};
  int k = (p.shape.S - 1 - s) * p.shape.C + c;
  Affine y = {gate.attention[i], 0};
  if (p.scale.data) y.factor *= load_element(p.scale, k, 0);
  if (p.shift.data) y.addend = load_element(p.shift, k, 0);
  return y;
}

// Runs of pixels: each channel's factor and addend, looked up in tables (S, C) in shared memory.
struct Tables {
  float *factor, *addend;
};

// Ends with a barrier.
template <bool kBackward, class Params>
PSA_DEVICE Tables make_tables(const Params& p, const Recalibration& gate, float* shared) {
  int SC = p.shape.S * p.shape.C;
  Tables tables = {shared, shared + SC};
  for (int i = thread_index(); i < SC; i += block_threads()) {
    int s = divide(i, p.shape.channels);
    Affine y = affine_of<kBackward>(p, gate, s, i - s * p.shape.C);
    tables.factor[i] = y.factor;
    tables.addend[i] = y.addend;
  }
  sync_block();
  return tables;
}

// max(x * factor + addend, floor); a NaN stays one.
PSA_DEVICE float recalibrated(float x, float factor, float addend, float floor) {
  float y = x * factor + addend;
  return y < floor ? floor : y;
}

// Elements [i, i + kVec) of branch s's run, recalibrated. Those outside of the run are anything.
template <class T>
PSA_DEVICE Vec recalibrated_window(Vec v, int i, int s, const Shape& n, const Tables& tables,
                                   float floor) {
  float x[kVec<T>];
  unpack<T>(v, x);
  const float *factor = tables.factor + s * n.C, *addend = tables.addend + s * n.C;
  int HW = int(n.HW);
  if (HW >= kVec<T>) {  // two channels at most
    int c = divide(i < 0 ? 0 : i, n.pixels), next = c + 1 < n.C ? c + 1 : c;
    int boundary = (c + 1) * HW - i;
    Affine first = {factor[c], addend[c]}, second = {factor[next], addend[next]};
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) {
      x[j] = recalibrated(x[j], j < boundary ? first.factor : second.factor,
                          j < boundary ? first.addend : second.addend, floor);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) {
      int e = i + j < 0 ? 0 : i + j < n.run ? i + j : n.run - 1;
      int c = divide(e, n.pixels);
      x[j] = recalibrated(x[j], factor[c], addend[c], floor);
    }
  }
  return pack<T>(x);
}

}  // namespace psa::cuda
