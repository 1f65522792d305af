// The SE module and the softmax across branches, forward and backward, for one sample. Rows of C
// numbers are padded to whole vectors, `ld` numbers each; sums over channels need zeros in the
// padding.

namespace psa::cpu::PSA_NAMESPACE {

// Uninitialised memory, aligned to 64 bytes.
template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(size ? ::operator new(size_t(size) * sizeof(A), std::align_val_t(64)) : nullptr) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  A* get() const { return static_cast<A*>(data_); }

 private:
  void* data_;
};

template <class A>
int64_t padded(int64_t C) {
  return (C + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// Calls f with a null pointer to the dtype's element type.
template <class F>
inline void with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float16:
      return f(static_cast<Half*>(nullptr));
    case Dtype::bfloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case Dtype::float32:
      return f(static_cast<float*>(nullptr));
    case Dtype::float64:
      return f(static_cast<double*>(nullptr));
  }
}

// to[i * ld + j] = m[i, j].
template <class A>
void read_matrix(A* to, int64_t ld, const Matrix& m, int64_t rows, int64_t columns) {
  with_type(m.dtype, [&](auto* type) {
    const auto* data = static_cast<decltype(type)>(m.data);
    for (int64_t i = 0; i < rows; ++i, data += m.row, to += ld) {
      if (m.column == 1) {  // a loop of its own, so that the compiler vectorises it
        for (int64_t j = 0; j < columns; ++j) to[j] = A(to_acc(data[j]));
      } else {
        for (int64_t j = 0; j < columns; ++j) to[j] = A(to_acc(data[j * m.column]));
      }
    }
  });
}

// m[i, j] = from[i * row + j * column].
template <class A>
void write_matrix(const Matrix& m, int64_t rows, int64_t columns, const A* from, int64_t row,
                  int64_t column) {
  with_type(m.dtype, [&](auto* type) {
    auto* data = static_cast<decltype(type)>(m.data);
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        data[i * m.row + j * m.column] = from_acc<T>(Acc<T>(from[i * row + j * column]));
      }
    }
  });
}

inline Matrix transposed(const Matrix& m) {
  return {m.data, m.dtype, m.column, m.row, m.branch};
}

// Branch s's matrix.
inline Matrix of_branch(const Matrix& m, int64_t s) {
  char* data = static_cast<char*>(m.data);
  return {data + s * m.branch * size_of(m.dtype), m.dtype, m.row, m.column, 0};
}

template <class A>
A dot(const A* a, const A* b, int64_t n) {
  Vec<A> s0{}, s1{};
  int64_t i = 0;
  for (; i + 2 * kLanes<A> <= n; i += 2 * kLanes<A>) {
    s0 += load(a + i) * load(b + i);
    s1 += load(a + i + kLanes<A>) * load(b + i + kLanes<A>);
  }
  if (i < n) s0 += load(a + i) * load(b + i);
  return sum_lanes(s0 + s1);
}

// The SE module's weights in the accumulator's type, both as (R, ld), padded with zeros: of all
// branches, or of each branch after the other.
template <class A>
class SEModule {
 public:
  SEModule(const SEWeights& se, int64_t S, int64_t C)
      : S(S),
        C(C),
        ld(padded<A>(C)),
        R(se.R),
        modules(se.per_branch ? S : 1),
        size_(2 * R * ld + ld + padded<A>(R)),
        weights_(modules * size_) {
    __builtin_memset(weights_.get(), 0, size_t(modules * size_) * sizeof(A));
    for (int64_t i = 0; i < modules; ++i) {
      const Weights w = weights(i);
      read_matrix(w.fc1, ld, of_branch(se.fc1_weight, i), R, C);
      read_matrix(w.fc2, ld, transposed(of_branch(se.fc2_weight, i)), R, C);
      read_matrix(w.fc1_bias, 1, of_branch(se.fc1_bias, i), R, 1);
      read_matrix(w.fc2_bias, 1, of_branch(se.fc2_bias, i), C, 1);
    }
  }

