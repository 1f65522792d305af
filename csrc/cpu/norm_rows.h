// The loops over memory of psa_tail_norm: sums over pixels, and what is written from each element.
// What they compute of an element is a formula's business, written once for numbers and vectors.

namespace psa::cpu::PSA_NAMESPACE {

// What is known of a channel of a sample. Formulas use the first kKnown of these.
enum Known { kMean, kWeight, kShift, kFactor, kSpread, kAll };

// For a run of pixels, and for a vector of channels.
template <class A>
struct Numbers {
  A of[kAll];
};
template <class A>
struct Vectors {
  Vec<A> of[kAll];
};

// Rows of them, (S, C) or (C).
template <class A>
struct Channels {
  const A* of[kAll];

  Channels from(int64_t i) const {
    Channels rows{};
    for (int k = 0; k < kAll && of[k]; ++k) rows.of[k] = of[k] + i;
    return rows;
  }
  template <int kKnown>
  Numbers<A> number(int64_t i) const {
    Numbers<A> known{};
    for (int k = 0; k < kKnown; ++k) known.of[k] = of[k][i];
    return known;
  }
  template <int kKnown>
  Vectors<A> vector(int64_t i) const {
    Vectors<A> known{};
    for (int k = 0; k < kKnown; ++k) known.of[k] = load(of[k] + i);
    return known;
  }
};

// The formulas: of x and, where they read one, of the gradient g of the output. V is a number or a
// vector; K has numbers or vectors of the same type.
struct SumOfDifferences {  // to any number near the mean
  static constexpr int kKnown = 1, kSums = 1;
  static constexpr bool kGrad = false;
  template <class V, class K>
  static void terms(V x, V, const K& k, V* sums) {
    sums[0] = x - k.of[kMean];
  }
};

struct SumOfSquares {
  static constexpr int kKnown = 1, kSums = 1;
  static constexpr bool kGrad = false;
  template <class V, class K>
  static void terms(V x, V, const K& k, V* sums) {
    const V centered = x - k.of[kMean];
    sums[0] = centered * centered;
  }
};

template <class V, class K>
inline V normalized(V x, const K& k) {
  return (x - k.of[kMean]) * k.of[kWeight] + k.of[kShift];
}

// The gradient behind the relu; a NaN passes, as in PyTorch's.
template <class V, class K>
inline V masked(V x, V g, const K& k) {
  return normalized(x, k) <= 0 ? V{} : g;
}

struct SumsOfGradient {
  static constexpr int kKnown = 3, kSums = 2;
  static constexpr bool kGrad = true;
  template <class V, class K>
  static void terms(V x, V g, const K& k, V* sums) {
    sums[0] = masked(x, g, k);
    sums[1] = sums[0] * (x - k.of[kMean]);
  }
};

struct Output {
  static constexpr int kKnown = 3;
  static constexpr bool kGrad = false;
  template <class V, class K>
  static V value(V x, V, const K& k) {
    return relu(normalized(x, k));
  }
};

struct InputGradient {
  static constexpr int kKnown = 5;
  static constexpr bool kGrad = true;
  template <class V, class K>
  static V value(V x, V g, const K& k) {
    const V direct = masked(x, g, k) * k.of[kWeight];
    return direct + ((x - k.of[kMean]) * k.of[kFactor] + k.of[kSpread]);
  }
};

// sums[j] += the formula's j-th sum over a run.
template <class F, class T>
void reduce_run(const T* x, const T* g, int64_t n, const Numbers<Acc<T>>& known, Acc<T>* sums) {
  using A = Acc<T>;
  constexpr int64_t L = kLanes<A>;
  if (n < L) {
    for (int64_t i = 0; i < n; ++i) {
      A terms[F::kSums];
      F::terms(widen(x[i]), F::kGrad ? widen(g[i]) : A(0), known, terms);
      for (int j = 0; j < F::kSums; ++j) sums[j] += terms[j];
    }
    return;
  }
  Vec<A> even[F::kSums]{}, odd[F::kSums]{};
  const auto add = [&](Vec<A>* to, int64_t i, int64_t lanes) {
    Vec<A> terms[F::kSums];
    F::terms(load(x + i), F::kGrad ? load(g + i) : Vec<A>{}, known, terms);
    for (int j = 0; j < F::kSums; ++j) {
      to[j] += lanes < L ? last_lanes<A>(terms[j], lanes) : terms[j];
    }
  };
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    add(even, i, L);
    add(odd, i + L, L);
  }
  for (; i + L <= n; i += L) add(even, i, L);
  if (i < n) add(odd, n - L, n - i);
  for (int j = 0; j < F::kSums; ++j) sums[j] += sum_lanes(even[j] + odd[j]);
}

