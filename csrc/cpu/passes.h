// psa_tail's forward and backward, and their entry points for one instruction set.

namespace psa::cpu::PSA_NAMESPACE {

template <class T>
class Forward {
 public:
  using A = Acc<T>;

  Forward(const Tail& tail, const Epilogue& epilogue, const Schedule& schedule,
          const Strided* concat_slices)
      : tail_(tail),
        schedule_(schedule),
        se_(tail.se, tail.S, tail.C),
        scales_(epilogue.scale.data ? tail.S * tail.C : 0),
        shifts_(epilogue.shift.data ? tail.S * tail.C : 0),
        weights_(epilogue.scale.data ? tail.B * tail.S * tail.C : 0),
        has_scale_(epilogue.scale.data) {
    read_concat_vector(scales_.get(), epilogue.scale, tail);
    read_concat_vector(shifts_.get(), epilogue.shift, tail);
    const A* attention = static_cast<A*>(tail.attention);
    const A* shifts = epilogue.shift.data ? shifts_.get() : nullptr;
    scale_args_ = {concat_slices, tail.branches, has_scale_ ? weights_.get() : attention, shifts, 0,
                   epilogue.relu};
  }

  int64_t scratch_size() const { return se_.S * (2 * se_.ld + se_.R); }

  void sum(int64_t b, int64_t t, A* sums) const {
    sum_task<false, T>(schedule_, tail_, b, t, sums);
  }

  void excite(int64_t b, const A* sums, A* scratch) const {
    const int64_t S = se_.S, C = se_.C, ld = se_.ld, sample = b * S * C;
    A *squeeze = scratch, *gate = squeeze + S * ld, *hidden = gate + S * ld;
    sum_partials(squeeze, ld, sums, schedule_.partials, S, C, A(tail_.HW));
    unpad_rows(static_cast<A*>(tail_.squeeze) + sample, squeeze, ld, S, C);
    se_.excite(squeeze, hidden, gate);
    se_.select(gate);
    A* attention = static_cast<A*>(tail_.attention) + sample;
    unpad_rows(attention, gate, ld, S, C);
    if (!has_scale_) return;
    for (int64_t i = 0; i < S * C; ++i) {
      weights_.get()[sample + i] = attention[i] * scales_.get()[i];
    }
  }

  void write(int64_t b, int64_t t) const { scale_task(schedule_, scale_args_, b, t); }

 private:
  const Tail& tail_;
  const Schedule& schedule_;
  const SEModule<A> se_;
  const Buffer<A> scales_, shifts_, weights_;
  const bool has_scale_;
  ScaleArgs<T> scale_args_;
};

template <class T>
class Backward {
 public:
  using A = Acc<T>;

  Backward(const Tail& tail, const Gradients& gradients, const Schedule& schedule,
           const Strided* concat_slices)
      : tail_(tail),
        gradients_(gradients),
        schedule_(schedule),
        se_(tail, gradients.fc),
        grad_mean_(tail.B * tail.S * tail.C) {
    const A* attention = static_cast<A*>(tail.attention);
    scale_args_ = {gradients.branches, concat_slices,   attention,
                   grad_mean_.get(),   tail.S * tail.C, false};
  }

  int64_t scratch_size() const { return se_.scratch_size(); }

  void sum(int64_t b, int64_t t, A* sums) const { sum_task<true, T>(schedule_, tail_, b, t, sums); }

  void excite(int64_t b, const A* sums, A* grad) const {
    const int64_t S = tail_.S, C = tail_.C, ld = se_.ld;
    sum_partials(grad, ld, sums, schedule_.partials, S, C, A(1));
    se_.backward(b, grad);
    for (int64_t i = 0; i < S * ld; i += kLanes<A>) store(grad + i, load(grad + i) / A(tail_.HW));
    unpad_rows(grad_mean_.get() + b * S * C, grad, ld, S, C);
  }

  void write(int64_t b, int64_t t) const {
    if (gradients_.branches) scale_task(schedule_, scale_args_, b, t);
  }

  void write_fc(const Threads& threads) const { se_.write_fc(gradients_, threads); }

 private:
  const Tail& tail_;
  const Gradients& gradients_;
  const Schedule& schedule_;
  const SEBackward<A> se_;
  const Buffer<A> grad_mean_;  // (B, S, C): the gradient of squeeze over HW
  ScaleArgs<T> scale_args_;
};

// concat_slice for each branch.
struct ConcatSlices : Buffer<Strided> {
  explicit ConcatSlices(const Tail& tail) : Buffer(tail.S) {
    for (int64_t s = 0; s < tail.S; ++s) get()[s] = concat_slice(tail, s);
  }
};

void forward(const Tail& tail, const Epilogue& epilogue, const Threads& threads) {
  with_type(tail.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Schedule schedule(tail, tail.concat.channel == 1);
    const ConcatSlices concat_slices(tail);
    const Forward<T> pass(tail, epilogue, schedule, concat_slices.get());
    run_pass<Acc<T>>(pass, schedule, tail.B, threads);
  });
}

void backward(const Tail& tail, const Gradients& gradients, const Threads& threads) {
  with_type(tail.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Strided* written = gradients.branches ? gradients.branches : tail.branches;
    const Schedule schedule(tail, all_channels_inner(written, tail.S));
    const ConcatSlices concat_slices(tail);
    const Backward<T> pass(tail, gradients, schedule, concat_slices.get());
    run_pass<Acc<T>>(pass, schedule, tail.B, threads);
    if (gradients.fc) pass.write_fc(threads);
  });
}

}  // namespace psa::cpu::PSA_NAMESPACE
