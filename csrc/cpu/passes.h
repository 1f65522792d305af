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
        gate_(tail, gradients.fc),
        spread_(tail.B * tail.S * tail.C) {
    const A* attention = static_cast<A*>(tail.attention);
    writing_ = {gradients.branches, parts, attention, spread_.get(), tail.S * tail.C, false};
  }

  int64_t scratch_size() const { return gate_.scratch_size(); }

  void sum(int64_t b, int64_t t, A* sums) const { sum_task<true, T>(walk_, tail_, b, t, sums); }

  void gate(int64_t b, const A* sums, A* grad) const {
    const int64_t S = tail_.S, C = tail_.C, ld = gate_.ld;
    add_up(grad, ld, sums, walk_.sums, S, C, A(1));
    gate_.back(b, grad);
    for (int64_t i = 0; i < S * ld; i += kLanes<A>) store(grad + i, load(grad + i) / A(tail_.HW));
    unpad_rows(spread_.get() + b * S * C, grad, ld, S, C);
  }

  void write(int64_t b, int64_t t) const {
    if (gradients_.branches) write_task(walk_, writing_, b, t);
  }

  void write_fc(const Threads& threads) const { gate_.write_fc(gradients_, threads); }

 private:
  const Tail& tail_;
  const Gradients& gradients_;
  const Walk& walk_;
  const GateBackward<A> gate_;
  const Buffer<A> spread_;  // (B, S, C): the gradient of the squeeze, over HW
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
    run<Acc<T>>(pass, walk, tail.B, threads);
  });
}

void backward(const Tail& tail, const Gradients& gradients, const Threads& threads) {
  with_type(tail.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Strided* written = gradients.branches ? gradients.branches : tail.branches;
    const Walk walk(tail, all_channels_inner(written, tail.S));
    const Parts parts(tail);
    const Backward<T> pass(tail, gradients, walk, parts.get());
    run<Acc<T>>(pass, walk, tail.B, threads);
    if (gradients.fc) pass.write_fc(threads);
  });
}

}  // namespace psa::cpu::PSA_NAMESPACE
