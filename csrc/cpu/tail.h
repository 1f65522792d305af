// Forward and backward of both operators have three steps: sum over pixels, compute the SE module
// (excite), write. This file schedules them over tasks and threads.

namespace psa::cpu::PSA_NAMESPACE {

constexpr int64_t kRunPixels = 2048;       // pixels summed at a time, for precision
constexpr int64_t kTaskElements = 8192;    // approximate size of a task
constexpr int64_t kGrainElements = 32768;  // smallest work for a thread, as in PyTorch
constexpr int64_t kBlockBytes = 16384;     // of concat, written before the next block of pixels

template <class F>
void parallel(const Threads& threads, int64_t n, int64_t grain, const F& f) {
  if (threads.count == 1 || n <= grain) return f(0, n);
  const auto body = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const F*>(context))(begin, end);
  };
  threads.parallel_for(0, n, grain, body, const_cast<F*>(&f));
}

// How a sample is split into tasks. A task takes whole rows of pixels, of some channels of one
// branch; or, if channels are innermost, some pixels of all branches. The schedule depends on
// shapes alone, so that sums have the same bits for any number of threads.
struct Schedule {
  Schedule(const Tail& tail, bool channels_inner)
      : S(tail.S), C(tail.C), HW(tail.HW), channels_inner(channels_inner) {
    const int64_t unit = channels_inner ? S * C : HW, extent = channels_inner ? HW : C;
    step = clamp(kTaskElements / unit, 1, extent);
    tasks = (extent + step - 1) / step * (channels_inner ? 1 : S);
    partials = channels_inner ? tasks : 1;
  }

  int64_t elements_per_task() const { return S * C * HW / tasks + 1; }  // approximately

  // Task t's channels [begin, end) of branch s, unless channels_inner.
  struct Rows {
    int64_t s, begin, end;
  };
  Rows rows(int64_t t) const {
    const int64_t branch_tasks = tasks / S, begin = t % branch_tasks * step;
    return {t / branch_tasks, begin, min(begin + step, C)};
  }

  // Task t's pixels [begin, end), if channels_inner.
  struct PixelRange {
    int64_t begin, end;
  };
  PixelRange pixels(int64_t t) const { return {t * step, min((t + 1) * step, HW)}; }

  const int64_t S, C, HW;
  const bool channels_inner;
  int64_t step;  // channels or pixels of a task
  int64_t tasks;
  int64_t partials;  // number of partial sums (S, C) of a sample
};

inline bool all_channels_inner(const Strided* tensors, int64_t S) {
  for (int64_t s = 0; s < S; ++s) {
    if (tensors[s].channel != 1) return false;
  }
  return true;
}

// The slice of concat that belongs to branch s; branch S - 1 comes first.
inline Strided concat_slice(const Tail& tail, int64_t s) {
  const int64_t offset = (tail.S - 1 - s) * tail.C * tail.concat.channel * size_of(tail.dtype);
  return {static_cast<char*>(tail.concat.data) + offset, tail.concat.batch, tail.concat.channel,
          tail.concat.pixel};
}

// The slice (C) of a vector (S * C) in the order of concat's channels that belongs to branch s.
inline Matrix concat_slice(const Matrix& vector, const Tail& tail, int64_t s) {
  const int64_t offset = (tail.S - 1 - s) * tail.C * vector.row * size_of(vector.dtype);
  return {static_cast<char*>(vector.data) + offset, vector.dtype, vector.row, 0};
}

// Copies a vector (S * C) in the order of concat's channels to rows (S, C) in the order of the
// branches, and back. Does nothing if the vector isn't given.
template <class A>
void read_concat_vector(A* rows, const Matrix& vector, const Tail& tail) {
  if (!vector.data) return;
  for (int64_t s = 0; s < tail.S; ++s) {
    read_matrix(rows + s * tail.C, 1, concat_slice(vector, tail, s), tail.C, 1);
  }
}
template <class A>
void write_concat_vector(const Matrix& vector, const A* rows, const Tail& tail) {
  if (!vector.data) return;
  for (int64_t s = 0; s < tail.S; ++s) {
    write_matrix(concat_slice(vector, tail, s), tail.C, 1, rows + s * tail.C, 1, 0);
  }
}

template <class T>
T* at(const Strided& x, int64_t b, int64_t c, int64_t p) {
  return static_cast<T*>(x.data) + b * x.batch + c * x.channel + p * x.pixel;
}