// sums[j * stride + c] = the formula's j-th sum over the pixels.
template <class F, class T>
void reduce_pixels(Pixels<const T> x, Pixels<const T> g, int64_t pixels, int64_t C,
                   const Channels<Acc<T>>& known, Acc<T>* sums, int64_t stride) {
  using A = Acc<T>;
  const auto vector = [&](int64_t c) {
    const auto k = known.template vector<F::kKnown>(c);
    Vec<A> even[F::kSums]{}, odd[F::kSums]{};
    const auto add = [&](Vec<A>* to, int64_t p) {
      Vec<A> terms[F::kSums];
      F::terms(load(x.data + p * x.stride + c),
               F::kGrad ? load(g.data + p * g.stride + c) : Vec<A>{}, k, terms);
      for (int j = 0; j < F::kSums; ++j) to[j] += terms[j];
    };
    int64_t p = 0;
    for (; p + 2 <= pixels; p += 2) {
      add(even, p);
      add(odd, p + 1);
    }
    if (p < pixels) add(even, p);
    for (int j = 0; j < F::kSums; ++j) store(sums + j * stride + c, even[j] + odd[j]);
  };
  const auto element = [&](int64_t c) {
    const auto k = known.template number<F::kKnown>(c);
    A total[F::kSums]{};
    for (int64_t p = 0; p < pixels; ++p) {
      A terms[F::kSums];
      F::terms(widen(x.data[p * x.stride + c]), F::kGrad ? widen(g.data[p * g.stride + c]) : A(0),
               k, terms);
      for (int j = 0; j < F::kSums; ++j) total[j] += terms[j];
    }
    for (int j = 0; j < F::kSums; ++j) sums[j * stride + c] = total[j];
  };
  cover<A>(C, vector, element);
}

// out = the formula's value, over a run.
template <class F, class T>
void map_run(T* out, const T* x, const T* g, int64_t n, const Numbers<Acc<T>>& known) {
  using A = Acc<T>;
  cover<A>(
      n,
      [&](int64_t i) {
        store(out + i, F::value(load(x + i), F::kGrad ? load(g + i) : Vec<A>{}, known));
      },
      [&](int64_t i) {
        out[i] = narrow<T>(F::value(widen(x[i]), F::kGrad ? widen(g[i]) : A(0), known));
      });
}

// out = the formula's value, over pixels.
template <class F, class T>
void map_pixels(Pixels<T> out, Pixels<const T> x, Pixels<const T> g, int64_t pixels, int64_t C,
                const Channels<Acc<T>>& known) {
  using A = Acc<T>;
  const auto vector = [&](int64_t c) {
    const auto k = known.template vector<F::kKnown>(c);
    for (int64_t p = 0; p < pixels; ++p) {
      const Vec<A> grad = F::kGrad ? load(g.data + p * g.stride + c) : Vec<A>{};
      store(out.data + p * out.stride + c, F::value(load(x.data + p * x.stride + c), grad, k));
    }
  };
  const auto element = [&](int64_t c) {
    const auto k = known.template number<F::kKnown>(c);
    for (int64_t p = 0; p < pixels; ++p) {
      const A grad = F::kGrad ? widen(g.data[p * g.stride + c]) : A(0);
      out.data[p * out.stride + c] = narrow<T>(F::value(widen(x.data[p * x.stride + c]), grad, k));
    }
  };
  cover<A>(C, vector, element);
}