  // hidden (S, R) = relu(fc1 squeeze); gate (S, ld) = sigmoid(fc2 hidden); squeeze is (S, ld).
  void excite(const A* squeeze, A* hidden, A* gate) const {
    for (int64_t s = 0; s < S; ++s) {
      const Weights w = weights(modules > 1 ? s : 0);
      for (int64_t r = 0; r < R; ++r) {
        hidden[s * R + r] = relu(dot(squeeze + s * ld, w.fc1 + r * ld, ld) + w.fc1_bias[r]);
      }
      for (int64_t c = 0; c < ld; c += kLanes<A>) {
        Vec<A> sum = load(w.fc2_bias + c);
        for (int64_t r = 0; r < R; ++r) sum += load(w.fc2 + r * ld + c) * hidden[s * R + r];
        store(gate + s * ld + c, sigmoid(sum));
      }
    }
  }

  // Replaces gate (S, ld) by attention, its softmax across the branches. The gate is in (0, 1): the
  // softmax needs no maximum subtracted.
  void select(A* gate) const {
    for (int64_t c = 0; c < ld; c += kLanes<A>) {
      Vec<A> sum{};
      for (int64_t s = 0; s < S; ++s) {
        const Vec<A> e = exp(load(gate + s * ld + c));
        store(gate + s * ld + c, e);
        sum += e;
      }
      for (int64_t s = 0; s < S; ++s) store(gate + s * ld + c, load(gate + s * ld + c) / sum);
    }
  }

  // Replaces the gradient of attention, `grad` (S, ld), by that of squeeze. grad_pre2 (S, ld) and
  // grad_pre1 (S, R) become the gradients of the inputs of sigmoid and relu.
  void backward(A* grad, const A* attention, const A* hidden, const A* gate, A* grad_pre1,
                A* grad_pre2) const {
    for (int64_t c = 0; c < ld; c += kLanes<A>) {
      Vec<A> mean{};
      for (int64_t s = 0; s < S; ++s)
        mean += load(grad + s * ld + c) * load(attention + s * ld + c);
      for (int64_t s = 0; s < S; ++s) {
        const int64_t i = s * ld + c;
        const Vec<A> g = load(gate + i);
        store(grad_pre2 + i, load(attention + i) * (load(grad + i) - mean) * g * (1 - g));
      }
    }
    for (int64_t s = 0; s < S; ++s) {
      const Weights w = weights(modules > 1 ? s : 0);
      __builtin_memset(grad_pre2 + s * ld + C, 0, size_t(ld - C) * sizeof(A));
      for (int64_t r = 0; r < R; ++r) {
        const A g = dot(grad_pre2 + s * ld, w.fc2 + r * ld, ld);
        grad_pre1[s * R + r] =
            hidden[s * R + r] <= 0 ? 0 : g;  // a NaN passes, as in PyTorch's relu
      }
      for (int64_t c = 0; c < ld; c += kLanes<A>) {
        Vec<A> sum{};
        for (int64_t r = 0; r < R; ++r) sum += load(w.fc1 + r * ld + c) * grad_pre1[s * R + r];
        store(grad + s * ld + c, sum);
      }
    }
  }

  const int64_t S, C, ld, R, modules;

 private:
  struct Weights {
    A *fc1, *fc2, *fc2_bias, *fc1_bias;
  };
  Weights weights(int64_t i) const {
    A* fc1 = weights_.get() + i * size_;
    return {fc1, fc1 + R * ld, fc1 + 2 * R * ld, fc1 + 2 * R * ld + ld};
  }

  const int64_t size_;  // of one module's weights
  Buffer<A> weights_;
};

// Copies rows (S, C) to (S, ld), with zeros in the padding, and back.
template <class A>
void pad_rows(A* to, int64_t ld, const A* from, int64_t S, int64_t C) {
  for (int64_t s = 0; s < S; ++s) {
    __builtin_memcpy(to + s * ld, from + s * C, size_t(C) * sizeof(A));
    __builtin_memset(to + s * ld + C, 0, size_t(ld - C) * sizeof(A));
  }
}
template <class A>
void unpad_rows(A* to, const A* from, int64_t ld, int64_t S, int64_t C) {
  for (int64_t s = 0; s < S; ++s) {
    __builtin_memcpy(to + s * C, from + s * ld, size_t(C) * sizeof(A));
  }
}

}  // namespace psa::cpu::PSA_NAMESPACE
