// psa_tail_norm: the tail, a batch norm and a ReLU, forward and backward. The batch's statistics
// need the sums of all samples, so each step runs for all samples before the next.
//
// The mean and m2 of the tail's output attention * x follow from those of x, so the output itself
// is never stored. All formulas use x - squeeze: if the mean is large, sums of x itself would
// cancel.

namespace psa::cpu::PSA_NAMESPACE {

// Shared by forward and backward. Rows (S, C) are in the order of the branches.
template <class T>
class NormPass {
 public:
  using A = Acc<T>;

  NormPass(const Tail& tail, const Norm& norm, const Schedule& schedule,
           const Strided* concat_slices)
      : SC(tail.S * tail.C),
        n(tail.B * tail.HW),
        tail_(tail),
        norm_(norm),
        schedule_(schedule),
        concat_slices_(concat_slices),
        gamma_(SC),
        beta_(SC),
        scale_(SC),
        mean_(SC),
        params_(4 * tail.B * SC) {
    for (int64_t i = 0; i < SC; ++i) {
      gamma_.get()[i] = 1;
      beta_.get()[i] = 0;
    }
    read_concat_vector(gamma_.get(), norm.gamma, tail);
    read_concat_vector(beta_.get(), norm.beta, tail);
  }

  int64_t sums_size() const { return 2 * schedule_.partials * SC; }

 protected:
  const A* squeeze(int64_t b) const { return static_cast<A*>(tail_.squeeze) + b * SC; }
  const A* attention(int64_t b) const { return static_cast<A*>(tail_.attention) + b * SC; }
  const A* m2(int64_t b) const { return static_cast<A*>(norm_.m2) + b * SC; }
  A* param(ChannelParam k, int64_t b) const { return params_.get() + ((k - 1) * tail_.B + b) * SC; }

  ChannelParams<A> channels(int64_t b) const {
    return {squeeze(b), param(kWeight, b), param(kShift, b), param(kFactor, b),
            param(kGradMean, b)};
  }

  // The index of row element i = (s, c) among concat's channels.
  int64_t concat_index(int64_t i) const {
    return (tail_.S - 1 - i / tail_.C) * tail_.C + i % tail_.C;
  }

  A invstd(int64_t i) const {
    const double var = static_cast<const A*>(norm_.var)[concat_index(i)];
    return A(1 / __builtin_sqrt(var + norm_.eps));
  }

  // Sets scale and mean from the batch's statistics.
  void set_scale() const {
    for (int64_t i = 0; i < SC; ++i) {
      scale_.get()[i] = invstd(i) * gamma_.get()[i];
      mean_.get()[i] = static_cast<const A*>(norm_.mean)[concat_index(i)];
    }
  }

  // The mean of the tail's output in this sample less that in the batch; double, since the two may
  // be nearly equal.
  A offset(int64_t b, int64_t i) const {
    return A(double(attention(b)[i]) * double(squeeze(b)[i]) - double(mean_.get()[i]));
  }

  // Sets weight and shift, so that the norm is weight * (x - squeeze) + shift.
  void set_affine(int64_t b) const {
    for (int64_t i = 0; i < SC; ++i) {
      param(kWeight, b)[i] = attention(b)[i] * scale_.get()[i];
      param(kShift, b)[i] = offset(b, i) * scale_.get()[i] + beta_.get()[i];
    }
  }

  const int64_t SC, n;
  const Tail& tail_;
  const Norm& norm_;
  const Schedule& schedule_;
  const Strided* concat_slices_;
  const Buffer<A> gamma_, beta_, scale_, mean_;

 private:
  const Buffer<A> params_;  // (4, B, S, C): each ChannelParam but kMean, which is squeeze
};

template <class T>
class NormForward : public NormPass<T> {
 public:
  using A = Acc<T>;

  NormForward(const Tail& tail, const Norm& norm, const Schedule& schedule,
              const Strided* concat_slices)
      : NormPass<T>(tail, norm, schedule, concat_slices), se_(tail.se, tail.S, tail.C) {}

  int64_t scratch_size() const { return SC + se_.S * (2 * se_.ld + se_.R); }

  // Sums the differences to the first pixel, then the squared differences to the task's own mean.
  void sum(int64_t b, int64_t t, A* sums) const {
    const Range range = channels_of_task(t);
    Buffer<A> means(SC);
    first_pixels(b, range, means.get());
    const ChannelParams<A> params{means.get()};
    reduce_task<SumOfDifferences, T>(schedule_, tail_, params, b, t, sums);
    const A* task_sums = sums + (schedule_.channels_inner ? t * SC : 0);
    for (int64_t i = range.begin; i < range.end; ++i) {
      means.get()[i] += task_sums[i] / A(pixels(t));
    }
    reduce_task<SumOfSquares, T>(schedule_, tail_, params, b, t, sums + schedule_.partials * SC);
  }

