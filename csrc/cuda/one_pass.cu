// The whole tail in one pass. A cluster of blocks holds one sample in shared memory, so that each
// element is read once and written once.
//
// Each block of the cluster takes a chunk of each branch's C * HW elements (backward: of the
// gradient too). It copies the chunk to shared memory and sums each branch as soon as its copy has
// completed. Then every block reads the sums of all blocks, computes the sample's SE module, and
// recalibrates its own chunk.
#include "affine.cuh"
#include "columns.cuh"

namespace psa::cuda {
namespace {

// The block's shared memory.
template <class T>
struct SharedMemory {
  Barrier* barriers;  // S for the branches (and concat's runs), 1 for concat's channels_last pixels
  T* branches;        // (S, chunk)
  T* concat;    // backward: (S, chunk) in the order of the branches; channels_last: (pixels, S * C)
  float* sums;  // (S, C) over this block's pixels
  float* se;    // see se_memory
  float* scratch;  // AffineTables, or for channels_last the memory of sum_columns_of
  int64_t bytes;

  PSA_HOST_DEVICE SharedMemory(const OnePassArgs& args, unsigned char* start, bool backward,
                               bool channels_last) {
    int64_t chunk_bytes = int64_t(args.shape.S) * args.chunk_size * int64_t(sizeof(T));
    int64_t SC = int64_t(args.shape.S) * args.shape.C;
    int64_t at = (args.shape.S + 1) * int64_t(sizeof(Barrier));
    barriers = reinterpret_cast<Barrier*>(start);
    at = (at + 127) / 128 * 128;
    branches = reinterpret_cast<T*>(start + at);
    at += chunk_bytes;
    concat = reinterpret_cast<T*>(start + at);
    at += backward ? chunk_bytes : 0;
    sums = reinterpret_cast<float*>(start + at);
    at += SC * int64_t(sizeof(float));
    se = reinterpret_cast<float*>(start + at);
    at += se_floats(args.shape, args.se.R, backward) * int64_t(sizeof(float));
    scratch = reinterpret_cast<float*>(start + at);
    at += (channels_last ? column_sum_floats(args.tile, args.tile_pixels, kVec<T>) : 2 * SC) *
          int64_t(sizeof(float));
    bytes = at;
  }
};

#ifdef PSA_HAS_CLUSTERS

// A block's chunk: elements [begin, end) of sample b of each branch.
struct Chunk {
  int64_t b;
  int begin, end;
};

template <class T>
PSA_DEVICE const T* sample(const Strided& t, int64_t b) {
  return static_cast<const T*>(t.data) + b * t.batch;
}

// One thread issues all copies. An empty chunk completes its barriers with zero bytes.
template <class T, bool kBackward, bool kChannelsLast>
PSA_DEVICE void issue_copies(const OnePassArgs& args, const Chunk& chunk,
                             const SharedMemory<T>& m) {
  const Shape& shape = args.shape;
  for (int s = 0; s <= shape.S; ++s) barrier_init(m.barriers + s);
  fence_barriers();
  uint32_t bytes = uint32_t(chunk.end - chunk.begin) * uint32_t(sizeof(T));
  for (int s = 0; s < shape.S; ++s) {
    Barrier* barrier = m.barriers + s;
    constexpr bool kWithConcat = kBackward && !kChannelsLast;
    barrier_expect(barrier, kWithConcat ? 2 * bytes : bytes);
    if (bytes == 0) continue;
    int64_t to = int64_t(s) * args.chunk_size;
    bulk_copy(m.branches + to, sample<T>(args.branches[s], chunk.b) + chunk.begin, bytes, barrier);
    if constexpr (kWithConcat) {
      int64_t from = int64_t(shape.S - 1 - s) * shape.run + chunk.begin;
      bulk_copy(m.concat + to, sample<T>(args.concat, chunk.b) + from, bytes, barrier);
    }
  }
  if constexpr (kBackward && kChannelsLast) {
    Barrier* barrier = m.barriers + shape.S;
    barrier_expect(barrier, bytes * uint32_t(shape.S));
    int64_t from = int64_t(chunk.begin) * shape.S;
    if (bytes)
      bulk_copy(m.concat, sample<T>(args.concat, chunk.b) + from, bytes * shape.S, barrier);
  }
}

// Sums over pixels of contiguous branches: a group of lanes sums the part of a row in the chunk.
template <class T, bool kBackward>
PSA_DEVICE void sum_runs(const OnePassArgs& args, const Chunk& chunk, const SharedMemory<T>& m) {
  const Shape& shape = args.shape;
  int size = chunk.end - chunk.begin, HW = int(shape.HW);
  int first = divide(chunk.begin, shape.pixels);
  int rows = size ? divide(chunk.end - 1, shape.pixels) - first + 1 : 0;  // of each branch
  int windows = (HW + kVec<T> - 1) / kVec<T>, lanes = 1;
  while (lanes < windows && lanes < kWarp) lanes *= 2;
  int lane = thread_index() % lanes, groups = kThreads / lanes;
  for (int base = 0; base < shape.S * rows; base += groups) {
    int i = base + thread_index() / lanes;
    float sum = 0;
    int s = i / rows, c = first + i - s * rows;
    if (i < shape.S * rows) {
      int low = c * HW - chunk.begin, high = low + HW;
      low = low < 0 ? 0 : low;
      high = high < size ? high : size;
      barrier_wait(m.barriers + s);
      const T *x = m.branches + int64_t(s) * args.chunk_size,
              *g = m.concat + int64_t(s) * args.chunk_size;
      for (int e = (low / kVec<T> + lane) * kVec<T>; e < high; e += lanes * kVec<T>) {
        Vec in_x = load_shared(x + e), in_g = kBackward ? load_shared(g + e) : in_x;
        sum += sum_of_elements<T, kBackward>(in_x, in_g, low - e, high - e);
      }
    }
    sum = sum_of_lanes(sum, lanes);
    if (lane == 0 && i < shape.S * rows) m.sums[s * shape.C + c] = sum;
  }
}

// Sums over pixels of channels_last branches.
template <class T, bool kBackward>
PSA_DEVICE void sum_columns(const OnePassArgs& args, const Chunk& chunk, const SharedMemory<T>& m) {
  constexpr int kSize = kVec<T>;
  const Shape& shape = args.shape;
  int SC = shape.S * shape.C, pixels = (chunk.end - chunk.begin) / shape.C;
  for (int first = 0; first * kSize < SC; first += args.tile) {
    Column<kSize> column(shape, first, args.tile, args.tile_pixels, false);
    float sum[kSize] = {};
    if (column.active) {
      barrier_wait(m.barriers + column.s);
      if (kBackward) barrier_wait(m.barriers + shape.S);
      const T* x = m.branches + int64_t(column.s) * args.chunk_size + column.c;
      for (int pixel = column.pixel; pixel < pixels; pixel += args.tile_pixels) {
        float a[kSize], g[kSize];
        unpack<T>(load_shared(x + pixel * shape.C), a);
        if (kBackward) unpack<T>(load_shared(m.concat + pixel * SC + column.k), g);
#pragma unroll
        for (int j = 0; j < kSize; ++j) sum[j] += kBackward ? a[j] * g[j] : a[j];
      }
    }
    sum_columns_of(column, sum, args.tile, args.tile_pixels, m.scratch, [&](int i, float total) {
      int k = first * kSize + i, position = divide(k, shape.channels);
      if (k < SC) m.sums[(shape.S - 1 - position) * shape.C + k - position * shape.C] = total;
    });
    sync_block();  // the next tile reuses m.scratch
  }
}

template <class T, bool kBackward>
PSA_DEVICE void write_runs(const OnePassArgs& args, const Chunk& chunk, const SharedMemory<T>& m,
                           const AffineTables& tables) {
  const Shape& shape = args.shape;
  for (int s = 0; s < shape.S; ++s) {
    const Strided& to = kBackward ? args.grads[s] : args.concat;
    if (!to.data) continue;  // this gradient isn't requested
    T* out = static_cast<T*>(to.data) + chunk.b * to.batch + chunk.begin;
    if (!kBackward) out += int64_t(shape.S - 1 - s) * shape.run;
    const T* in = (kBackward ? m.concat : m.branches) + int64_t(s) * args.chunk_size;
    int size = chunk.end - chunk.begin;
#pragma unroll 4
    for (int e = thread_index() * kVec<T>; e < size; e += kThreads * kVec<T>) {
      Vec v = load_shared(in + e);
      store_global(out + e,
                   recalibrated_window<T>(v, chunk.begin + e, s, shape, tables, args.floor));
    }
  }
}

template <class T, bool kBackward>
PSA_DEVICE void write_columns(const OnePassArgs& args, const Chunk& chunk, const SharedMemory<T>& m,
                              const SEResult& se) {
  constexpr int kSize = kVec<T>;
  const Shape& shape = args.shape;
  int SC = shape.S * shape.C, pixels = (chunk.end - chunk.begin) / shape.C;
  for (int first = 0; first * kSize < SC; first += args.tile) {
    Column<kSize> column(shape, first, args.tile, args.tile_pixels, false);
    if (!column.active) continue;
    const Strided& to = kBackward ? args.grads[column.s] : args.concat;
    if (!to.data) continue;  // this gradient isn't requested
    Affine y[kSize];
#pragma unroll
    for (int j = 0; j < kSize; ++j) y[j] = affine_of<kBackward>(args, se, column.s, column.c + j);
    int in_width = kBackward ? SC : shape.C, out_width = kBackward ? shape.C : SC;
    const T* in = kBackward ? m.concat + column.k
                            : m.branches + int64_t(column.s) * args.chunk_size + column.c;
    T* out = static_cast<T*>(to.data) + chunk.b * to.batch + (kBackward ? column.c : column.k);
    out += int64_t(chunk.begin / shape.C) * out_width;
#pragma unroll 4
    for (int pixel = column.pixel; pixel < pixels; pixel += args.tile_pixels) {
      float x[kSize];
      unpack<T>(load_shared(in + pixel * in_width), x);
#pragma unroll
      for (int j = 0; j < kSize; ++j)
        x[j] = recalibrated(x[j], y[j].weight, y[j].shift, args.floor);
      store_global(out + int64_t(pixel) * out_width, pack<T>(x));
    }
  }
}

#endif  // PSA_HAS_CLUSTERS

template <class T, bool kBackward, bool kChannelsLast>
PSA_KERNEL(kThreads, 4)
one_pass(PSA_PARAM(OnePassArgs) args) {
#ifdef PSA_HAS_CLUSTERS
  const Shape& shape = args.shape;
  SharedMemory<T> m(args, shared_memory(), kBackward, kChannelsLast);
  int size = shape.C * int(shape.HW), begin = cluster_rank() * args.chunk_size,
      end = begin + args.chunk_size;
  Chunk chunk = {block_index() / args.cluster, begin < size ? begin : size,
                 end < size ? end : size};

  for (int i = thread_index(); i < shape.S * shape.C; i += kThreads) m.sums[i] = 0;
  if (thread_index() == 0) issue_copies<T, kBackward, kChannelsLast>(args, chunk, m);
  sync_block();  // barriers are initialised; sums of rows in other blocks' chunks are zero
  if constexpr (kChannelsLast) {
    sum_columns<T, kBackward>(args, chunk, m);
  } else {
    sum_runs<T, kBackward>(args, chunk, m);
  }

  cluster_arrive();
  cluster_wait();  // the sums of all blocks are complete
  SEResult se = se_of_sample<kBackward>(args, chunk.b, m.se, cluster_rank() == 0, [&](int i) {
    float total = 0;
    for (int rank = 0; rank < args.cluster; ++rank) total += load_remote(m.sums + i, rank);
    return total;
  });
  cluster_arrive();  // this block has read the sums of the others
  if constexpr (kChannelsLast) {
    write_columns<T, kBackward>(args, chunk, m, se);
  } else {
    write_runs<T, kBackward>(args, chunk, m, make_affine_tables<kBackward>(args, se, m.scratch));
  }
  cluster_wait();  // a block must not exit while others may read its sums
#endif
}

template <class T, bool kBackward>
void launch_one_pass_of(const OnePassArgs& args, MemoryFormat memory_format, void* stream) {
  bool channels_last = memory_format == MemoryFormat::channels_last;
  int64_t shared = SharedMemory<T>(args, nullptr, kBackward, channels_last).bytes,
          grid = args.shape.B * args.cluster;
  auto kernel = channels_last ? one_pass<T, kBackward, true> : one_pass<T, kBackward, false>;
  launch(kernel, "one_pass", grid, kThreads, args.cluster, shared, stream, args);
}

}  // namespace

int64_t one_pass_shared_bytes(const OnePassArgs& args, Dtype dtype, MemoryFormat memory_format,
                              bool backward) {
  int64_t bytes = 0;
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    bytes = SharedMemory<T>(args, nullptr, backward, memory_format == MemoryFormat::channels_last)
                .bytes;
  });
  return bytes;
}

void launch_one_pass(const OnePassArgs& args, Dtype dtype, MemoryFormat memory_format,
                     bool backward, void* stream) {
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    if (backward) {
      launch_one_pass_of<T, true>(args, memory_format, stream);
    } else {
      launch_one_pass_of<T, false>(args, memory_format, stream);
    }
  });
}

}  // namespace psa::cuda
