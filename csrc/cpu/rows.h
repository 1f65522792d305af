// Loops over memory. A run is n contiguous elements. If n isn't a multiple of the vector's length,
// the last vector overlaps the one before; elementwise loops write the same numbers twice.

namespace psa::cpu::PSA_NAMESPACE {

// The sum over a run of x, or of g * x.
template <bool kProduct, class T>
Acc<T> sum_run(const T* x, const T* g, int64_t n) {
  using A = Acc<T>;
  constexpr int64_t L = kLanes<A>;
  const auto term = [&](int64_t i) {
    if constexpr (kProduct) return load(x + i) * load(g + i);
    return load(x + i);
  };
  if (n < L) {
    A sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += kProduct ? to_acc(x[i]) * to_acc(g[i]) : to_acc(x[i]);
    return sum;
  }
  Vec<A> s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    s0 += term(i);
    s1 += term(i + L);
    s2 += term(i + 2 * L);
    s3 += term(i + 3 * L);
  }
  for (; i + L <= n; i += L) s0 += term(i);
  if (i < n) s1 += last_lanes<A>(term(n - L), n - i);
  return sum_lanes((s0 + s1) + (s2 + s3));
}

// Calls vector(i) for vectors that cover [0, n), or element(i) for each i if n is less than a
// vector.
template <class A, class V, class E>
inline void for_each_vector(int64_t n, const V& vector, const E& element) {
  constexpr int64_t L = kLanes<A>;
  if (n < L) {
    for (int64_t i = 0; i < n; ++i) element(i);
    return;
  }
  for (int64_t i = 0; i + L <= n; i += L) vector(i);
  if (n % L) vector(n - L);
}

// out = x * weight + shift, with an optional relu: a run of pixels of one channel.
template <class T>
void scale_run(T* out, const T* x, int64_t n, Acc<T> weight, Acc<T> shift, bool with_relu) {
  using A = Acc<T>;
  if (with_relu) {
    for_each_vector<A>(
        n, [&](int64_t i) { store(out + i, relu(load(x + i) * weight + shift)); },
        [&](int64_t i) { out[i] = from_acc<T>(relu(to_acc(x[i]) * weight + shift)); });
  } else {
    for_each_vector<A>(
        n, [&](int64_t i) { store(out + i, load(x + i) * weight + shift); },
        [&](int64_t i) { out[i] = from_acc<T>(to_acc(x[i]) * weight + shift); });
  }
}

// A block of pixels, `stride` elements apart; each is a run of C channels.
template <class T>
struct Pixels {
  T* data;
  int64_t stride;
};

// sums[c] = sum over the pixels of x, or of g * x.
template <bool kProduct, class T>
void sum_pixels(Acc<T>* sums, Pixels<const T> x, Pixels<const T> g, int64_t pixels, int64_t C) {
  using A = Acc<T>;
  const auto vector = [&](int64_t c) {
    const auto term = [&](int64_t p) {
      const Vec<A> v = load(x.data + p * x.stride + c);
      if constexpr (kProduct) return v * load(g.data + p * g.stride + c);
      return v;
    };
    Vec<A> s0{}, s1{}, s2{}, s3{};
    int64_t p = 0;
    for (; p + 4 <= pixels; p += 4) {
      s0 += term(p);
      s1 += term(p + 1);
      s2 += term(p + 2);
      s3 += term(p + 3);
    }
    for (; p < pixels; ++p) s0 += term(p);
    store(sums + c, (s0 + s1) + (s2 + s3));
  };
  const auto element = [&](int64_t c) {
    A sum = 0;
    for (int64_t p = 0; p < pixels; ++p) {
      const A v = to_acc(x.data[p * x.stride + c]);
      sum += kProduct ? v * to_acc(g.data[p * g.stride + c]) : v;
    }
    sums[c] = sum;
  };
  for_each_vector<A>(C, vector, element);
}

// out = x * weights[c] + shifts[c], with an optional relu; shifts may be null.
template <class T>
void scale_pixels(Pixels<T> out, Pixels<const T> x, int64_t pixels, int64_t C,
                  const Acc<T>* weights, const Acc<T>* shifts, bool with_relu) {
  using A = Acc<T>;
  const auto vector = [&](int64_t c) {
    const Vec<A> weight = load(weights + c);
    const Vec<A> shift = shifts ? load(shifts + c) : Vec<A>{};
    if (with_relu) {
      for (int64_t p = 0; p < pixels; ++p) {
        store(out.data + p * out.stride + c,
              relu(load(x.data + p * x.stride + c) * weight + shift));
      }
    } else {
      for (int64_t p = 0; p < pixels; ++p) {
        store(out.data + p * out.stride + c, load(x.data + p * x.stride + c) * weight + shift);
      }
    }
  };
  const auto element = [&](int64_t c) {
    for (int64_t p = 0; p < pixels; ++p) {
      const A y = to_acc(x.data[p * x.stride + c]) * weights[c] + (shifts ? shifts[c] : A(0));
      out.data[p * out.stride + c] = from_acc<T>(with_relu ? relu(y) : y);
    }
  };
  for_each_vector<A>(C, vector, element);
}

// gather copies elements `stride` apart to a run, unless they are one; scatter copies them back.
template <class T>
const T* gather(const T* from, int64_t stride, int64_t n, T* run) {
  if (stride == 1) return from;
  for (int64_t i = 0; i < n; ++i) run[i] = from[i * stride];
  return run;
}
template <class T>
void scatter(T* to, int64_t stride, int64_t n, const T* run) {
  for (int64_t i = 0; i < n; ++i) to[i * stride] = run[i];
}

}  // namespace psa::cpu::PSA_NAMESPACE
