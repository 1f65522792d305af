// The two passes of the operator, and the entry points of one instruction set.

namespace psa::cpu::PSA_NAMESPACE {

template <class T>
class Forward {
 public:
  using A = Acc<T>;

  Forward(const Tail& tail, const Epilogue& epilogue, const Walk& walk, const Strided* parts)
      : tail_(tail),
        walk_(walk),
        gate_(tail.se, tail.S, tail.C),
        scales_(epilogue.scale.data ? tail.S * tail.C : 0),
        offsets_(epilogue.shift.data ? tail.S * tail.C : 0),
        weights_(epilogue.scale.data ? tail.B * tail.S * tail.C : 0),
        has_scale_(epilogue.scale.data) {
    const int64_t S = tail.S, C = tail.C;
    // The epilogue's vectors are in the output's order of branches.
    for (int64_t s = 0; s < S; ++s) {
      const auto own = [&](const Matrix& m) {
        char* data = static_cast<char*>(m.data);
        return Matrix{data + (S - 1 - s) * C * m.row * size_of(m.dtype), m.dtype, m.row, 0};
      };
      if (has_scale_) read(scales_.get() + s * C, 1, own(epilogue.scale), C, 1);
      if (epilogue.shift.data) read(offsets_.get() + s * C, 1, own(epilogue.shift), C, 1);
    }
    const A* attention = static_cast<A*>(tail.attention);
    const A* offsets = epilogue.shift.data ? offsets_.get() : nullptr;
    writing_ = {parts, tail.branches, has_scale_ ? weights_.get() : attention, offsets,
                0,     epilogue.relu};
  }

  int64_t scratch_size() const { return gate_.S * (2 * gate_.ld + gate_.R); }

  void sum(int64_t b, int64_t t, A* sums) const { sum_task<false, T>(walk_, tail_, b, t, sums); }

  void gate(int64_t b, const A* sums, A* scratch) const {
    const int64_t S = gate_.S, C = gate_.C, ld = gate_.ld, sample = b * S * C;
    A *squeeze = scratch, *gate = squeeze + S * ld, *hidden = gate + S * ld;
    add_up(squeeze, ld, sums, walk_.sums, S, C, A(tail_.HW));
    unpad_rows(static_cast<A*>(tail_.squeeze) + sample, squeeze, ld, S, C);
    gate_.excite(squeeze, hidden, gate);
    gate_.select(gate);
    A* attention = static_cast<A*>(tail_.attention) + sample;
    unpad_rows(attention, gate, ld, S, C);
    if (!has_scale_) return;
    for (int64_t i = 0; i < S * C; ++i) {
      weights_.get()[sample + i] = attention[i] * scales_.get()[i];
    }
  }

  void write(int64_t b, int64_t t) const { write_task(walk_, writing_, b, t); }

 private:
  const Tail& tail_;
  const Walk& walk_;
  const Gate<A> gate_;
  const Buffer<A> scales_, offsets_, weights_;
  const bool has_scale_;
  Writing<T> writing_;
};

template <class T>
class Backward {
 public:
  using A = Acc<T>;

  Backward(const Tail& tail, const Gradients& gradients, const Walk& walk, const Strided* parts)
      : tail_(tail),
        gradients_(gradients),
        walk_(walk),
        gate_(tail.se, tail.S, tail.C),
        spread_(tail.B * tail.S * tail.C),
        rows_(gradients.fc ? tail.B * tail.S * (2 * gate_.R + gate_.ld) : 0) {
    const A* attention = static_cast<A*>(tail.attention);
    writing_ = {gradients.branches, parts, attention, spread_.get(), tail.S * tail.C, false};
  }

  int64_t scratch_size() const { return gate_.S * (5 * gate_.ld + 2 * gate_.R); }

  void sum(int64_t b, int64_t t, A* sums) const { sum_task<true, T>(walk_, tail_, b, t, sums); }

  void gate(int64_t b, const A* sums, A* scratch) const {
    const int64_t S = gate_.S, C = gate_.C, ld = gate_.ld, R = gate_.R, sample = b * S * C;
    A *squeeze = scratch, *attention = squeeze + S * ld, *grad = attention + S * ld;
    A *gate = grad + S * ld, *pre2 = gate + S * ld, *hidden = pre2 + S * ld, *pre1 = hidden + S * R;
    pad_rows(squeeze, ld, static_cast<const A*>(tail_.squeeze) + sample, S, C);
    pad_rows(attention, ld, static_cast<const A*>(tail_.attention) + sample, S, C);
    add_up(grad, ld, sums, walk_.sums, S, C, A(1));
    gate_.excite(squeeze, hidden, gate);
    gate_.back(grad, attention, hidden, gate, pre1, pre2);
    for (int64_t i = 0; i < S * ld; i += kLanes<A>) store(grad + i, load(grad + i) / A(tail_.HW));
    unpad_rows(spread_.get() + sample, grad, ld, S, C);
    if (!gradients_.fc) return;
    __builtin_memcpy(hidden_rows() + b * S * R, hidden, size_t(S * R) * sizeof(A));
    __builtin_memcpy(pre1_rows() + b * S * R, pre1, size_t(S * R) * sizeof(A));
    __builtin_memcpy(pre2_rows() + b * S * ld, pre2, size_t(S * ld) * sizeof(A));
  }