// A block of pixels with contiguous channels: x itself, or a copy in `buffer`.
template <class T>
Pixels<const T> gather_pixels(const Strided& x, int64_t b, int64_t p, int64_t pixels, int64_t C,
                              T* buffer) {
  if (x.channel == 1) return {at<T>(x, b, 0, p), x.pixel};
  for (int64_t i = 0; i < pixels; ++i) {
    gather(at<T>(x, b, 0, p + i), x.channel, C, buffer + i * C);
  }
  return {buffer, C};
}

// Task t of sample b sums x, or g * x, over its pixels. sums: (schedule.partials, S, C).
template <bool kProduct, class T>
void sum_task(const Schedule& schedule, const Tail& tail, int64_t b, int64_t t, Acc<T>* sums) {
  const int64_t S = schedule.S, C = schedule.C, HW = schedule.HW;
  if (schedule.channels_inner) {
    const auto [begin, end] = schedule.pixels(t);
    const int64_t pixels = end - begin;
    for (int64_t s = 0; s < S; ++s) {
      const Strided &x = tail.branches[s], g = concat_slice(tail, s);
      const bool copies = x.channel != 1 || (kProduct && g.channel != 1);
      Buffer<T> buffer(copies ? 2 * pixels * C : 0);
      const auto xs = gather_pixels<T>(x, b, begin, pixels, C, buffer.get());
      T* g_buffer = buffer.get() + pixels * C * copies;
      const auto gs = kProduct ? gather_pixels<T>(g, b, begin, pixels, C, g_buffer) : xs;
      sum_pixels<kProduct>(sums + (t * S + s) * C, xs, gs, pixels, C);
    }
    return;
  }
  const auto [s, begin, end] = schedule.rows(t);
  const Strided &x = tail.branches[s], g = concat_slice(tail, s);
  T buffer[2][kRunPixels];
  for (int64_t c = begin; c < end; ++c) {
    Acc<T> sum = 0;
    for (int64_t p = 0; p < HW; p += kRunPixels) {
      const int64_t n = min(kRunPixels, HW - p);
      const T* xs = gather(at<T>(x, b, c, p), x.pixel, n, buffer[0]);
      const T* gs = kProduct ? gather(at<T>(g, b, c, p), g.pixel, n, buffer[1]) : xs;
      sum += sum_run<kProduct>(xs, gs, n);
    }
    sums[s * C + c] = sum;
  }
}

// to[s] = relu(from[s] * weights[s] + shifts[s]) for each branch s.
template <class T>
struct ScaleArgs {
  const Strided *to, *from;  // S each
  const Acc<T>* weights;     // (B, S, C)
  const Acc<T>* shifts;      // (B or 1, S, C), or null
  int64_t shifts_batch;      // the stride of shifts along B
  bool relu;
};

template <class T>
void scale_task(const Schedule& schedule, const ScaleArgs<T>& args, int64_t b, int64_t t) {
  const int64_t S = schedule.S, C = schedule.C, HW = schedule.HW;
  const Acc<T>* weights = args.weights + b * S * C;
  const Acc<T>* shifts = args.shifts ? args.shifts + b * args.shifts_batch : nullptr;
  if (schedule.channels_inner) {
    const auto [begin, end] = schedule.pixels(t);
    const int64_t block = clamp(kBlockBytes / (S * C * int64_t(sizeof(T))), 1, schedule.step);
    const bool copies = !all_channels_inner(args.from, S);
    Buffer<T> buffer(copies ? block * C : 0);
    for (int64_t p = begin; p < end; p += block) {
      const int64_t pixels = min(block, end - p);
      for (int64_t s = 0; s < S; ++s) {
        const Pixels<T> to{at<T>(args.to[s], b, 0, p), args.to[s].pixel};
        const auto from = gather_pixels<T>(args.from[s], b, p, pixels, C, buffer.get());
        const Acc<T>* shift = shifts ? shifts + s * C : nullptr;
        scale_pixels<T>(to, from, pixels, C, weights + s * C, shift, args.relu);
      }
    }
    return;
  }
  const auto [s, begin, end] = schedule.rows(t);
  const Strided &to = args.to[s], &from = args.from[s];
  T buffer[2][kRunPixels];
  for (int64_t c = begin; c < end; ++c) {
    const Acc<T> shift = shifts ? shifts[s * C + c] : 0;
    for (int64_t p = 0; p < HW; p += kRunPixels) {
      const int64_t n = min(kRunPixels, HW - p);
      const T* x = gather(at<T>(from, b, c, p), from.pixel, n, buffer[0]);
      T* y = to.pixel == 1 ? at<T>(to, b, c, p) : buffer[1];
      scale_run(y, x, n, weights[s * C + c], shift, args.relu);
      if (to.pixel != 1) scatter(at<T>(to, b, c, p), to.pixel, n, y);
    }
  }
}