  void excite(int64_t b, const A* sums, A* scratch) const {
    const int64_t S = se_.S, C = se_.C, ld = se_.ld;
    A *squeeze = scratch, *padded_squeeze = squeeze + SC, *gate = padded_squeeze + S * ld;
    A* hidden = gate + S * ld;
    merge_partials(b, sums, squeeze, static_cast<A*>(norm_.m2) + b * SC);
    __builtin_memcpy(static_cast<A*>(tail_.squeeze) + b * SC, squeeze, size_t(SC) * sizeof(A));
    pad_rows(padded_squeeze, ld, squeeze, S, C);
    se_.excite(padded_squeeze, hidden, gate);
    se_.select(gate);
    unpad_rows(static_cast<A*>(tail_.attention) + b * SC, gate, ld, S, C);
  }

  // Computes the batch's statistics, then weight and shift for each sample.
  void normalize(const Threads& threads) const {
    parallel(threads, SC, grain(2 * tail_.B), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) set_statistics(i);
    });
    this->set_scale();
    for (int64_t b = 0; b < tail_.B; ++b) this->set_affine(b);
  }

  void write(int64_t b, int64_t t) const {
    map_task<Output, T>(schedule_, tail_, this->concat_slices_, this->channels(b), b, t);
  }

 private:
  using NormPass<T>::SC;
  using NormPass<T>::tail_;
  using NormPass<T>::norm_;
  using NormPass<T>::schedule_;

  struct Range {
    int64_t begin, end;
  };

  // The elements (s, c) that task t sums, and over how many pixels.
  Range channels_of_task(int64_t t) const {
    if (schedule_.channels_inner) return {0, SC};
    const auto [s, begin, end] = schedule_.rows(t);
    return {s * schedule_.C + begin, s * schedule_.C + end};
  }
  int64_t pixels(int64_t t) const {
    if (!schedule_.channels_inner) return schedule_.HW;
    const auto [begin, end] = schedule_.pixels(t);
    return end - begin;
  }

  // rows[i] = the first pixel, a number near the mean; 0 if it is infinite or NaN.
  void first_pixels(int64_t b, Range range, A* rows) const {
    const int64_t C = tail_.C;
    for (int64_t s = 0; s < tail_.S; ++s) {
      const T* from = at<T>(tail_.branches[s], b, 0, 0);
      const int64_t stride = tail_.branches[s].channel;
      for (int64_t i = max(range.begin, s * C); i < min(range.end, (s + 1) * C); ++i) {
        const A first = to_acc(from[(i - s * C) * stride]);
        rows[i] = first - first == 0 ? first : A(0);
      }
    }
  }

  // Merges the tasks' sums into the sample's mean (squeeze) and m2, by Chan's formula.
  void merge_partials(int64_t b, const A* sums, A* squeeze, A* m2) const {
    first_pixels(b, {0, SC}, squeeze);
    const A* task_m2 = sums + schedule_.partials * SC;
    for (int64_t i = 0; i < SC; ++i) {
      A total = 0, total_m2 = 0;
      for (int64_t t = 0; t < schedule_.partials; ++t) total += sums[t * SC + i];
      const A mean = total / A(tail_.HW);
      for (int64_t t = 0; t < schedule_.partials; ++t) {
        const A size = A(pixels(t)), delta = sums[t * SC + i] / size - mean;
        total_m2 += task_m2[t * SC + i] + size * delta * delta;
      }
      squeeze[i] += mean;
      m2[i] = total_m2;
    }
  }

  // Sets the batch's mean and var of channel i.
  void set_statistics(int64_t i) const {
    double mean = 0, var = 0;
    const auto mean_of = [&](int64_t b) {
      return double(this->attention(b)[i]) * double(this->squeeze(b)[i]);
    };
    for (int64_t b = 0; b < tail_.B; ++b) mean += mean_of(b);
    mean /= double(tail_.B);
    for (int64_t b = 0; b < tail_.B; ++b) {
      const double a = this->attention(b)[i], delta = mean_of(b) - mean;
      var += a * a * double(this->m2(b)[i]) + double(tail_.HW) * delta * delta;
    }
    static_cast<A*>(norm_.mean)[this->concat_index(i)] = A(mean);
    static_cast<A*>(norm_.var)[this->concat_index(i)] = A(var / double(this->n));
  }

  const SEModule<A> se_;
};

template <class T>
class NormBackward : public NormPass<T> {
 public:
  using A = Acc<T>;

  NormBackward(const Tail& tail, const Norm& norm, const NormGradients& gradients,
               const Schedule& schedule, const Strided* concat_slices)
      : NormPass<T>(tail, norm, schedule, concat_slices),
        gradients_(gradients),
        se_(tail, gradients.tail.fc),
        grad_gamma_(SC),
        grad_beta_(SC),
        slope_(SC) {
    this->set_scale();
    for (int64_t b = 0; b < tail.B; ++b) this->set_affine(b);
  }

  int64_t scratch_size() const { return se_.scratch_size(); }

  void sum(int64_t b, int64_t t, A* sums) const {
    reduce_task<SumsOfGradient, T>(schedule_, tail_, this->channels(b), b, t, sums);
  }

