// The gradients of the fc tensors: sums over all B * S rows.
#include "device.cuh"

namespace psa::cuda {
namespace {

constexpr int kRowsAtOnce = 32;  // one warp for each row

// A block computes the gradients of 32 channels and one hidden unit of a module.
PSA_KERNEL(kWarp* kRowsAtOnce, 1)
fc_grad(PSA_PARAM(FcGradArgs) args) {
  int tiles = (args.C + kWarp - 1) / kWarp;
  int tile = int(block_index() % tiles), unit = int(block_index() / tiles);
  int r = unit % args.R, module = unit / args.R;
  int lane = thread_index() % kWarp, warp = thread_index() / kWarp, c = tile * kWarp + lane;
  int valid_c = c < args.C ? c : 0;  // lanes beyond C read channel 0 and write nothing
  float fc1_weight = 0, fc1_bias = 0, fc2_weight = 0, fc2_bias = 0;
#pragma unroll 4
  for (int64_t row = module + int64_t(warp) * args.modules; row < args.rows;
       row += int64_t(kRowsAtOnce) * args.modules) {
    float grad_pre1 = args.grad_pre1[row * args.R + r],
          grad_pre2 = args.grad_pre2[row * args.C + valid_c];
    fc1_weight += grad_pre1 * args.squeeze[row * args.C + valid_c];
    fc1_bias += grad_pre1;
    fc2_weight += grad_pre2 * args.hidden[row * args.R + r];
    fc2_bias += grad_pre2;
  }
  // Four warps, one for each gradient, add the sums of all warps in a fixed order.
  float* sums = reinterpret_cast<float*>(shared_memory());  // (4, warps, lanes)
  constexpr int kSums = kWarp * kRowsAtOnce;                // of one gradient
  sums[thread_index()] = fc1_weight;
  sums[kSums + thread_index()] = fc1_bias;
  sums[2 * kSums + thread_index()] = fc2_weight;
  sums[3 * kSums + thread_index()] = fc2_bias;
  sync_block();
  if (warp >= 4 || c >= args.C) return;
  float sum = 0;
  for (int i = 0; i < kRowsAtOnce; ++i) sum += sums[warp * kSums + i * kWarp + lane];
  // Blocks of the same r or c compute the same bias gradient; the first of them writes it.
  if (warp == 0) store_element(args.fc1_weight, r, c, sum, module);
  if (warp == 1 && c == 0) store_element(args.fc1_bias, r, 0, sum, module);
  if (warp == 2) store_element(args.fc2_weight, c, r, sum, module);
  if (warp == 3 && r == 0) store_element(args.fc2_bias, c, 0, sum, module);
}

}  // namespace

void launch_fc_grad(const FcGradArgs& args, void* stream) {
  int64_t tiles = (args.C + kWarp - 1) / kWarp;
  launch(fc_grad, "fc_grad", tiles * args.R * args.modules, kWarp * kRowsAtOnce, 1,
         4 * kWarp * kRowsAtOnce * int64_t(sizeof(float)), stream, args);
}

}  // namespace psa::cuda