  void write(int64_t b, int64_t t) const {
    if (gradients_.branches) write_task(walk_, writing_, b, t);
  }

  // The fc gradients: sums over the N = B * S rows, in their order.
  void write_fc(const Threads& threads) const {
    const int64_t N = tail_.B * gate_.S, C = gate_.C, R = gate_.R, ld = gate_.ld;
    Buffer<A> grads(2 * R * C + R + C);
    A *fc1 = grads.get(), *fc2 = fc1 + R * C, *fc1_bias = fc2 + R * C, *fc2_bias = fc1_bias + R;
    const A* squeeze = static_cast<const A*>(tail_.squeeze);
    const int64_t grain = max(1, kGrain / (2 * N * C + 1));
    parallel(threads, R, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        sum_rows(fc1 + r * C, C, N, pre1_rows() + r, R, squeeze, C);
        sum_rows(fc2 + r * C, C, N, hidden_rows() + r, R, pre2_rows(), ld);
        fc1_bias[r] = 0;
        for (int64_t n = 0; n < N; ++n) fc1_bias[r] += pre1_rows()[n * R + r];
      }
    });
    const A one = 1;
    sum_rows(fc2_bias, C, N, &one, 0, pre2_rows(), ld);
    PSA_NAMESPACE::write(gradients_.fc1_weight, R, C, fc1, C, 1);
    PSA_NAMESPACE::write(gradients_.fc2_weight, C, R, fc2, 1, C);
    PSA_NAMESPACE::write(gradients_.fc1_bias, R, 1, fc1_bias, 1, 0);
    PSA_NAMESPACE::write(gradients_.fc2_bias, C, 1, fc2_bias, 1, 0);
  }

 private:
  A* hidden_rows() const { return rows_.get(); }
  A* pre1_rows() const { return hidden_rows() + tail_.B * gate_.S * gate_.R; }
  A* pre2_rows() const { return pre1_rows() + tail_.B * gate_.S * gate_.R; }

  // to[c] = the sum over n of factors[n * stride] * rows[n * ld + c].
  static void sum_rows(A* to, int64_t C, int64_t N, const A* factors, int64_t stride, const A* rows,
                       int64_t ld) {
    cover<A>(
        C,
        [&](int64_t c) {
          Vec<A> sum{};
          for (int64_t n = 0; n < N; ++n) sum += load(rows + n * ld + c) * factors[n * stride];
          store(to + c, sum);
        },
        [&](int64_t c) {
          A sum = 0;
          for (int64_t n = 0; n < N; ++n) sum += rows[n * ld + c] * factors[n * stride];
          to[c] = sum;
        });
  }

  const Tail& tail_;
  const Gradients& gradients_;
  const Walk& walk_;
  const Gate<A> gate_;
  const Buffer<A> spread_;  // (B, S, C): the gradient of the squeeze, over HW
  const Buffer<A> rows_;    // (B * S, R), (B * S, R) and (B * S, ld)
  Writing<T> writing_;
};

struct Parts : Buffer<Strided> {
  explicit Parts(const Tail& tail) : Buffer(tail.S) {
    for (int64_t s = 0; s < tail.S; ++s) get()[s] = part_of(tail, s);
  }
};

void forward(const Tail& tail, const Epilogue& epilogue, const Threads& threads) {
  with_type(tail.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Walk walk(tail, tail.cat.channel == 1);
    const Parts parts(tail);
    const Forward<T> pass(tail, epilogue, walk, parts.get());
    run<Acc<T>>(pass, walk, tail.B, pass.scratch_size(), threads);
  });
}

void backward(const Tail& tail, const Gradients& gradients, const Threads& threads) {
  with_type(tail.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Strided* written = gradients.branches ? gradients.branches : tail.branches;
    const Walk walk(tail, all_channels_inner(written, tail.S));
    const Parts parts(tail);
    const Backward<T> pass(tail, gradients, walk, parts.get());
    run<Acc<T>>(pass, walk, tail.B, pass.scratch_size(), threads);
    if (gradients.fc) pass.write_fc(threads);
  });
}

}  // namespace psa::cpu::PSA_NAMESPACE
