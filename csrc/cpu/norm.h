// psa_tail_norm: the tail, a norm by the batch's statistics and relu, forward and backward. What
// the statistics are is known once every sample has been summed, so each step is for all samples.
//
// Mean and deviation of the tail's output a * x follow from those of x, so it is nowhere in memory.
// All is in terms of x less its mean over the sample's pixels: where that is large, sums of x
// itself would cancel.

namespace psa::cpu::PSA_NAMESPACE {

// What forward and backward share. Rows are (S, C) in the branches' order.
template <class T>
class NormPass {
 public:
  using A = Acc<T>;

  NormPass(const Tail& tail, const Norm& norm, const Walk& walk, const Strided* parts)
      : SC(tail.S * tail.C),
        n(tail.B * tail.HW),
        tail_(tail),
        norm_(norm),
        walk_(walk),
        parts_(parts),
        gamma_(SC),
        beta_(SC),
        scale_(SC),
        mean_(SC),
        known_(4 * tail.B * SC) {
    for (int64_t i = 0; i < SC; ++i) {
      gamma_.get()[i] = 1;
      beta_.get()[i] = 0;
    }
    by_branch(gamma_.get(), norm.gamma);
    by_branch(beta_.get(), norm.beta);
  }

  int64_t sums_size() const { return 2 * walk_.sums * SC; }

 protected:
  const A* squeeze(int64_t b) const { return static_cast<A*>(tail_.squeeze) + b * SC; }
  const A* attention(int64_t b) const { return static_cast<A*>(tail_.attention) + b * SC; }
  const A* deviation(int64_t b) const { return static_cast<A*>(norm_.deviation) + b * SC; }
  A* known(Known k, int64_t b) const { return known_.get() + ((k - 1) * tail_.B + b) * SC; }

  Channels<A> channels(int64_t b) const {
    return {squeeze(b), known(kWeight, b), known(kShift, b), known(kFactor, b), known(kSpread, b)};
  }

  // Where row i, of branch s and channel c, is among the output's channels.
  int64_t in_cat(int64_t i) const { return (tail_.S - 1 - i / tail_.C) * tail_.C + i % tail_.C; }

  A invstd(int64_t i) const {
    const double var = static_cast<const A*>(norm_.var)[in_cat(i)];
    return A(1 / __builtin_sqrt(var + norm_.eps));
  }

  // Scale and mean, once the statistics are there.
  void set_scale() const {
    for (int64_t i = 0; i < SC; ++i) {
      scale_.get()[i] = invstd(i) * gamma_.get()[i];
      mean_.get()[i] = static_cast<const A*>(norm_.mean)[in_cat(i)];
    }
  }

  // How far the sample's mean of the tail's output is from the batch's: often a small difference.
  A offset(int64_t b, int64_t i) const {
    return A(double(attention(b)[i]) * double(squeeze(b)[i]) - double(mean_.get()[i]));
  }

  // The norm as weight * (x - squeeze) + shift.
  void set_affine(int64_t b) const {
    for (int64_t i = 0; i < SC; ++i) {
      known(kWeight, b)[i] = attention(b)[i] * scale_.get()[i];
      known(kShift, b)[i] = offset(b, i) * scale_.get()[i] + beta_.get()[i];
    }
  }

  const int64_t SC, n;
  const Tail& tail_;
  const Norm& norm_;
  const Walk& walk_;
  const Strided* parts_;
  const Buffer<A> gamma_, beta_, scale_, mean_;

 private:
  // From the order of the output's channels; rows stay as they are where nothing is given.
  void by_branch(A* rows, const Matrix& m) const {
    if (!m.data) return;
    for (int64_t s = 0; s < tail_.S; ++s) {
      const int64_t first = in_cat(s * tail_.C) * m.row * size_of(m.dtype);
      const Matrix own{static_cast<char*>(m.data) + first, m.dtype, m.row, 0};
      read(rows + s * tail_.C, 1, own, tail_.C, 1);
    }
  }

  const Buffer<A> known_;  // (4, B, S, C): all that is known of channels but their means
};

template <class T>
class NormForward : public NormPass<T> {
 public:
  using A = Acc<T>;

  NormForward(const Tail& tail, const Norm& norm, const Walk& walk, const Strided* parts)
      : NormPass<T>(tail, norm, walk, parts), gate_(tail.se, tail.S, tail.C) {}

  int64_t scratch_size() const { return SC + gate_.S * (2 * gate_.ld + gate_.R); }

  // Sums of the differences to the first pixel, and of squares around the task's own mean.
  void sum(int64_t b, int64_t t, A* sums) const {
    const Range range = rows(t);
    Buffer<A> means(SC);
    first_pixels(b, range, means.get());
    const Channels<A> known{means.get()};
    reduce_task<SumOfDifferences, T>(walk_, tail_, known, b, t, sums);
    const A* own = sums + (walk_.channels_inner ? t * SC : 0);
    for (int64_t i = range.begin; i < range.end; ++i) means.get()[i] += own[i] / A(pixels(t));
    reduce_task<SumOfSquares, T>(walk_, tail_, known, b, t, sums + walk_.sums * SC);
  }

