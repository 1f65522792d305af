// Loops over memory of psa_tail_norm: reductions over pixels, and elementwise maps. Each takes a
// formula for one element, which is written once for scalars and vectors.

namespace psa::cpu::PSA_NAMESPACE {

// The parameters of a sample's channel. A formula uses the first kParams of them.
enum ChannelParam { kMean, kWeight, kShift, kFactor, kGradMean, kParamCount };

// The parameters of one channel, for a run of pixels; and of a vector of channels.
template <class A>
struct ScalarParams {
  A values[kParamCount];
};
template <class A>
struct VectorParams {
  Vec<A> values[kParamCount];
};

// A row (S, C) or (C) of each parameter; null if the formula doesn't use it.
template <class A>
struct ChannelParams {
  const A* values[kParamCount];

  ChannelParams from(int64_t i) const {
    ChannelParams rows{};
    for (int k = 0; k < kParamCount && values[k]; ++k) rows.values[k] = values[k] + i;
    return rows;
  }
  template <int kParams>
  ScalarParams<A> scalar(int64_t i) const {
    ScalarParams<A> params{};
    for (int k = 0; k < kParams; ++k) params.values[k] = values[k][i];
    return params;
  }
  template <int kParams>
  VectorParams<A> vector(int64_t i) const {
    VectorParams<A> params{};
    for (int k = 0; k < kParams; ++k) params.values[k] = load(values[k] + i);
    return params;
  }
};

// The formulas, of x and, if kGrad, of the output's gradient g. V is a scalar or a vector; P is
// ScalarParams or VectorParams of the same type.
struct SumOfDifferences {  // kMean is any number near the mean
  static constexpr int kParams = 1, kSums = 1;
  static constexpr bool kGrad = false;
  template <class V, class P>
  static void terms(V x, V, const P& p, V* sums) {
    sums[0] = x - p.values[kMean];
  }
};

struct SumOfSquares {
  static constexpr int kParams = 1, kSums = 1;
  static constexpr bool kGrad = false;
  template <class V, class P>
  static void terms(V x, V, const P& p, V* sums) {
    const V centered = x - p.values[kMean];
    sums[0] = centered * centered;
  }
};

template <class V, class P>
inline V normalized(V x, const P& p) {
  return (x - p.values[kMean]) * p.values[kWeight] + p.values[kShift];
}

// The gradient of the ReLU's input; a NaN passes, as in PyTorch's relu.
template <class V, class P>
inline V masked(V x, V g, const P& p) {
  return normalized(x, p) <= 0 ? V{} : g;
}

struct SumsOfGradient {
  static constexpr int kParams = 3, kSums = 2;
  static constexpr bool kGrad = true;
  template <class V, class P>
  static void terms(V x, V g, const P& p, V* sums) {
    sums[0] = masked(x, g, p);
    sums[1] = sums[0] * (x - p.values[kMean]);
  }
};

struct Output {
  static constexpr int kParams = 3;
  static constexpr bool kGrad = false;
  template <class V, class P>
  static V value(V x, V, const P& p) {
    return relu(normalized(x, p));
  }
};

struct InputGradient {
  static constexpr int kParams = 5;
  static constexpr bool kGrad = true;
  template <class V, class P>
  static V value(V x, V g, const P& p) {
    const V direct = masked(x, g, p) * p.values[kWeight];
    return direct + ((x - p.values[kMean]) * p.values[kFactor] + p.values[kGradMean]);
  }
};

// sums[j] += the formula's j-th sum over a run of pixels.
template <class F, class T>
void reduce_run(const T* x, const T* g, int64_t n, const ScalarParams<Acc<T>>& params,
                Acc<T>* sums) {
  using A = Acc<T>;
  constexpr int64_t L = kLanes<A>;
  if (n < L) {
    for (int64_t i = 0; i < n; ++i) {
      A terms[F::kSums];
      F::terms(to_acc(x[i]), F::kGrad ? to_acc(g[i]) : A(0), params, terms);
      for (int j = 0; j < F::kSums; ++j) sums[j] += terms[j];
    }
    return;
  }
  Vec<A> even[F::kSums]{}, odd[F::kSums]{};
  const auto add = [&](Vec<A>* to, int64_t i, int64_t lanes) {
    Vec<A> terms[F::kSums];
    F::terms(load(x + i), F::kGrad ? load(g + i) : Vec<A>{}, params, terms);
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
                   const ChannelParams<Acc<T>>& params, Acc<T>* sums, int64_t stride) {
  using A = Acc<T>;
  const auto vector = [&](int64_t c) {
    const auto channel = params.template vector<F::kParams>(c);
    Vec<A> even[F::kSums]{}, odd[F::kSums]{};
    const auto add = [&](Vec<A>* to, int64_t p) {
      Vec<A> terms[F::kSums];
      F::terms(load(x.data + p * x.stride + c),
               F::kGrad ? load(g.data + p * g.stride + c) : Vec<A>{}, channel, terms);
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
    const auto channel = params.template scalar<F::kParams>(c);
    A total[F::kSums]{};
    for (int64_t p = 0; p < pixels; ++p) {
      A terms[F::kSums];
      F::terms(to_acc(x.data[p * x.stride + c]), F::kGrad ? to_acc(g.data[p * g.stride + c]) : A(0),
               channel, terms);
      for (int j = 0; j < F::kSums; ++j) total[j] += terms[j];
    }
    for (int j = 0; j < F::kSums; ++j) sums[j * stride + c] = total[j];
  };
  for_each_vector<A>(C, vector, element);
}

// out = the formula's value for each pixel of a run.
template <class F, class T>
void map_run(T* out, const T* x, const T* g, int64_t n, const ScalarParams<Acc<T>>& params) {
  using A = Acc<T>;
  for_each_vector<A>(
      n,
      [&](int64_t i) {
        store(out + i, F::value(load(x + i), F::kGrad ? load(g + i) : Vec<A>{}, params));
      },
      [&](int64_t i) {
        out[i] = from_acc<T>(F::value(to_acc(x[i]), F::kGrad ? to_acc(g[i]) : A(0), params));
      });
}

// out = the formula's value for each channel of each pixel.
template <class F, class T>
void map_pixels(Pixels<T> out, Pixels<const T> x, Pixels<const T> g, int64_t pixels, int64_t C,
                const ChannelParams<Acc<T>>& params) {
  using A = Acc<T>;
  const auto vector = [&](int64_t c) {
    const auto channel = params.template vector<F::kParams>(c);
    for (int64_t p = 0; p < pixels; ++p) {
      const Vec<A> grad = F::kGrad ? load(g.data + p * g.stride + c) : Vec<A>{};
      store(out.data + p * out.stride + c,
            F::value(load(x.data + p * x.stride + c), grad, channel));
    }
  };
  const auto element = [&](int64_t c) {
    const auto channel = params.template scalar<F::kParams>(c);
    for (int64_t p = 0; p < pixels; ++p) {
      const A grad = F::kGrad ? to_acc(g.data[p * g.stride + c]) : A(0);
      out.data[p * out.stride + c] =
          from_acc<T>(F::value(to_acc(x.data[p * x.stride + c]), grad, channel));
    }
  };
  for_each_vector<A>(C, vector, element);
}

// Task t of sample b: sums (kSums, schedule.partials, S, C) of the formula's terms.
template <class F, class T>
void reduce_task(const Schedule& schedule, const Tail& tail, const ChannelParams<Acc<T>>& params,
                 int64_t b, int64_t t, Acc<T>* sums) {
  const int64_t S = schedule.S, C = schedule.C, HW = schedule.HW;
  const int64_t stride = schedule.partials * S * C;
  if (schedule.channels_inner) {
    const auto [begin, end] = schedule.pixels(t);
    const int64_t pixels = end - begin;
    for (int64_t s = 0; s < S; ++s) {
      const Strided &x = tail.branches[s], g = concat_slice(tail, s);
      const bool copies = x.channel != 1 || (F::kGrad && g.channel != 1);
      Buffer<T> buffer(copies ? 2 * pixels * C : 0);
      const auto xs = gather_pixels<T>(x, b, begin, pixels, C, buffer.get());
      T* g_buffer = buffer.get() + pixels * C * copies;
      const auto gs = F::kGrad ? gather_pixels<T>(g, b, begin, pixels, C, g_buffer) : xs;
      reduce_pixels<F, T>(xs, gs, pixels, C, params.from(s * C), sums + (t * S + s) * C, stride);
    }
    return;
  }
  const auto [s, begin, end] = schedule.rows(t);
  const Strided &x = tail.branches[s], g = concat_slice(tail, s);
  T buffer[2][kRunPixels];
  for (int64_t c = begin; c < end; ++c) {
    const auto channel = params.template scalar<F::kParams>(s * C + c);
    Acc<T> total[F::kSums]{};
    for (int64_t p = 0; p < HW; p += kRunPixels) {
      const int64_t n = min(kRunPixels, HW - p);
      const T* xs = gather(at<T>(x, b, c, p), x.pixel, n, buffer[0]);
      const T* gs = F::kGrad ? gather(at<T>(g, b, c, p), g.pixel, n, buffer[1]) : xs;
      reduce_run<F>(xs, gs, n, channel, total);
    }
    for (int j = 0; j < F::kSums; ++j) sums[j * stride + s * C + c] = total[j];
  }
}

// Task t of sample b: to[s] = the formula's value for each branch s.
template <class F, class T>
void map_task(const Schedule& schedule, const Tail& tail, const Strided* to,
              const ChannelParams<Acc<T>>& params, int64_t b, int64_t t) {
  const int64_t S = schedule.S, C = schedule.C, HW = schedule.HW;
  if (schedule.channels_inner) {
    const auto [begin, end] = schedule.pixels(t);
    const int64_t block = clamp(kBlockBytes / (S * C * int64_t(sizeof(T))), 1, schedule.step);
    const bool copies =
        !all_channels_inner(tail.branches, S) || (F::kGrad && tail.concat.channel != 1);
    Buffer<T> buffer(copies ? 2 * block * C : 0);
    T* g_buffer = buffer.get() + block * C * copies;
    for (int64_t p = begin; p < end; p += block) {
      const int64_t pixels = min(block, end - p);
      for (int64_t s = 0; s < S; ++s) {
        const Strided g = concat_slice(tail, s);
        const Pixels<T> out{at<T>(to[s], b, 0, p), to[s].pixel};
        const auto xs = gather_pixels<T>(tail.branches[s], b, p, pixels, C, buffer.get());
        const auto gs = F::kGrad ? gather_pixels<T>(g, b, p, pixels, C, g_buffer) : xs;
        map_pixels<F, T>(out, xs, gs, pixels, C, params.from(s * C));
      }
    }
    return;
  }
  const auto [s, begin, end] = schedule.rows(t);
  const Strided &x = tail.branches[s], g = concat_slice(tail, s);
  T buffer[3][kRunPixels];
  for (int64_t c = begin; c < end; ++c) {
    const auto channel = params.template scalar<F::kParams>(s * C + c);
    for (int64_t p = 0; p < HW; p += kRunPixels) {
      const int64_t n = min(kRunPixels, HW - p);
      const T* xs = gather(at<T>(x, b, c, p), x.pixel, n, buffer[0]);
      const T* gs = F::kGrad ? gather(at<T>(g, b, c, p), g.pixel, n, buffer[1]) : xs;
      T* out = to[s].pixel == 1 ? at<T>(to[s], b, c, p) : buffer[2];
      map_run<F>(out, xs, gs, n, channel);
      if (to[s].pixel != 1) scatter(at<T>(to[s], b, c, p), to[s].pixel, n, out);
    }
  }
}

}  // namespace psa::cpu::PSA_NAMESPACE
