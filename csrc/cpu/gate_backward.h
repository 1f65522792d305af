// The gate's way back, for all samples, and the gradients of the fc tensors.

namespace psa::cpu::PSA_NAMESPACE {

template <class A>
class GateBackward {
 public:
  GateBackward(const Tail& tail, bool fc_grads)
      : ld(padded<A>(tail.C)),
        tail_(tail),
        gate_(tail.se, tail.S, tail.C),
        rows_(fc_grads ? tail.B * tail.S * (2 * gate_.R + ld) : 0) {}

  int64_t scratch_size() const { return gate_.S * (5 * ld + 2 * gate_.R); }

  // The gradient of sample b's attention, (S, ld) at the start of scratch, becomes that of its
  // squeeze.
  void back(int64_t b, A* scratch) const {
    const int64_t S = gate_.S, C = gate_.C, R = gate_.R, sample = b * S * C;
    A *grad = scratch, *squeeze = grad + S * ld, *attention = squeeze + S * ld;
    A *gate = attention + S * ld, *pre2 = gate + S * ld, *hidden = pre2 + S * ld;
    A* pre1 = hidden + S * R;
    pad_rows(squeeze, ld, static_cast<const A*>(tail_.squeeze) + sample, S, C);
    pad_rows(attention, ld, static_cast<const A*>(tail_.attention) + sample, S, C);
    gate_.excite(squeeze, hidden, gate);
    gate_.back(grad, attention, hidden, gate, pre1, pre2);
    if (!rows_.get()) return;
    __builtin_memcpy(hidden_rows() + b * S * R, hidden, size_t(S * R) * sizeof(A));
    __builtin_memcpy(pre1_rows() + b * S * R, pre1, size_t(S * R) * sizeof(A));
    __builtin_memcpy(pre2_rows() + b * S * ld, pre2, size_t(S * ld) * sizeof(A));
  }

  // The fc gradients: sums over the N = B * S rows, in their order.
  void write_fc(const Gradients& gradients, const Threads& threads) const {
    const int64_t N = tail_.B * gate_.S, C = gate_.C, R = gate_.R;
    Buffer<A> grads(2 * R * C + R + C);
    A *fc1 = grads.get(), *fc2 = fc1 + R * C, *fc1_bias = fc2 + R * C, *fc2_bias = fc1_bias + R;
    const A* squeeze = static_cast<const A*>(tail_.squeeze);
    parallel(threads, R, grain(2 * N * C + 1), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        sum_rows(fc1 + r * C, C, N, pre1_rows() + r, R, squeeze, C);
        sum_rows(fc2 + r * C, C, N, hidden_rows() + r, R, pre2_rows(), ld);
        fc1_bias[r] = 0;
        for (int64_t n = 0; n < N; ++n) fc1_bias[r] += pre1_rows()[n * R + r];
      }
    });
    const A one = 1;
    sum_rows(fc2_bias, C, N, &one, 0, pre2_rows(), ld);
    write(gradients.fc1_weight, R, C, fc1, C, 1);
    write(gradients.fc2_weight, C, R, fc2, 1, C);
    write(gradients.fc1_bias, R, 1, fc1_bias, 1, 0);
    write(gradients.fc2_bias, C, 1, fc2_bias, 1, 0);
  }

  const int64_t ld;

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
  const Gate<A> gate_;
  const Buffer<A> rows_;  // (B * S, R), (B * S, R) and (B * S, ld)
};

}  // namespace psa::cpu::PSA_NAMESPACE