  void gate(int64_t b, const A* sums, A* scratch) const {
    const int64_t S = gate_.S, C = gate_.C, ld = gate_.ld;
    A *squeeze = scratch, *padded_squeeze = squeeze + SC, *gate = padded_squeeze + S * ld;
    A* hidden = gate + S * ld;
    merge(b, sums, squeeze, static_cast<A*>(norm_.deviation) + b * SC);
    __builtin_memcpy(static_cast<A*>(tail_.squeeze) + b * SC, squeeze, size_t(SC) * sizeof(A));
    pad_rows(padded_squeeze, ld, squeeze, S, C);
    gate_.excite(padded_squeeze, hidden, gate);
    gate_.select(gate);
    unpad_rows(static_cast<A*>(tail_.attention) + b * SC, gate, ld, S, C);
  }

  // The batch's statistics, and from them what is written.
  void normalize(const Threads& threads) const {
    parallel(threads, SC, grain(2 * tail_.B), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) statistics(i);
    });
    this->set_scale();
    for (int64_t b = 0; b < tail_.B; ++b) this->set_affine(b);
  }

  void write(int64_t b, int64_t t) const {
    map_task<Output, T>(walk_, tail_, this->parts_, this->channels(b), b, t);
  }

 private:
  using NormPass<T>::SC;
  using NormPass<T>::tail_;
  using NormPass<T>::norm_;
  using NormPass<T>::walk_;

  struct Range {
    int64_t begin, end;
  };

  // The rows that task t sums, and over how many pixels.
  Range rows(int64_t t) const {
    if (walk_.channels_inner) return {0, SC};
    const int64_t per_branch = walk_.tasks / walk_.S, c = t % per_branch * walk_.step;
    const int64_t first = t / per_branch * walk_.C;
    return {first + c, first + min(c + walk_.step, walk_.C)};
  }
  int64_t pixels(int64_t t) const {
    return walk_.channels_inner ? min(walk_.step, walk_.HW - t * walk_.step) : walk_.HW;
  }

  // A number near the mean of each of these rows; 0 where the first pixel is no number.
  void first_pixels(int64_t b, Range range, A* rows) const {
    const int64_t C = tail_.C;
    for (int64_t s = 0; s < tail_.S; ++s) {
      const T* from = at<T>(tail_.branches[s], b, 0, 0);
      const int64_t stride = tail_.branches[s].channel;
      for (int64_t i = max(range.begin, s * C); i < min(range.end, (s + 1) * C); ++i) {
        const A first = widen(from[(i - s * C) * stride]);
        rows[i] = first - first == 0 ? first : A(0);
      }
    }
  }

  // From the tasks' sums to the sample's mean and deviation.
  void merge(int64_t b, const A* sums, A* squeeze, A* deviation) const {
    first_pixels(b, {0, SC}, squeeze);
    const A* squares = sums + walk_.sums * SC;
    for (int64_t i = 0; i < SC; ++i) {
      A total = 0, around = 0;
      for (int64_t t = 0; t < walk_.sums; ++t) total += sums[t * SC + i];
      const A mean = total / A(tail_.HW);
      for (int64_t t = 0; t < walk_.sums; ++t) {
        const A size = A(pixels(t)), from_mean = sums[t * SC + i] / size - mean;
        around += squares[t * SC + i] + size * from_mean * from_mean;
      }
      squeeze[i] += mean;
      deviation[i] = around;
    }
  }

  void statistics(int64_t i) const {
    double mean = 0, var = 0;
    const auto mean_of = [&](int64_t b) {
      return double(this->attention(b)[i]) * double(this->squeeze(b)[i]);
    };
    for (int64_t b = 0; b < tail_.B; ++b) mean += mean_of(b);
    mean /= double(tail_.B);
    for (int64_t b = 0; b < tail_.B; ++b) {
      const double a = this->attention(b)[i], from_mean = mean_of(b) - mean;
      var += a * a * double(this->deviation(b)[i]) + double(tail_.HW) * from_mean * from_mean;
    }
    static_cast<A*>(norm_.mean)[this->in_cat(i)] = A(mean);
    static_cast<A*>(norm_.var)[this->in_cat(i)] = A(var / double(this->n));
  }

  const Gate<A> gate_;
};

template <class T>
class NormBackward : public NormPass<T> {
 public:
  using A = Acc<T>;

  NormBackward(const Tail& tail, const Norm& norm, const NormGradients& gradients, const Walk& walk,
               const Strided* parts)
      : NormPass<T>(tail, norm, walk, parts),
        gradients_(gradients),
        gate_(tail, gradients.tail.fc),
        grad_gamma_(SC),
        grad_beta_(SC),
        slope_(SC) {
    this->set_scale();
    for (int64_t b = 0; b < tail.B; ++b) this->set_affine(b);
  }

  int64_t scratch_size() const { return gate_.scratch_size(); }

