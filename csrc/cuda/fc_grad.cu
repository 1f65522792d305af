// The gradients of the small network's weights: products summed over all B * S rows.
#include "device.cuh"

namespace psa::cuda {
namespace {

constexpr int kRowsAtOnce = 32;  // a warp has 32 channels of one row

// A block has 32 channels of one hidden unit.
PSA_KERNEL(kWarp* kRowsAtOnce, 1)
fc_grad(PSA_PARAM(FcGrad) p) {
  int tiles = (p.C + kWarp - 1) / kWarp;
  int tile = int(block_index() % tiles), r = int(block_index() / tiles);
  int lane = thread_index() % kWarp, warp = thread_index() / kWarp, c = tile * kWarp + lane;
  int in_C = c < p.C ? c : 0;  // a channel to read where there is none: its sums go nowhere
  float fc1_weight = 0, fc1_bias = 0, fc2_weight = 0, fc2_bias = 0;
#pragma unroll 4
  for (int64_t row = warp; row < p.rows; row += kRowsAtOnce) {
    float pre1 = p.grad_pre1[row * p.R + r], pre2 = p.grad_pre2[row * p.C + in_C];
    fc1_weight += pre1 * p.squeeze[row * p.C + in_C];
    fc1_bias += pre1;
    fc2_weight += pre2 * p.hidden[row * p.R + r];
    fc2_bias += pre2;
  }
  // The warps' sums are added in order, all four gradients at a time.
  float* sums = reinterpret_cast<float*>(shared_memory());  // (4, warps, lanes)
  constexpr int kOne = kWarp * kRowsAtOnce;
  sums[thread_index()] = fc1_weight;
  sums[kOne + thread_index()] = fc1_bias;
  sums[2 * kOne + thread_index()] = fc2_weight;
  sums[3 * kOne + thread_index()] = fc2_bias;
  sync_block();
  if (warp >= 4 || c >= p.C) return;
  float sum = 0;
  for (int i = 0; i < kRowsAtOnce; ++i) sum += sums[warp * kOne + i * kWarp + lane];
  // Blocks that share r or c computed the same bias gradient; the first of them writes it.
  if (warp == 0) store_element(p.fc1_weight, r, c, sum);
  if (warp == 1 && c == 0) store_element(p.fc1_bias, r, 0, sum);
  if (warp == 2) store_element(p.fc2_weight, c, r, sum);
  if (warp == 3 && r == 0) store_element(p.fc2_bias, c, 0, sum);
}

}  // namespace

void launch_fc_grad(const FcGrad& p, void* stream) {
  int64_t tiles = (p.C + kWarp - 1) / kWarp;
  launch(fc_grad, "fc_grad", tiles * p.R, kWarp * kRowsAtOnce, 1,
         4 * kWarp * kRowsAtOnce * int64_t(sizeof(float)), stream, p);
}

}  // namespace psa::cuda
