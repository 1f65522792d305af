// The small network of one sample, by one block: from its sums to the attention, and from the sums
// of part * grad to what each pixel gets back through the mean. The SE has R hidden units.
//
// All arrays are (S, C) or (S, R), in shared or in global memory: the barriers order both.
#pragma once

#include "device.cuh"

namespace psa::cuda {

// Where a block keeps the gate's numbers. Forward: attention may be the same memory as squeeze.
struct GateMemory {
  float *squeeze, *attention, *exponential;  // (S, C)
  float *total, *grad_pre2;                  // (S, C), backward; total becomes the spread
  float *hidden, *grad_pre1;                 // (S, R)
};

// The numbers that the memory below takes.
PSA_HOST_DEVICE int64_t gate_floats(const Shape& n, int R, bool backward) {
  int64_t SC = int64_t(n.S) * n.C, SR = int64_t(n.S) * R;
  return backward ? 3 * SC + 2 * SR : 2 * SC + SR;
}

PSA_DEVICE GateMemory gate_memory(float* shared, const Shape& n, int R, bool backward) {
  int SC = n.S * n.C;
  GateMemory m = {};
  m.squeeze = m.attention = shared;
  m.exponential = m.total = shared + SC;
  m.grad_pre2 = shared + 2 * SC;
  m.hidden = shared + (backward ? 3 : 2) * SC;
  m.grad_pre1 = m.hidden + n.S * R;
  return m;
}

// hidden = relu(fc1 squeeze), a warp for each unit. A NaN passes, as in PyTorch's relu.
PSA_DEVICE void hidden_units(const Gate& gate, const Shape& n, const GateMemory& m) {
  int lane = thread_index() % kWarp;
  for (int i = thread_index() / kWarp; i < n.S * gate.R; i += block_threads() / kWarp) {
    int s = i / gate.R, r = i % gate.R;
    float sum = 0;
    for (int c = lane; c < n.C; c += kWarp) {
      sum += m.squeeze[s * n.C + c] * load_element(gate.se.fc1_weight, r, c);
    }
    sum = sum_of_lanes(sum, kWarp) + load_element(gate.se.fc1_bias, r, 0);
    if (lane == 0) m.hidden[i] = sum < 0 ? 0 : sum;
  }
}

// sigmoid(fc2 hidden).
PSA_DEVICE float gate_of(const Gate& gate, const GateMemory& m, int s, int c) {
  float pre = load_element(gate.se.fc2_bias, c, 0);
  for (int r = 0; r < gate.R; ++r) {
    pre += m.hidden[s * gate.R + r] * load_element(gate.se.fc2_weight, c, r);
  }
  return 1 / (1 + exponential(-pre));
}

// Fills m.attention. total(i) is sample b's sum i of S * C. `publish`: squeeze and attention go to
// global memory as well. Ends with a barrier.
template <class Total>
PSA_DEVICE void forward_gate(const Gate& gate, const Shape& n, int64_t b, const GateMemory& m,
                             bool publish, Total total) {
  int SC = n.S * n.C;
  int64_t sample = b * SC;
  for (int i = thread_index(); i < SC; i += block_threads()) {
    float mean = total(i) / float(n.HW);
    m.squeeze[i] = mean;
    if (publish) gate.squeeze[sample + i] = mean;
  }
  sync_block();
  hidden_units(gate, n, m);
  sync_block();
  for (int i = thread_index(); i < SC; i += block_threads()) {
    int s = divide(i, n.channels);
    // The gate is in (0, 1): its exponential needs no maximum subtracted.
    m.exponential[i] = exponential(gate_of(gate, m, s, i - s * n.C));
  }
  sync_block();
  for (int i = thread_index(); i < SC; i += block_threads()) {
    int c = i - divide(i, n.channels) * n.C;
    float sum = 0;
    for (int s = 0; s < n.S; ++s) sum += m.exponential[s * n.C + c];
    float attention = m.exponential[i] / sum;
    m.attention[i] = attention;
    if (publish) gate.attention[sample + i] = attention;
  }
  sync_block();
}

// Turns m.total into the spread, and fills m.hidden and both grad_pre. The attention is the
// forward's, in global memory. Ends with a barrier.
template <class Total>
PSA_DEVICE void backward_gate(const Gate& gate, const Shape& n, int64_t b, const GateMemory& m,
                              Total total) {
  int SC = n.S * n.C, lane = thread_index() % kWarp;
  const float* attention = gate.attention + b * SC;
  for (int i = thread_index(); i < SC; i += block_threads()) {
    m.total[i] = total(i);
    m.squeeze[i] = gate.squeeze[b * SC + i];
  }
  sync_block();
  hidden_units(gate, n, m);
  sync_block();
  for (int i = thread_index(); i < SC; i += block_threads()) {
    int s = divide(i, n.channels), c = i - s * n.C;
    float mean = 0;
    for (int j = c; j < SC; j += n.C) mean += m.total[j] * attention[j];
    float y = gate_of(gate, m, s, c);
    m.grad_pre2[i] = attention[i] * (m.total[i] - mean) * y * (1 - y);
  }
  sync_block();
  for (int i = thread_index() / kWarp; i < n.S * gate.R; i += block_threads() / kWarp) {
    int s = i / gate.R, r = i % gate.R;
    float sum = 0;
    for (int c = lane; c < n.C; c += kWarp) {
      sum += m.grad_pre2[s * n.C + c] * load_element(gate.se.fc2_weight, c, r);
    }
    sum = sum_of_lanes(sum, kWarp);
    if (lane == 0) m.grad_pre1[i] = m.hidden[i] <= 0 ? 0 : sum;
  }
  sync_block();
  for (int i = thread_index(); i < SC; i += block_threads()) {
    int s = divide(i, n.channels), c = i - s * n.C;
    float sum = 0;
    for (int r = 0; r < gate.R; ++r) {
      sum += m.grad_pre1[s * gate.R + r] * load_element(gate.se.fc1_weight, r, c);
    }
    m.total[i] = sum / float(n.HW);
  }
  sync_block();
}

// What fc's gradients are made of, for sample b; nothing where they aren't asked for.
PSA_DEVICE void publish_gate_grads(const Gate& gate, const Shape& n, int64_t b,
                                   const GateMemory& m) {
  if (!gate.hidden) return;
  int SC = n.S * n.C, SR = n.S * gate.R;
  for (int i = thread_index(); i < SC; i += block_threads()) {
    gate.grad_pre2[b * SC + i] = m.grad_pre2[i];
  }
  for (int i = thread_index(); i < SR; i += block_threads()) {
    gate.hidden[b * SR + i] = m.hidden[i];
    gate.grad_pre1[b * SR + i] = m.grad_pre1[i];
  }
}

// Sample b's sum i of S * C, its splits added in order.
PSA_DEVICE float sum_of_splits(const Gate& gate, int SC, int64_t b, int i) {
  const float* sums = gate.sums + b * gate.splits * SC + i;
  float total = 0;
  for (int split = 0; split < gate.splits; ++split) total += sums[int64_t(split) * SC];
  return total;
}

// The gate's results for one sample: (S, C) each.
struct Recalibration {
  const float *attention, *spread;  // spread: backward
};

// The gate of sample b by this block, in shared memory of gate_floats.
template <bool kBackward, class Params, class Total>
PSA_DEVICE Recalibration gate_of_sample(const Params& p, int64_t b, float* shared, bool publish,
                                        Total total) {
  const Gate& gate = p.gate;
  const Shape& n = p.shape;
  GateMemory m = gate_memory(shared, n, gate.R, kBackward);
  if constexpr (kBackward) {
    backward_gate(gate, n, b, m, total);
    if (publish) publish_gate_grads(gate, n, b, m);
    return {gate.attention + b * n.S * n.C, m.total};
  } else {
    forward_gate(gate, n, b, m, publish, total);
    return {m.attention, nullptr};
  }
}

}  // namespace psa::cuda