  void sum(int64_t b, int64_t t, A* sums) const {
    reduce_task<SumsOfGradient, T>(walk_, tail_, this->channels(b), b, t, sums);
  }

  // The gradients of gamma and beta; each sample's sums are then in its first row of each.
  void norm_gradients(A* all_sums, const Threads& threads) const {
    parallel(threads, SC, grain(4 * tail_.B * walk_.sums), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double gamma = 0, beta = 0;
        for (int64_t b = 0; b < tail_.B; ++b) {
          A* sums = all_sums + b * this->sums_size() + i;
          A* products = sums + walk_.sums * SC;
          for (int64_t t = 1; t < walk_.sums; ++t) {
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
    });
    for (int64_t s = 0; s < tail_.S; ++s) {
      write_part(gradients_.gamma, grad_gamma_.get(), s);
      write_part(gradients_.beta, grad_beta_.get(), s);
    }
  }

  void gate(int64_t b, const A* sums, A* grad) const {
    const int64_t C = tail_.C, ld = gate_.ld;
    const A *products = sums + walk_.sums * SC, HW = A(tail_.HW);
    const A *a = this->attention(b), *m = this->squeeze(b), *weight = this->known(kWeight, b);
    A *factor = this->known(kFactor, b), *spread = this->known(kSpread, b);
    for (int64_t s = 0; s < tail_.S; ++s, grad += ld) {
      for (int64_t i = s * C; i < (s + 1) * C; ++i) {
        const A slope = slope_.get()[i];
        // What every pixel's gradient lacks at x = squeeze, before weight.
        const A constant = grad_beta_.get()[i] / A(this->n) + this->offset(b, i) * slope;
        const A from_pixels = products[i] - slope * a[i] * this->deviation(b)[i];
        grad[i - s * C] = this->scale_.get()[i] * (from_pixels + m[i] * (sums[i] - HW * constant));
        factor[i] = -weight[i] * a[i] * slope;
        spread[i] = -weight[i] * constant;
      }
      __builtin_memset(grad + C, 0, size_t(ld - C) * sizeof(A));
    }
    grad -= tail_.S * ld;
    gate_.back(b, grad);
    for (int64_t s = 0; s < tail_.S; ++s) {
      for (int64_t c = 0; c < C; ++c) spread[s * C + c] += grad[s * ld + c] / HW;
    }
  }

  void write(int64_t b, int64_t t) const {
    map_task<InputGradient, T>(walk_, tail_, gradients_.tail.branches, this->channels(b), b, t);
  }

  void write_fc(const Threads& threads) const { gate_.write_fc(gradients_.tail, threads); }

 private:
  using NormPass<T>::SC;
  using NormPass<T>::tail_;
  using NormPass<T>::walk_;

  void write_part(const Matrix& m, const A* rows, int64_t s) const {
    if (!m.data) return;
    const int64_t first = this->in_cat(s * tail_.C) * m.row * size_of(m.dtype);
    const Matrix own{static_cast<char*>(m.data) + first, m.dtype, m.row, 0};
    PSA_NAMESPACE::write(own, tail_.C, 1, rows + s * tail_.C, 1, 0);
  }

  const NormGradients& gradients_;
  const GateBackward<A> gate_;
  const Buffer<A> grad_gamma_, grad_beta_;
  const Buffer<A> slope_;  // of the gradient over the tail's output
};

void norm_forward(const Tail& tail, const Norm& norm, const Threads& threads) {
  with_type(tail.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Walk walk(tail, tail.cat.channel == 1);
    const Parts parts(tail);
    const NormForward<T> pass(tail, norm, walk, parts.get());
    const int64_t size = pass.sums_size();
    Buffer<Acc<T>> sums(tail.B * size);
    sum_all(pass, walk, tail.B, sums.get(), size, threads);
    gate_all(pass, walk, tail.B, sums.get(), size, threads);
    pass.normalize(threads);
    write_all(pass, walk, tail.B, threads);
  });
}

void norm_backward(const Tail& tail, const Norm& norm, const NormGradients& gradients,
                   const Threads& threads) {
  with_type(tail.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Gradients& of_tail = gradients.tail;
    const Strided* written = of_tail.branches ? of_tail.branches : tail.branches;
    const Walk walk(tail, all_channels_inner(written, tail.S));
    const Parts parts(tail);
    const NormBackward<T> pass(tail, norm, gradients, walk, parts.get());
    const int64_t size = pass.sums_size();
    Buffer<Acc<T>> sums(tail.B * size);
    sum_all(pass, walk, tail.B, sums.get(), size, threads);
    pass.norm_gradients(sums.get(), threads);
    if (!of_tail.branches && !of_tail.fc) return;
    gate_all(pass, walk, tail.B, sums.get(), size, threads);
    if (of_tail.branches) write_all(pass, walk, tail.B, threads);
    if (of_tail.fc) pass.write_fc(threads);
  });
}

}  // namespace psa::cpu::PSA_NAMESPACE
