// The backward of the SE module for all samples, with the gradients of the fc tensors.

namespace psa::cpu::PSA_NAMESPACE {

template <class A>
class SEBackward {
 public:
  SEBackward(const Tail& tail, bool fc_grads)
      : ld(padded<A>(tail.C)),
        tail_(tail),
        se_(tail.se, tail.S, tail.C),
        rows_(fc_grads ? tail.B * tail.S * (2 * se_.R + ld) : 0) {}

  int64_t scratch_size() const { return se_.S * (5 * ld + 2 * se_.R); }

  // Replaces the gradient of sample b's attention, (S, ld) at the start of scratch, by that of its
  // squeeze.
  void backward(int64_t b, A* scratch) const {
    const int64_t S = se_.S, C = se_.C, R = se_.R, sample = b * S * C;
    A *grad = scratch, *squeeze = grad + S * ld, *attention = squeeze + S * ld;
    A *gate = attention + S * ld, *grad_pre2 = gate + S * ld, *hidden = grad_pre2 + S * ld;
    A* grad_pre1 = hidden + S * R;
    pad_rows(squeeze, ld, static_cast<const A*>(tail_.squeeze) + sample, S, C);
    pad_rows(attention, ld, static_cast<const A*>(tail_.attention) + sample, S, C);
    se_.excite(squeeze, hidden, gate);
    se_.backward(grad, attention, hidden, gate, grad_pre1, grad_pre2);
    if (!rows_.get()) return;
    __builtin_memcpy(hidden_rows() + b * S * R, hidden, size_t(S * R) * sizeof(A));
    __builtin_memcpy(grad_pre1_rows() + b * S * R, grad_pre1, size_t(S * R) * sizeof(A));
    __builtin_memcpy(grad_pre2_rows() + b * S * ld, grad_pre2, size_t(S * ld) * sizeof(A));
  }

  // Writes the fc gradients: sums over the B * S rows, or over each branch's B rows, in their
  // order.
  void write_fc(const Gradients& gradients, const Threads& threads) const {
    for (int64_t i = 0; i < se_.modules; ++i) write_module(i, gradients, threads);
  }

  const int64_t ld;

 private:
  // Module i has every `step`th row.
  void write_module(int64_t i, const Gradients& gradients, const Threads& threads) const {
    const int64_t C = se_.C, R = se_.R, step = se_.modules, N = tail_.B * se_.S / step;
    Buffer<A> grads(2 * R * C + R + C);
    A *fc1 = grads.get(), *fc2 = fc1 + R * C, *fc1_bias = fc2 + R * C, *fc2_bias = fc1_bias + R;
    const A *squeeze = static_cast<const A*>(tail_.squeeze) + i * C,
            *hidden = hidden_rows() + i * R, *grad_pre1 = grad_pre1_rows() + i * R,
            *grad_pre2 = grad_pre2_rows() + i * ld;
    parallel(threads, R, grain(2 * N * C + 1), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        sum_rows(fc1 + r * C, C, N, grad_pre1 + r, step * R, squeeze, step * C);
        sum_rows(fc2 + r * C, C, N, hidden + r, step * R, grad_pre2, step * ld);
        fc1_bias[r] = 0;
        for (int64_t n = 0; n < N; ++n) fc1_bias[r] += grad_pre1[n * step * R + r];
      }
    });
    const A one = 1;
    sum_rows(fc2_bias, C, N, &one, 0, grad_pre2, step * ld);
    write_matrix(of_branch(gradients.fc1_weight, i), R, C, fc1, C, 1);
    write_matrix(of_branch(gradients.fc2_weight, i), C, R, fc2, 1, C);
    write_matrix(of_branch(gradients.fc1_bias, i), R, 1, fc1_bias, 1, 0);
    write_matrix(of_branch(gradients.fc2_bias, i), C, 1, fc2_bias, 1, 0);
  }

  A* hidden_rows() const { return rows_.get(); }
  A* grad_pre1_rows() const { return hidden_rows() + tail_.B * se_.S * se_.R; }
  A* grad_pre2_rows() const { return grad_pre1_rows() + tail_.B * se_.S * se_.R; }

  // to[c] = sum over n of factors[n * stride] * rows[n * ld + c].
  static void sum_rows(A* to, int64_t C, int64_t N, const A* factors, int64_t stride, const A* rows,
                       int64_t ld) {
    for_each_vector<A>(
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
  const SEModule<A> se_;
  const Buffer<A> rows_;  // hidden (B * S, R), grad_pre1 (B * S, R) and grad_pre2 (B * S, ld)
};

}  // namespace psa::cpu::PSA_NAMESPACE
