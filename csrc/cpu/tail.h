// Forward and backward on a CPU: sum, gate, write, sample by sample while the data is hot.

namespace psa::cpu::PSA_NAMESPACE {

constexpr int64_t kRun = 2048;          // pixels summed at a time, for precision
constexpr int64_t kTask = 8192;         // elements of a task, about
constexpr int64_t kGrain = 32768;       // elements that a thread is worth, as in PyTorch
constexpr int64_t kBlockBytes = 16384;  // of the cat, while its cache lines are filled

template <class F>
void parallel(const Threads& threads, int64_t n, int64_t grain, const F& f) {
  if (threads.count == 1 || n <= grain) return f(0, n);
  const auto body = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const F*>(context))(begin, end);
  };
  threads.parallel_for(0, n, grain, body, const_cast<F*>(&f));
}

// How a sample is walked: whole rows of pixels of a few channels of one branch, or, with channels
// innermost, a few pixels of all branches. It depends on shapes alone, and so do the sums' bits.
struct Walk {
  Walk(const Tail& tail, bool channels_inner)
      : S(tail.S), C(tail.C), HW(tail.HW), channels_inner(channels_inner) {
    const int64_t unit = channels_inner ? S * C : HW, extent = channels_inner ? HW : C;
    step = clamp(kTask / unit, 1, extent);
    tasks = (extent + step - 1) / step * (channels_inner ? 1 : S);
    sums = channels_inner ? tasks : 1;
  }
  int64_t per_task() const { return S * C * HW / tasks + 1; }  // elements, about

  const int64_t S, C, HW;
  const bool channels_inner;
  int64_t step, tasks;
  int64_t sums;  // how many partial sums (S, C) a sample has
};

inline bool all_channels_inner(const Strided* tensors, int64_t S) {
  for (int64_t s = 0; s < S; ++s) {
    if (tensors[s].channel != 1) return false;
  }
  return true;
}

// The part of the cat that belongs to branch s: they lie in reverse.
inline Strided part_of(const Tail& tail, int64_t s) {
  const int64_t offset = (tail.S - 1 - s) * tail.C * tail.cat.channel * size_of(tail.dtype);
  return {static_cast<char*>(tail.cat.data) + offset, tail.cat.batch, tail.cat.channel,
          tail.cat.pixel};
}

template <class T>
T* at(const Strided& x, int64_t b, int64_t c, int64_t p) {
  return static_cast<T*>(x.data) + b * x.batch + c * x.channel + p * x.pixel;
}

// A block of pixels with their channels in runs: x itself, or a copy in `space`.
template <class T>
Pixels<const T> gather_pixels(const Strided& x, int64_t b, int64_t p, int64_t pixels, int64_t C,
                              T* space) {
  if (x.channel == 1) return {at<T>(x, b, 0, p), x.pixel};
  for (int64_t i = 0; i < pixels; ++i) {
    gather(at<T>(x, b, 0, p + i), x.channel, C, space + i * C);
  }
  return {space, C};
}

// sums (walk.sums, S, C): what task t of sample b adds up of x, or of g * x.
template <bool kProduct, class T>
void sum_task(const Walk& w, const Tail& tail, int64_t b, int64_t t, Acc<T>* sums) {
  if (w.channels_inner) {
    const int64_t p = t * w.step, pixels = min(w.step, w.HW - p);
    for (int64_t s = 0; s < w.S; ++s) {
      const Strided &x = tail.branches[s], part = part_of(tail, s);
      const bool copies = x.channel != 1 || (kProduct && part.channel != 1);
      Buffer<T> space(copies ? 2 * pixels * w.C : 0);
      const auto xs = gather_pixels<T>(x, b, p, pixels, w.C, space.get());
      const auto gs =
          kProduct ? gather_pixels<T>(part, b, p, pixels, w.C, space.get() + pixels * w.C * copies)
                   : xs;
      sum_pixels<kProduct>(sums + (t * w.S + s) * w.C, xs, gs, pixels, w.C);
    }
    return;
  }
  const int64_t per_branch = w.tasks / w.S, s = t / per_branch, c = t % per_branch * w.step;
  const Strided &x = tail.branches[s], part = part_of(tail, s);
  T space[2][kRun];
  for (int64_t i = c; i < min(c + w.step, w.C); ++i) {
    Acc<T> sum = 0;
    for (int64_t p = 0; p < w.HW; p += kRun) {
      const int64_t n = min(kRun, w.HW - p);
      const T* xs = gather(at<T>(x, b, i, p), x.pixel, n, space[0]);
      const T* gs = kProduct ? gather(at<T>(part, b, i, p), part.pixel, n, space[1]) : xs;
      sum += sum_run<kProduct>(xs, gs, n);
    }
    sums[s * w.C + i] = sum;
  }
}

// What is written from what: to[s] = relu(from[s] * weights[s] + offsets[s]), for each of S parts.
template <class T>
struct Writing {
  const Strided *to, *from;  // S each
  const Acc<T>* weights;     // (B, S, C)
  const Acc<T>* offsets;     // (B or 1, S, C), or null
  int64_t offsets_batch;     // the stride over samples
  bool relu;
};

