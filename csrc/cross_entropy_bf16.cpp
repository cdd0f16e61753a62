#include <math.h>  // not <cmath>: its functions are inline and would be compiled for these processors alone

#include "cross_entropy.h"
#include "parallel.h"

// Sets the target of all that follows.
#include "bf16_numbers.h"

#ifdef LLAMAHOME_AVX512

#include "lanes.h"

namespace llamahome {
namespace {

class Row {
 public:
  Row(Bf16* logits, std::int64_t size, std::int64_t label) : logits_(logits), size_(size), label_(label) {}

  float loss() {
    const float own = at(label_);
    const __m512 peak = _mm512_set1_ps(peak_of_others());
    __m512 sum = _mm512_setzero_ps();
    each([&](std::int64_t i, __mmask16 there, __m512 x) {
      sum = _mm512_mask_add_ps(sum, others(i, there), sum, power(_mm512_sub_ps(x, peak)));
    });
    const float gap = _mm512_cvtss_f32(peak) + logf(_mm512_reduce_add_ps(sum)) - own;
    loss_ = gap > 0 ? gap + log1pf(expf(-gap)) : log1pf(expf(gap));
    log_sum_ = own + loss_;
    return loss_;
  }

  void become_gradient(float factor) {
    const __m512 log_sum = _mm512_set1_ps(log_sum_), by = _mm512_set1_ps(factor);
    each([&](std::int64_t i, __mmask16 there, __m512 x) {
      write(i, there, _mm512_mul_ps(power(_mm512_sub_ps(x, log_sum)), by));
    });
    const std::int64_t i = label_ / kLanes * kLanes;
    write(i, static_cast<__mmask16>(1u << (label_ - i)), _mm512_set1_ps(expm1f(-loss_) * factor));
  }

 private:
  template <typename F>
  void each(const F& f) const {
    for (std::int64_t i = 0; i < size_; i += kLanes) {
      const __mmask16 there = below(size_, i);
      const __m256i bits = there == 0xFFFF ? Numbers::read(logits_ + i) : _mm256_maskz_loadu_epi16(there, logits_ + i);
      f(i, there, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)));
    }
  }

  void write(std::int64_t i, __mmask16 there, __m512 x) {
    if (there == 0xFFFF)
      Numbers::write(logits_ + i, Numbers::narrow(x));
    else
      _mm256_mask_storeu_epi16(logits_ + i, there, Numbers::narrow(x));
  }

  __mmask16 others(std::int64_t i, __mmask16 there) const {
    const bool here = i <= label_ && label_ < i + kLanes;
    return here ? static_cast<__mmask16>(there & ~(1u << (label_ - i))) : there;
  }

  float at(std::int64_t i) const {
    const std::uint32_t bits = std::uint32_t{logits_[i]} << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
  }

  // The lowest number where there is no other, and not infinity, from which no finite logit could be taken.
  float peak_of_others() const {
    __m512 most = _mm512_set1_ps(-3.4e38f);
    each(
        [&](std::int64_t i, __mmask16 there, __m512 x) { most = _mm512_mask_max_ps(most, others(i, there), most, x); });
    return _mm512_reduce_max_ps(most);
  }

  // Zero for minus infinity; what is no number stays none.
  static __m512 power(__m512 x) { return exponential(_mm512_max_ps(_mm512_set1_ps(-150.f), x)); }

  Bf16* logits_;
  std::int64_t size_, label_;
  float loss_ = 0, log_sum_ = 0;
};

}  // namespace

void cross_entropy(Bf16* logits, const std::int64_t* labels, std::int64_t rows, std::int64_t size, float factor,
                   bool gradient, int threads, float* losses) {
  run_tasks(rows, threads, [&](std::int64_t i) {
    Row row(logits + i * size, size, labels[i]);
    losses[i] = row.loss();
    if (gradient) row.become_gradient(factor);
  });
}

}  // namespace llamahome

#else

namespace llamahome {

void cross_entropy(Bf16*, const std::int64_t*, std::int64_t, std::int64_t, float, bool, int, float*) {}

}  // namespace llamahome

#endif