// The smallest number of items, of so many elements each, that is worth a thread.
inline int64_t grain(int64_t elements) {
  return max(1, kGrainElements / elements);
}

// Calls pass.sum(b, t, sums) for all tasks of all samples; each sample has `size` sums.
template <class A, class Pass>
void sum_all(const Pass& pass, const Schedule& schedule, int64_t B, A* sums, int64_t size,
             const Threads& threads) {
  const int64_t tasks = schedule.tasks;
  parallel(threads, B * tasks, grain(schedule.elements_per_task()),
           [&](int64_t begin, int64_t end) {
             for (int64_t i = begin; i < end; ++i) {
               pass.sum(i / tasks, i % tasks, sums + i / tasks * size);
             }
           });
}

// Calls pass.excite(b, sums, scratch) for all samples.
template <class A, class Pass>
void excite_all(const Pass& pass, const Schedule& schedule, int64_t B, const A* sums, int64_t size,
                const Threads& threads) {
  parallel(threads, B, grain(schedule.S * schedule.C * 32), [&](int64_t begin, int64_t end) {
    Buffer<A> scratch(pass.scratch_size());
    for (int64_t b = begin; b < end; ++b) pass.excite(b, sums + b * size, scratch.get());
  });
}

// Calls pass.write(b, t) for all tasks of all samples, the last first: they are still in the cache.
template <class Pass>
void write_all(const Pass& pass, const Schedule& schedule, int64_t B, const Threads& threads) {
  const int64_t tasks = schedule.tasks;
  parallel(threads, B * tasks, grain(schedule.elements_per_task()),
           [&](int64_t begin, int64_t end) {
             for (int64_t i = end; i-- > begin;) pass.write(i / tasks, i % tasks);
           });
}

// Runs the three steps sample by sample, so that each sample is read from memory once. If there are
// fewer samples than threads, runs each step for all samples instead.
template <class A, class Pass>
void run_pass(const Pass& pass, const Schedule& schedule, int64_t B, const Threads& threads) {
  const int64_t channels = schedule.S * schedule.C, per_sample = channels * schedule.HW;
  const int64_t size = schedule.partials * channels;
  if (B >= threads.count || B * per_sample <= kGrainElements) {
    parallel(threads, B, grain(per_sample), [&](int64_t begin, int64_t end) {
      Buffer<A> buffer(size + pass.scratch_size());
      A *sums = buffer.get(), *scratch = sums + size;
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t t = 0; t < schedule.tasks; ++t) pass.sum(b, t, sums);
        pass.excite(b, sums, scratch);
        for (int64_t t = schedule.tasks; t-- > 0;) pass.write(b, t);  // as in write_all
      }
    });
    return;
  }
  Buffer<A> sums(B * size);
  sum_all(pass, schedule, B, sums.get(), size, threads);
  excite_all(pass, schedule, B, sums.get(), size, threads);
  write_all(pass, schedule, B, threads);
}

// to (S, ld) = the sum of the n partial sums (n, S, C), in their order, over `divisor`.
template <class A>
void sum_partials(A* to, int64_t ld, const A* sums, int64_t n, int64_t S, int64_t C, A divisor) {
  for (int64_t s = 0; s < S; ++s) {
    const A* row = sums + s * C;
    for_each_vector<A>(
        C,
        [&](int64_t c) {
          Vec<A> sum = load(row + c);
          for (int64_t k = 1; k < n; ++k) sum += load(row + k * S * C + c);
          store(to + s * ld + c, sum / divisor);
        },
        [&](int64_t c) {
          A sum = row[c];
          for (int64_t k = 1; k < n; ++k) sum += row[k * S * C + c];
          to[s * ld + c] = sum / divisor;
        });
    __builtin_memset(to + s * ld + C, 0, size_t(ld - C) * sizeof(A));
  }
}

}  // namespace psa::cpu::PSA_NAMESPACE