template <class T>
void write_task(const Walk& w, const Writing<T>& writing, int64_t b, int64_t t) {
  const Acc<T>* weights = writing.weights + b * w.S * w.C;
  const Acc<T>* offsets = writing.offsets ? writing.offsets + b * writing.offsets_batch : nullptr;
  if (w.channels_inner) {
    const int64_t end = min((t + 1) * w.step, w.HW);
    const int64_t row = w.S * w.C * int64_t(sizeof(T));
    const int64_t block = clamp(kBlockBytes / row, 1, w.step);
    const bool copies = !all_channels_inner(writing.from, w.S);
    Buffer<T> space(copies ? block * w.C : 0);
    for (int64_t p = t * w.step; p < end; p += block) {
      const int64_t pixels = min(block, end - p);
      for (int64_t s = 0; s < w.S; ++s) {
        const Pixels<T> to{at<T>(writing.to[s], b, 0, p), writing.to[s].pixel};
        const auto from = gather_pixels<T>(writing.from[s], b, p, pixels, w.C, space.get());
        scale_pixels<T>(to, from, pixels, w.C, weights + s * w.C,
                        offsets ? offsets + s * w.C : nullptr, writing.relu);
      }
    }
    return;
  }
  const int64_t per_branch = w.tasks / w.S, s = t / per_branch, c = t % per_branch * w.step;
  const Strided &to = writing.to[s], &from = writing.from[s];
  T space[2][kRun];
  for (int64_t i = c; i < min(c + w.step, w.C); ++i) {
    const Acc<T> offset = offsets ? offsets[s * w.C + i] : 0;
    for (int64_t p = 0; p < w.HW; p += kRun) {
      const int64_t n = min(kRun, w.HW - p);
      const T* x = gather(at<T>(from, b, i, p), from.pixel, n, space[0]);
      T* y = to.pixel == 1 ? at<T>(to, b, i, p) : space[1];
      scale_run(y, x, n, weights[s * w.C + i], offset, writing.relu);
      if (to.pixel != 1) scatter(at<T>(to, b, i, p), to.pixel, n, y);
    }
  }
}

// How many things of so many elements each are worth a thread.
inline int64_t grain(int64_t elements) {
  return max(1, kGrain / elements);
}

// pass.sum(b, t, sums) for all tasks of all samples, each with its sample's `size` sums.
template <class A, class Pass>
void sum_all(const Pass& pass, const Walk& w, int64_t B, A* sums, int64_t size,
             const Threads& threads) {
  parallel(threads, B * w.tasks, grain(w.per_task()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pass.sum(i / w.tasks, i % w.tasks, sums + i / w.tasks * size);
    }
  });
}

// pass.gate(b, sums, scratch) for all samples.
template <class A, class Pass>
void gate_all(const Pass& pass, const Walk& w, int64_t B, const A* sums, int64_t size,
              const Threads& threads) {
  parallel(threads, B, grain(w.S * w.C * 32), [&](int64_t begin, int64_t end) {
    Buffer<A> scratch(pass.scratch_size());
    for (int64_t b = begin; b < end; ++b) pass.gate(b, sums + b * size, scratch.get());
  });
}

// pass.write(b, t) for all tasks of all samples.
template <class Pass>
void write_all(const Pass& pass, const Walk& w, int64_t B, const Threads& threads) {
  parallel(threads, B * w.tasks, grain(w.per_task()), [&](int64_t begin, int64_t end) {
    for (int64_t i = end; i-- > begin;) pass.write(i / w.tasks, i % w.tasks);
  });
}

// Runs the three steps of a pass: sample by sample, or, where there are fewer samples than threads,
// each for all samples.
template <class A, class Pass>
void run(const Pass& pass, const Walk& w, int64_t B, const Threads& threads) {
  const int64_t size = w.sums * w.S * w.C, per_sample = w.S * w.C * w.HW;
  if (B >= threads.count || B * per_sample <= kGrain) {
    parallel(threads, B, grain(per_sample), [&](int64_t begin, int64_t end) {
      Buffer<A> space(size + pass.scratch_size());
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t t = 0; t < w.tasks; ++t) pass.sum(b, t, space.get());
        pass.gate(b, space.get(), space.get() + size);
        for (int64_t t = w.tasks; t-- > 0;) pass.write(b, t);  // what was read last is nearest
      }
    });
    return;
  }
  Buffer<A> sums(B * size);
  sum_all(pass, w, B, sums.get(), size, threads);
  gate_all(pass, w, B, sums.get(), size, threads);
  write_all(pass, w, B, threads);
}

// to (S, ld) = the partial sums (n, S, C), added up in their order, over `divisor`.
template <class A>
void add_up(A* to, int64_t ld, const A* sums, int64_t n, int64_t S, int64_t C, A divisor) {
  for (int64_t s = 0; s < S; ++s) {
    const A* row = sums + s * C;
    cover<A>(
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
