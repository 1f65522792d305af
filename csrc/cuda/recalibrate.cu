// The second of the two passes: every block computes its sample's gate from the sums, then scales
// and concatenates in reverse (forward), or splits, scales and spreads (backward).
#include "affine.cuh"
#include "columns.cuh"

namespace psa::cuda {
namespace {

// The gate's results, computed here unless a gate kernel did so. `publish`: for one block a sample.
template <bool kBackward>
PSA_DEVICE Recalibration gate_or_done(const Recalibrate& p, int64_t b, bool publish) {
  const Gate& gate = p.gate;
  int SC = p.shape.S * p.shape.C;
  if (gate.done) return {gate.attention + b * SC, kBackward ? gate.spread + b * SC : nullptr};
  return gate_of_sample<kBackward>(p, b, reinterpret_cast<float*>(shared_memory()), publish,
                                   [&](int i) { return sum_of_splits(gate, SC, b, i); });
}

template <class T, bool kBackward>
PSA_KERNEL(kThreads, 3)
recalibrate_runs(PSA_PARAM(Recalibrate) p) {
  const Shape& n = p.shape;
  int64_t block = block_count() - 1 - block_index(), b = block / p.blocks;
  int rest = int(block % p.blocks), groups = (n.S + p.branches - 1) / p.branches;
  int s_begin = rest % groups * p.branches, begin = rest / groups * p.share;
  int s_end = s_begin + p.branches < n.S ? s_begin + p.branches : n.S;

  Recalibration gate = gate_or_done<kBackward>(p, b, rest == 0);
  float* shared = reinterpret_cast<float*>(shared_memory());
  Tables tables = make_tables<kBackward>(p, gate, shared + gate_floats(n, p.gate.R, kBackward));

  for (int s = s_begin; s < s_end; ++s) {
    const Strided& part = p.parts[s];
    if (!part.data) continue;  // no gradient asked for
    Run<T> in_part = {static_cast<T*>(part.data) + b * part.batch, n.run};
    Run<T> in_cat = {static_cast<T*>(p.cat.data) + b * p.cat.batch, n.run};
    in_cat.data += int64_t(n.S - 1 - s) * n.run;
    Run<T> to = kBackward ? in_part : in_cat;
    Run<const T> from = {kBackward ? in_cat.data : in_part.data, n.run};

    // Windows are aligned where they are written; a thread has all of its at once.
    constexpr int kStep = kThreads * kVec<T>;
    int skew = misaligned(to.data), end = (begin + p.share) * kVec<T> - skew;
    if (end > n.run) end = n.run;
    int i = (begin + thread_index()) * kVec<T> - skew;
    Vec x[kFlight];
#pragma unroll
    for (int u = 0; u < kFlight; ++u) {
      int high = i + u * kStep < end ? n.run : 0;
      x[u] = load_wide<Read::last>(window_of(from, i + u * kStep, 0, high));
    }
#pragma unroll
    for (int u = 0; u < kFlight; ++u, i += kStep) {
      if (i >= end) break;
      load_narrow(window_of(from, i, 0, n.run), x[u]);
      Vec y = recalibrated_window<T>(x[u], i, s, n, tables, p.floor);
      store_window(window_of(to, i, 0, n.run), y);
    }
  }
}

template <class T, bool kWide, bool kBackward>
PSA_KERNEL(kThreads, 3)
recalibrate_columns(PSA_PARAM(Recalibrate) p) {
  constexpr int kSize = kChannels<T, kWide>;
  const Shape& n = p.shape;
  int64_t block = block_count() - 1 - block_index(), b = block / p.blocks;
  int64_t rest = block % p.blocks;
  int units = n.S * n.C / kSize, tiles = (units + p.tile - 1) / p.tile;
  int64_t begin = rest / tiles * p.block_pixels;
  int64_t end = begin + p.block_pixels < n.HW ? begin + p.block_pixels : n.HW;

  Recalibration gate = gate_or_done<kBackward>(p, b, rest == 0);
  Column<kSize> column(n, int(rest % tiles) * p.tile, p.tile, p.tile_pixels, p.pixels_inner);
  if (!column.active) return;
  const Strided& part = p.parts[column.s];
  if (!part.data) return;  // no gradient asked for
  Affine y[kSize];
#pragma unroll
  for (int j = 0; j < kSize; ++j) y[j] = affine_of<kBackward>(p, gate, column.s, column.c + j);

  T* in_part = static_cast<T*>(part.data) + b * part.batch + column.c * part.channel;
  T* in_cat = static_cast<T*>(p.cat.data) + b * p.cat.batch + column.k * p.cat.channel;
  const T* from = kBackward ? in_cat : in_part;
  T* to = kBackward ? in_part : in_cat;
  int64_t from_pixel = kBackward ? p.cat.pixel : part.pixel;
  int64_t to_pixel = kBackward ? part.pixel : p.cat.pixel;
  for (int64_t q = begin + column.pixel; q < end; q += kFlight * p.tile_pixels) {
    Raw<T, kWide> in[kFlight];
#pragma unroll
    for (int u = 0; u < kFlight; ++u) {
      int64_t pixel = q + u * p.tile_pixels;
      if (pixel >= end) break;
      in[u] = load_raw<kWide, Read::last>(from + pixel * from_pixel);
    }
#pragma unroll
    for (int u = 0; u < kFlight; ++u) {
      int64_t pixel = q + u * p.tile_pixels;
      if (pixel >= end) break;
      float x[kSize];
      unpack_raw<T>(in[u], x);
#pragma unroll
      for (int j = 0; j < kSize; ++j) x[j] = recalibrated(x[j], y[j].factor, y[j].addend, p.floor);
      store_raw(to + pixel * to_pixel, x);
    }
  }
}

template <class T, bool kBackward>
void launch_recalibrate_of(const Recalibrate& p, Layout layout, void* stream) {
  int64_t grid = p.shape.B * p.blocks;
  int64_t shared = recalibrate_shared_bytes(p, layout, kBackward);
  if (layout == Layout::runs) {
    launch(recalibrate_runs<T, kBackward>, "recalibrate_runs", grid, kThreads, 1, shared, stream,
           p);
  } else if (layout == Layout::columns) {
    launch(recalibrate_columns<T, true, kBackward>, "recalibrate_columns", grid, kThreads, 1,
           shared, stream, p);
  } else {
    launch(recalibrate_columns<T, false, kBackward>, "recalibrate_columns", grid, kThreads, 1,
           shared, stream, p);
  }
}

template <bool kBackward>
PSA_KERNEL(kThreads, 3)
gate_alone(PSA_PARAM(GateAlone) p) {
  const Gate& gate = p.gate;
  const Shape& n = p.shape;
  int64_t b = block_index(), SC = int64_t(n.S) * n.C, SR = int64_t(n.S) * gate.R;
  GateMemory m = {};
  m.squeeze = gate.squeeze + b * SC;
  m.attention = gate.attention + b * SC;
  m.hidden = gate.hidden + b * SR;
  auto total = [&](int i) { return sum_of_splits(gate, int(SC), b, i); };
  if constexpr (kBackward) {
    m.total = gate.spread + b * SC;
    m.grad_pre1 = gate.grad_pre1 + b * SR;
    m.grad_pre2 = gate.grad_pre2 + b * SC;
    backward_gate(gate, n, b, m, total);
  } else {
    m.exponential = gate.exponential + b * SC;
    forward_gate(gate, n, b, m, false, total);
  }
}

}  // namespace

int64_t recalibrate_shared_bytes(const Recalibrate& p, Layout layout, bool backward) {
  const Shape& n = p.shape;
  if (p.gate.done) return 0;  // not of runs, whose tables must fit
  int64_t tables = layout == Layout::runs ? 2 * int64_t(n.S) * n.C : 0;
  return int64_t(sizeof(float)) * (gate_floats(n, p.gate.R, backward) + tables);
}

void launch_recalibrate(const Recalibrate& p, Dtype dtype, Layout layout, bool backward,
                        void* stream) {
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    if (backward) {
      launch_recalibrate_of<T, true>(p, layout, stream);
    } else {
      launch_recalibrate_of<T, false>(p, layout, stream);
    }
  });
}

void launch_gate(const GateAlone& p, bool backward, void* stream) {
  if (backward) {
    launch(gate_alone<true>, "gate_alone", p.shape.B, kThreads, 1, 0, stream, p);
  } else {
    launch(gate_alone<false>, "gate_alone", p.shape.B, kThreads, 1, 0, stream, p);
  }
}

}  // namespace psa::cuda
