// Recalibration: scales and shifts the elements of each channel.
#pragma once

#include "gate.cuh"

namespace psa::cuda {

// One channel's y = x * weight + shift. Forward: attention with the epilogue's scale and shift.
// Backward: attention and grad_mean.
struct Affine {
  float weight, shift;
};

template <bool kBackward, class Args>
PSA_DEVICE Affine affine_of(const Args& args, const SEResult& se, int s, int c) {
  int i = s * args.shape.C + c;
  if constexpr (kBackward) return {se.attention[i], se.grad_mean[i]};
  int k = (args.shape.S - 1 - s) * args.shape.C + c;
  Affine y = {se.attention[i], 0};
  if (args.scale.data) y.weight *= load_element(args.scale, k, 0);
  if (args.shift.data) y.shift = load_element(args.shift, k, 0);
  return y;
}

// Each channel's weight and shift, (S, C) in shared memory, for the kernels over runs.
struct AffineTables {
  float *weight, *shift;
};

// Fills the tables; ends with a barrier.
template <bool kBackward, class Args>
PSA_DEVICE AffineTables make_affine_tables(const Args& args, const SEResult& se, float* shared) {
  int SC = args.shape.S * args.shape.C;
  AffineTables tables = {shared, shared + SC};
  for (int i = thread_index(); i < SC; i += block_threads()) {
    int s = divide(i, args.shape.channels);
    Affine y = affine_of<kBackward>(args, se, s, i - s * args.shape.C);
    tables.weight[i] = y.weight;
    tables.shift[i] = y.shift;
  }
  sync_block();
  return tables;
}

// max(x * weight + shift, floor); a NaN stays a NaN.
PSA_DEVICE float recalibrated(float x, float weight, float shift, float floor) {
  float y = x * weight + shift;
  return y < floor ? floor : y;
}

// Recalibrates elements [i, i + kVec) of branch s's run. Elements outside of the run are undefined.
template <class T>
PSA_DEVICE Vec recalibrated_window(Vec v, int i, int s, const Shape& shape,
                                   const AffineTables& tables, float floor) {
  float x[kVec<T>];
  unpack<T>(v, x);
  const float *weight = tables.weight + s * shape.C, *shift = tables.shift + s * shape.C;
  int HW = int(shape.HW);
  if (HW >= kVec<T>) {  // the vector spans at most two channels
    int c = divide(i < 0 ? 0 : i, shape.pixels), next = c + 1 < shape.C ? c + 1 : c;
    int boundary = (c + 1) * HW - i;
    Affine first = {weight[c], shift[c]}, second = {weight[next], shift[next]};
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) {
      x[j] = recalibrated(x[j], j < boundary ? first.weight : second.weight,
                          j < boundary ? first.shift : second.shift, floor);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) {
      int e = i + j < 0 ? 0 : i + j < shape.run ? i + j : shape.run - 1;
      int c = divide(e, shape.pixels);
      x[j] = recalibrated(x[j], weight[c], shift[c], floor);
    }
  }
  return pack<T>(x);
}

}  // namespace psa::cuda
