// The SE module and the softmax across branches, for one sample by one block. Forward: from the
// sample's sums to attention. Backward: from the sums of branch * grad, which are the gradient of
// attention, to grad_mean, the gradient of squeeze over HW.
//
// All arrays are (S, C) or (S, R), in shared or global memory; the block's barriers order both.
#pragma once

#include "device.cuh"

namespace psa::cuda {

// The arrays of a block. attention may share memory with squeeze, and grad_mean with
// grad_attention.
struct SEMemory {
  float *squeeze, *attention, *exp_gate;          // (S, C)
  float *grad_attention, *grad_pre2, *grad_mean;  // (S, C), backward
  float *hidden, *grad_pre1;                      // (S, R)
};

// The number of floats that se_memory takes.
PSA_HOST_DEVICE int64_t se_floats(const Shape& shape, int R, bool backward) {
  int64_t SC = int64_t(shape.S) * shape.C, SR = int64_t(shape.S) * R;
  return backward ? 3 * SC + 2 * SR : 2 * SC + SR;
}

PSA_DEVICE SEMemory se_memory(float* shared, const Shape& shape, int R, bool backward) {
  int SC = shape.S * shape.C;
  SEMemory m = {};
  m.squeeze = m.attention = shared;
  m.exp_gate = m.grad_attention = m.grad_mean = shared + SC;
  m.grad_pre2 = shared + 2 * SC;
  m.hidden = shared + (backward ? 3 : 2) * SC;
  m.grad_pre1 = m.hidden + shape.S * R;
  return m;
}

// hidden = relu(fc1 squeeze), one warp for each unit. A NaN passes, as in PyTorch's relu.
PSA_DEVICE void compute_hidden(const SEArgs& se, const Shape& shape, const SEMemory& m) {
  int lane = thread_index() % kWarp;
  for (int i = thread_index() / kWarp; i < shape.S * se.R; i += block_threads() / kWarp) {
    int s = i / se.R, r = i % se.R;
    float sum = 0;
    for (int c = lane; c < shape.C; c += kWarp) {
      sum += m.squeeze[s * shape.C + c] * load_element(se.weights.fc1_weight, r, c, s);
    }
    sum = sum_of_lanes(sum, kWarp) + load_element(se.weights.fc1_bias, r, 0, s);
    if (lane == 0) m.hidden[i] = sum < 0 ? 0 : sum;
  }
}

// gate = sigmoid(fc2 hidden), of one channel.
PSA_DEVICE float gate_of(const SEArgs& se, const SEMemory& m, int s, int c) {
  float pre2 = load_element(se.weights.fc2_bias, c, 0, s);
  for (int r = 0; r < se.R; ++r) {
    pre2 += m.hidden[s * se.R + r] * load_element(se.weights.fc2_weight, c, r, s);
  }
  return 1 / (1 + exponential(-pre2));
}

// Fills m.attention. total(i) returns sample b's sum i of S * C. `publish`: also write squeeze and
// attention to global memory. Ends with a barrier.
template <class Total>
PSA_DEVICE void se_forward(const SEArgs& se, const Shape& shape, int64_t b, const SEMemory& m,
                           bool publish, Total total) {
  int SC = shape.S * shape.C;
  int64_t sample = b * SC;
  for (int i = thread_index(); i < SC; i += block_threads()) {
    float mean = total(i) / float(shape.HW);
    m.squeeze[i] = mean;
    if (publish) se.squeeze[sample + i] = mean;
  }
  sync_block();
  compute_hidden(se, shape, m);
  sync_block();
  for (int i = thread_index(); i < SC; i += block_threads()) {
    int s = divide(i, shape.channels);
    // The gate is in (0, 1): the softmax needs no maximum subtracted.
    m.exp_gate[i] = exponential(gate_of(se, m, s, i - s * shape.C));
  }
  sync_block();
  for (int i = thread_index(); i < SC; i += block_threads()) {
    int c = i - divide(i, shape.channels) * shape.C;
    float sum = 0;
    for (int s = 0; s < shape.S; ++s) sum += m.exp_gate[s * shape.C + c];
    float attention = m.exp_gate[i] / sum;
    m.attention[i] = attention;
    if (publish) se.attention[sample + i] = attention;
  }
  sync_block();
}

// Fills m.grad_mean, m.hidden, m.grad_pre1 and m.grad_pre2. total(i) returns sample b's sum i of
// S * C. Reads the forward's squeeze and attention from global memory. Ends with a barrier.
template <class Total>
PSA_DEVICE void se_backward(const SEArgs& se, const Shape& shape, int64_t b, const SEMemory& m,
                            Total total) {
  int SC = shape.S * shape.C, lane = thread_index() % kWarp;
  const float* attention = se.attention + b * SC;
  for (int i = thread_index(); i < SC; i += block_threads()) {
    m.grad_attention[i] = total(i);
    m.squeeze[i] = se.squeeze[b * SC + i];
  }
  sync_block();
  compute_hidden(se, shape, m);
  sync_block();
  for (int i = thread_index(); i < SC; i += block_threads()) {
    int s = divide(i, shape.channels), c = i - s * shape.C;
    float mean = 0;
    for (int j = c; j < SC; j += shape.C) mean += m.grad_attention[j] * attention[j];
    float gate = gate_of(se, m, s, c);
    m.grad_pre2[i] = attention[i] * (m.grad_attention[i] - mean) * gate * (1 - gate);
  }
  sync_block();
  for (int i = thread_index() / kWarp; i < shape.S * se.R; i += block_threads() / kWarp) {
    int s = i / se.R, r = i % se.R;
    float sum = 0;
    for (int c = lane; c < shape.C; c += kWarp) {
      sum += m.grad_pre2[s * shape.C + c] * load_element(se.weights.fc2_weight, c, r, s);
    }
    sum = sum_of_lanes(sum, kWarp);
    if (lane == 0) m.grad_pre1[i] = m.hidden[i] <= 0 ? 0 : sum;
  }
  sync_block();
  for (int i = thread_index(); i < SC; i += block_threads()) {
    int s = divide(i, shape.channels), c = i - s * shape.C;
    float sum = 0;
    for (int r = 0; r < se.R; ++r) {
      sum += m.grad_pre1[s * se.R + r] * load_element(se.weights.fc1_weight, r, c, s);
    }
    m.grad_mean[i] = sum / float(shape.HW);
  }
  sync_block();
}

// Writes the inputs of fc_grad for sample b to global memory, if the fc gradients are requested.
PSA_DEVICE void publish_se_grads(const SEArgs& se, const Shape& shape, int64_t b,
                                 const SEMemory& m) {
  if (!se.hidden) return;
  int SC = shape.S * shape.C, SR = shape.S * se.R;
  for (int i = thread_index(); i < SC; i += block_threads()) {
    se.grad_pre2[b * SC + i] = m.grad_pre2[i];
  }
  for (int i = thread_index(); i < SR; i += block_threads()) {
    se.hidden[b * SR + i] = m.hidden[i];
    se.grad_pre1[b * SR + i] = m.grad_pre1[i];
  }
}

// Sample b's sum i of S * C: the sums of its splits, added in order.
PSA_DEVICE float sum_of_splits(const SEArgs& se, int SC, int64_t b, int i) {
  const float* sums = se.sums + b * se.splits * SC + i;
  float total = 0;
  for (int split = 0; split < se.splits; ++split) total += sums[int64_t(split) * SC];
  return total;
}

// The results for one sample: (S, C) each.
struct SEResult {
  const float *attention, *grad_mean;  // grad_mean: backward only
};

// Computes the SE module of sample b in `shared`, of se_floats floats.
template <bool kBackward, class Args, class Total>
PSA_DEVICE SEResult se_of_sample(const Args& args, int64_t b, float* shared, bool publish,
                                 Total total) {
  const SEArgs& se = args.se;
  const Shape& shape = args.shape;
  SEMemory m = se_memory(shared, shape, se.R, kBackward);
  if constexpr (kBackward) {
    se_backward(se, shape, b, m, total);
    if (publish) publish_se_grads(se, shape, b, m);
    return {se.attention + b * shape.S * shape.C, m.grad_mean};
  } else {
    se_forward(se, shape, b, m, publish, total);
    return {m.attention, nullptr};
  }
}

}  // namespace psa::cuda
