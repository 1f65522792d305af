// Everything of a sample by one cluster of blocks, which holds it in shared memory: each element is
// read once and written once.
//
// A block of the cluster has a piece of each branch's C * HW elements (backward: of the gradient's
// as well). Its threads add up each part of the piece as it arrives; the blocks read each other's
// sums; each computes the sample's whole gate; each recalibrates its piece.
#include "affine.cuh"
#include "columns.cuh"

namespace psa::cuda {
namespace {

// The block's shared memory.
template <class T>
struct Memory {
  Barrier* barriers;  // one for each branch (and its gradient), and one for columns of the cat
  T* parts;           // (S, piece)
  T* cat;             // backward: (S, piece) in the order of the branches; columns: (pixels, S * C)
  float* sums;        // (S, C) over this block's pixels
  float* gate;        // see gate_memory
  float* more;        // tables of runs, or sum_columns_of's memory
  int64_t bytes;

  PSA_HOST_DEVICE Memory(const OnePass& p, unsigned char* start, bool backward, bool columns) {
    int64_t piece = int64_t(p.shape.S) * p.piece * int64_t(sizeof(T));
    int64_t SC = int64_t(p.shape.S) * p.shape.C;
    int64_t at = (p.shape.S + 1) * int64_t(sizeof(Barrier));
    barriers = reinterpret_cast<Barrier*>(start);
    at = (at + 127) / 128 * 128;
    parts = reinterpret_cast<T*>(start + at);
    at += piece;
    cat = reinterpret_cast<T*>(start + at);
    at += backward ? piece : 0;
    sums = reinterpret_cast<float*>(start + at);
    at += SC * int64_t(sizeof(float));
    gate = reinterpret_cast<float*>(start + at);
    at += gate_floats(p.shape, p.gate.R, backward) * int64_t(sizeof(float));
    more = reinterpret_cast<float*>(start + at);
    at += (columns ? column_sum_floats(p.tile, p.tile_pixels, kVec<T>) : 2 * SC) *
          int64_t(sizeof(float));
    bytes = at;
  }
};

#ifdef PSA_HAS_CLUSTERS

// The piece: elements [begin, end) of each part's sample.
struct Piece {
  int64_t b;
  int begin, end;
};

template <class T>
PSA_DEVICE const T* sample(const Strided& t, int64_t b) {
  return static_cast<const T*>(t.data) + b * t.batch;
}

// One thread starts all copies. What is too small to have a part for this block counts no bytes.
template <class T, bool kBackward, bool kColumns>
PSA_DEVICE void start_copies(const OnePass& p, const Piece& piece, const Memory<T>& m) {
  const Shape& n = p.shape;
  for (int s = 0; s <= n.S; ++s) barrier_init(m.barriers + s);
  fence_barriers();
  uint32_t bytes = uint32_t(piece.end - piece.begin) * uint32_t(sizeof(T));
  for (int s = 0; s < n.S; ++s) {
    Barrier* barrier = m.barriers + s;
    constexpr bool kWithCat = kBackward && !kColumns;
    barrier_expect(barrier, kWithCat ? 2 * bytes : bytes);
    if (bytes == 0) continue;
    int64_t to = int64_t(s) * p.piece;
    bulk_copy(m.parts + to, sample<T>(p.parts[s], piece.b) + piece.begin, bytes, barrier);
    if constexpr (kWithCat) {
      int64_t from = int64_t(n.S - 1 - s) * n.run + piece.begin;
      bulk_copy(m.cat + to, sample<T>(p.cat, piece.b) + from, bytes, barrier);
    }
  }
  if constexpr (kBackward && kColumns) {
    Barrier* barrier = m.barriers + n.S;
    barrier_expect(barrier, bytes * uint32_t(n.S));
    int64_t from = int64_t(piece.begin) * n.S;
    if (bytes) bulk_copy(m.cat, sample<T>(p.cat, piece.b) + from, bytes * n.S, barrier);
  }
}

// Sums over pixels of runs: neighbouring lanes share a row of pixels, as far as it is in the piece.
template <class T, bool kBackward>
PSA_DEVICE void sum_runs(const OnePass& p, const Piece& piece, const Memory<T>& m) {
  const Shape& n = p.shape;
  int size = piece.end - piece.begin, HW = int(n.HW);
  int first = divide(piece.begin, n.pixels);
  int rows = size ? divide(piece.end - 1, n.pixels) - first + 1 : 0;  // of each branch
  int windows = (HW + kVec<T> - 1) / kVec<T>, lanes = 1;
  while (lanes < windows && lanes < kWarp) lanes *= 2;
  int lane = thread_index() % lanes, groups = kThreads / lanes;
  for (int base = 0; base < n.S * rows; base += groups) {
    int i = base + thread_index() / lanes;
    float sum = 0;
    int s = i / rows, c = first + i - s * rows;
    if (i < n.S * rows) {
      int low = c * HW - piece.begin, high = low + HW;
      low = low < 0 ? 0 : low;
      high = high < size ? high : size;
      barrier_wait(m.barriers + s);
      const T *x = m.parts + int64_t(s) * p.piece, *g = m.cat + int64_t(s) * p.piece;
      for (int e = (low / kVec<T> + lane) * kVec<T>; e < high; e += lanes * kVec<T>) {
        Vec in_x = load_shared(x + e), in_g = kBackward ? load_shared(g + e) : in_x;
        sum += sum_of_elements<T, kBackward>(in_x, in_g, low - e, high - e);
      }
    }
    sum = sum_of_lanes(sum, lanes);
    if (lane == 0 && i < n.S * rows) m.sums[s * n.C + c] = sum;
  }
}

// Sums over pixels of columns.
template <class T, bool kBackward>
PSA_DEVICE void sum_columns(const OnePass& p, const Piece& piece, const Memory<T>& m) {
  constexpr int kSize = kVec<T>;
  const Shape& n = p.shape;
  int SC = n.S * n.C, pixels = (piece.end - piece.begin) / n.C;
  for (int first = 0; first * kSize < SC; first += p.tile) {
    Column<kSize> column(n, first, p.tile, p.tile_pixels, false);
    float sum[kSize] = {};
    if (column.active) {
      barrier_wait(m.barriers + column.s);
      if (kBackward) barrier_wait(m.barriers + n.S);
      const T* x = m.parts + int64_t(column.s) * p.piece + column.c;
      for (int pixel = column.pixel; pixel < pixels; pixel += p.tile_pixels) {
        float a[kSize], g[kSize];
        unpack<T>(load_shared(x + pixel * n.C), a);
        if (kBackward) unpack<T>(load_shared(m.cat + pixel * SC + column.k), g);
#pragma unroll
        for (int j = 0; j < kSize; ++j) sum[j] += kBackward ? a[j] * g[j] : a[j];
      }
    }
    sum_columns_of(column, sum, p.tile, p.tile_pixels, m.more, [&](int i, float total) {
      int k = first * kSize + i, place = divide(k, n.channels);
      if (k < SC) m.sums[(n.S - 1 - place) * n.C + k - place * n.C] = total;
    });
    sync_block();  // before the next tile takes the same memory
  }
}

template <class T, bool kBackward>
PSA_DEVICE void write_runs(const OnePass& p, const Piece& piece, const Memory<T>& m,
                           const Tables& tables) {
  const Shape& n = p.shape;
  for (int s = 0; s < n.S; ++s) {
    const Strided& to = kBackward ? p.grads[s] : p.cat;
    if (!to.data) continue;  // no gradient asked for
    T* out = static_cast<T*>(to.data) + piece.b * to.batch + piece.begin;
    if (!kBackward) out += int64_t(n.S - 1 - s) * n.run;
    const T* in = (kBackward ? m.cat : m.parts) + int64_t(s) * p.piece;
    int size = piece.end - piece.begin;
#pragma unroll 4
    for (int e = thread_index() * kVec<T>; e < size; e += kThreads * kVec<T>) {
      Vec v = load_shared(in + e);
      store_global(out + e, recalibrated_window<T>(v, piece.begin + e, s, n, tables, p.floor));
    }
  }
}

template <class T, bool kBackward>
PSA_DEVICE void write_columns(const OnePass& p, const Piece& piece, const Memory<T>& m,
                              const Recalibration& gate) {
  constexpr int kSize = kVec<T>;
  const Shape& n = p.shape;
  int SC = n.S * n.C, pixels = (piece.end - piece.begin) / n.C;
  for (int first = 0; first * kSize < SC; first += p.tile) {
    Column<kSize> column(n, first, p.tile, p.tile_pixels, false);
    if (!column.active) continue;
    const Strided& to = kBackward ? p.grads[column.s] : p.cat;
    if (!to.data) continue;  // no gradient asked for
    Affine y[kSize];
#pragma unroll
    for (int j = 0; j < kSize; ++j) y[j] = affine_of<kBackward>(p, gate, column.s, column.c + j);
    int in_width = kBackward ? SC : n.C, out_width = kBackward ? n.C : SC;
    const T* in = kBackward ? m.cat + column.k : m.parts + int64_t(column.s) * p.piece + column.c;
    T* out = static_cast<T*>(to.data) + piece.b * to.batch + (kBackward ? column.c : column.k);
    out += int64_t(piece.begin / n.C) * out_width;
#pragma unroll 4
    for (int pixel = column.pixel; pixel < pixels; pixel += p.tile_pixels) {
      float x[kSize];
      unpack<T>(load_shared(in + pixel * in_width), x);
#pragma unroll
      for (int j = 0; j < kSize; ++j) x[j] = recalibrated(x[j], y[j].factor, y[j].addend, p.floor);
      store_global(out + int64_t(pixel) * out_width, pack<T>(x));
    }
  }
}

#endif  // PSA_HAS_CLUSTERS

template <class T, bool kBackward, bool kColumns>
PSA_KERNEL(kThreads, 4)
one_pass(PSA_PARAM(OnePass) p) {
#ifdef PSA_HAS_CLUSTERS
  const Shape& n = p.shape;
  Memory<T> m(p, shared_memory(), kBackward, kColumns);
  int size = n.C * int(n.HW), begin = cluster_rank() * p.piece, end = begin + p.piece;
  Piece piece = {block_index() / p.cluster, begin < size ? begin : size, end < size ? end : size};

  for (int i = thread_index(); i < n.S * n.C; i += kThreads) m.sums[i] = 0;
  if (thread_index() == 0) start_copies<T, kBackward, kColumns>(p, piece, m);
  sync_block();  // the barriers exist, and the sums of rows that are elsewhere are zero
  if constexpr (kColumns) {
    sum_columns<T, kBackward>(p, piece, m);
  } else {
    sum_runs<T, kBackward>(p, piece, m);
  }

  cluster_arrive();
  cluster_wait();  // all blocks' sums are there
  Recalibration gate =
      gate_of_sample<kBackward>(p, piece.b, m.gate, cluster_rank() == 0, [&](int i) {
        float total = 0;
        for (int rank = 0; rank < p.cluster; ++rank) total += load_remote(m.sums + i, rank);
        return total;
      });
  cluster_arrive();  // this block has read the others' sums
  if constexpr (kColumns) {
    write_columns<T, kBackward>(p, piece, m, gate);
  } else {
    write_runs<T, kBackward>(p, piece, m, make_tables<kBackward>(p, gate, m.more));
  }
  cluster_wait();  // no block ends while others may read its sums
#endif
}

template <class T, bool kBackward>
void launch_one_pass_of(const OnePass& p, Layout layout, void* stream) {
  bool columns = layout == Layout::columns;
  int64_t shared = Memory<T>(p, nullptr, kBackward, columns).bytes, grid = p.shape.B * p.cluster;
  auto kernel = columns ? one_pass<T, kBackward, true> : one_pass<T, kBackward, false>;
  launch(kernel, "one_pass", grid, kThreads, p.cluster, shared, stream, p);
}

}  // namespace

int64_t one_pass_shared_bytes(const OnePass& p, Dtype dtype, Layout layout, bool backward) {
  int64_t bytes = 0;
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    bytes = Memory<T>(p, nullptr, backward, layout == Layout::columns).bytes;
  });
  return bytes;
}

void launch_one_pass(const OnePass& p, Dtype dtype, Layout layout, bool backward, void* stream) {
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    if (backward) {
      launch_one_pass_of<T, true>(p, layout, stream);
    } else {
      launch_one_pass_of<T, false>(p, layout, stream);
    }
  });
}

}  // namespace psa::cuda