// Task t of sample b: sums (kSums, walk.sums, S, C) from what is known of the sample's channels.
template <class F, class T>
void reduce_task(const Walk& w, const Tail& tail, const Channels<Acc<T>>& known, int64_t b,
                 int64_t t, Acc<T>* sums) {
  const int64_t stride = w.sums * w.S * w.C;
  if (w.channels_inner) {
    const int64_t p = t * w.step, pixels = min(w.step, w.HW - p);
    for (int64_t s = 0; s < w.S; ++s) {
      const Strided &x = tail.branches[s], part = part_of(tail, s);
      const bool copies = x.channel != 1 || (F::kGrad && part.channel != 1);
      Buffer<T> space(copies ? 2 * pixels * w.C : 0);
      const auto xs = gather_pixels<T>(x, b, p, pixels, w.C, space.get());
      const auto gs =
          F::kGrad ? gather_pixels<T>(part, b, p, pixels, w.C, space.get() + pixels * w.C * copies)
                   : xs;
      reduce_pixels<F, T>(xs, gs, pixels, w.C, known.from(s * w.C), sums + (t * w.S + s) * w.C,
                          stride);
    }
    return;
  }
  const int64_t per_branch = w.tasks / w.S, s = t / per_branch, c = t % per_branch * w.step;
  const Strided &x = tail.branches[s], part = part_of(tail, s);
  T space[2][kRun];
  for (int64_t i = c; i < min(c + w.step, w.C); ++i) {
    const auto k = known.template number<F::kKnown>(s * w.C + i);
    Acc<T> total[F::kSums]{};
    for (int64_t p = 0; p < w.HW; p += kRun) {
      const int64_t n = min(kRun, w.HW - p);
      const T* xs = gather(at<T>(x, b, i, p), x.pixel, n, space[0]);
      const T* gs = F::kGrad ? gather(at<T>(part, b, i, p), part.pixel, n, space[1]) : xs;
      reduce_run<F>(xs, gs, n, k, total);
    }
    for (int j = 0; j < F::kSums; ++j) sums[j * stride + s * w.C + i] = total[j];
  }
}

// Task t of sample b: to[s] = the formula's value, for each of S parts.
template <class F, class T>
void map_task(const Walk& w, const Tail& tail, const Strided* to, const Channels<Acc<T>>& known,
              int64_t b, int64_t t) {
  if (w.channels_inner) {
    const int64_t end = min((t + 1) * w.step, w.HW);
    const int64_t row = w.S * w.C * int64_t(sizeof(T));
    const int64_t block = clamp(kBlockBytes / row, 1, w.step);
    const bool copies =
        !all_channels_inner(tail.branches, w.S) || (F::kGrad && tail.cat.channel != 1);
    Buffer<T> space(copies ? 2 * block * w.C : 0);
    for (int64_t p = t * w.step; p < end; p += block) {
      const int64_t pixels = min(block, end - p);
      for (int64_t s = 0; s < w.S; ++s) {
        const Pixels<T> out{at<T>(to[s], b, 0, p), to[s].pixel};
        const auto xs = gather_pixels<T>(tail.branches[s], b, p, pixels, w.C, space.get());
        const auto gs = F::kGrad ? gather_pixels<T>(part_of(tail, s), b, p, pixels, w.C,
                                                    space.get() + block * w.C * copies)
                                 : xs;
        map_pixels<F, T>(out, xs, gs, pixels, w.C, known.from(s * w.C));
      }
    }
    return;
  }
  const int64_t per_branch = w.tasks / w.S, s = t / per_branch, c = t % per_branch * w.step;
  const Strided &x = tail.branches[s], part = part_of(tail, s);
  T space[3][kRun];
  for (int64_t i = c; i < min(c + w.step, w.C); ++i) {
    const auto k = known.template number<F::kKnown>(s * w.C + i);
    for (int64_t p = 0; p < w.HW; p += kRun) {
      const int64_t n = min(kRun, w.HW - p);
      const T* xs = gather(at<T>(x, b, i, p), x.pixel, n, space[0]);
      const T* gs = F::kGrad ? gather(at<T>(part, b, i, p), part.pixel, n, space[1]) : xs;
      T* out = to[s].pixel == 1 ? at<T>(to[s], b, i, p) : space[2];
      map_run<F>(out, xs, gs, n, k);
      if (to[s].pixel != 1) scatter(at<T>(to[s], b, i, p), to[s].pixel, n, out);
    }
  }
}

}  // namespace psa::cpu::PSA_NAMESPACE