  // Computes and writes the gradients of gamma and beta.
  void norm_gradients(A* all_sums, const Threads& threads) const {
    parallel(threads, SC, grain(4 * tail_.B * schedule_.partials), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) set_norm_gradients(i, all_sums);
    });
    write_concat_vector(gradients_.gamma, grad_gamma_.get(), tail_);
    write_concat_vector(gradients_.beta, grad_beta_.get(), tail_);
  }

  void excite(int64_t b, const A* sums, A* grad) const {
    const int64_t C = tail_.C, ld = se_.ld;
    const A *products = sums + schedule_.partials * SC, HW = A(tail_.HW);
    const A *a = this->attention(b), *m = this->squeeze(b), *weight = this->param(kWeight, b);
    A *factor = this->param(kFactor, b), *grad_mean = this->param(kGradMean, b);
    for (int64_t s = 0; s < tail_.S; ++s, grad += ld) {
      for (int64_t i = s * C; i < (s + 1) * C; ++i) {
        const A slope = slope_.get()[i];
        // The norm subtracts this from each pixel's gradient at x = squeeze, before weight.
        const A grad_const = grad_beta_.get()[i] / A(this->n) + this->offset(b, i) * slope;
        const A centered = products[i] - slope * a[i] * this->m2(b)[i];
        grad[i - s * C] = this->scale_.get()[i] * (centered + m[i] * (sums[i] - HW * grad_const));
        factor[i] = -weight[i] * a[i] * slope;
        grad_mean[i] = -weight[i] * grad_const;
      }
      __builtin_memset(grad + C, 0, size_t(ld - C) * sizeof(A));
    }
    grad -= tail_.S * ld;
    se_.backward(b, grad);
    for (int64_t s = 0; s < tail_.S; ++s) {
      for (int64_t c = 0; c < C; ++c) grad_mean[s * C + c] += grad[s * ld + c] / HW;
    }
  }

  void write(int64_t b, int64_t t) const {
    map_task<InputGradient, T>(schedule_, tail_, gradients_.tail.branches, this->channels(b), b, t);
  }

  void write_fc(const Threads& threads) const { se_.write_fc(gradients_.tail, threads); }

 private:
  using NormPass<T>::SC;
  using NormPass<T>::tail_;
  using NormPass<T>::schedule_;

  // Sets channel i's gradients of gamma and beta. Adds each sample's partial sums into the first.
  void set_norm_gradients(int64_t i, A* all_sums) const {
    double gamma = 0, beta = 0;
    for (int64_t b = 0; b < tail_.B; ++b) {
      A* sums = all_sums + b * this->sums_size() + i;
      A* products = sums + schedule_.partials * SC;
      for (int64_t t = 1; t < schedule_.partials; ++t) {
        sums[0] += sums[t * SC];
        products[0] += products[t * SC];
      }
      beta += double(sums[0]);
      gamma += double(this->attention(b)[i]) * double(products[0]) +
               double(this->offset(b, i)) * double(sums[0]);
    }
    const double invstd = this->invstd(i);
    grad_gamma_.get()[i] = A(gamma * invstd);
    grad_beta_.get()[i] = A(beta);
    slope_.get()[i] = A(gamma * invstd * invstd / double(this->n));
  }

  const NormGradients& gradients_;
  const SEBackward<A> se_;
  const Buffer<A> grad_gamma_, grad_beta_;
  const Buffer<A> slope_;  // (S, C): invstd * grad_gamma / n
};

void norm_forward(const Tail& tail, const Norm& norm, const Threads& threads) {
  with_type(tail.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Schedule schedule(tail, tail.concat.channel == 1);
    const ConcatSlices concat_slices(tail);
    const NormForward<T> pass(tail, norm, schedule, concat_slices.get());
    const int64_t size = pass.sums_size();
    Buffer<Acc<T>> sums(tail.B * size);
    sum_all(pass, schedule, tail.B, sums.get(), size, threads);
    excite_all(pass, schedule, tail.B, sums.get(), size, threads);
    pass.normalize(threads);
    write_all(pass, schedule, tail.B, threads);
  });
}

void norm_backward(const Tail& tail, const Norm& norm, const NormGradients& gradients,
                   const Threads& threads) {
  with_type(tail.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Gradients& of_tail = gradients.tail;
    const Strided* written = of_tail.branches ? of_tail.branches : tail.branches;
    const Schedule schedule(tail, all_channels_inner(written, tail.S));
    const ConcatSlices concat_slices(tail);
    const NormBackward<T> pass(tail, norm, gradients, schedule, concat_slices.get());
    const int64_t size = pass.sums_size();
    Buffer<Acc<T>> sums(tail.B * size);
    sum_all(pass, schedule, tail.B, sums.get(), size, threads);
    pass.norm_gradients(sums.get(), threads);
    if (!of_tail.branches && !of_tail.fc) return;
    excite_all(pass, schedule, tail.B, sums.get(), size, threads);
    if (of_tail.branches) write_all(pass, schedule, tail.B, threads);
    if (of_tail.fc) pass.write_fc(threads);
  });
}

}  // namespace psa::cpu::PSA_NAMESPACE
