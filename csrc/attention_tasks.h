// Causal attention of packed samples, forward and backward, in the numbers of bf16_numbers.h or fp32_numbers.h: include
// it after one of them, attention.h and parallel.h.
//
// One task is one sample and one key head, so no two threads write the same place and sums have a fixed order.
//
// Scores of 6 rows at a time stay in the first cache; only keys up to the diagonal are looked at. Rounding is flash
// attention's: scores and sums in fp32, probabilities and their gradient in the numbers' precision for the products.
#pragma once

#include "lanes.h"
#include "tiles.h"

namespace llamahome {
namespace {

constexpr std::int64_t kBlock = 48;  // rows whose outer products go to dK and dV at once

// scores [6, keys] = six rows of `left` times rows packed over their size; keys is a multiple of 16.
void multiply_keys(const Unit* left, const Unit* packed, std::int64_t units, std::int64_t keys, float* scores,
                   std::int64_t stride) {
  for (std::int64_t j = 0; j < keys; j += kTile)
    multiply<false>({left, units, 1}, packed + j * units, kTile, units, scores + j, stride,
                    (keys - j < kTile ? keys - j : kTile) / kLanes);
}

// Sizes of one sample's buffers.
struct Extent {
  std::int64_t length, size;
  std::int64_t rows = round_up(length, kRows);
  std::int64_t keys = round_up(rows, kTile);
  std::int64_t width = keys + kLanes;  // not a power of two: columns would share cache lines' places

  std::int64_t keys_of(std::int64_t row) const {  // what six rows from `row` see, rounded up
    return round_up(row + kRows < length ? row + kRows : length, kLanes);
  }
  std::int64_t limit(std::int64_t row) const { return row < length ? row + 1 : 0; }
};

// scores become probabilities that are not divided yet; returns their sum and leaves the peak.
float softmax_row(const float* scores, std::int64_t limit, std::int64_t keys, float scale, Element* out, float& peak) {
  __m512 most = _mm512_set1_ps(-__builtin_inff());
  for (std::int64_t j = 0; j < keys; j += kLanes)
    most = _mm512_mask_max_ps(most, below(limit, j), most, _mm512_load_ps(scores + j));
  peak = limit ? _mm512_reduce_max_ps(most) * scale : 0.f;
  const __m512 factor = _mm512_set1_ps(scale), shift = _mm512_set1_ps(peak);
  __m512 sum = _mm512_setzero_ps();
  for (std::int64_t j = 0; j < keys; j += kLanes) {
    const __m512 x = _mm512_fmsub_ps(_mm512_load_ps(scores + j), factor, shift);
    const __m512 p = _mm512_maskz_mov_ps(below(limit, j), exponential(x));
    sum = _mm512_add_ps(sum, p);
    Numbers::write(out + j, Numbers::narrow(p));
  }
  return _mm512_reduce_add_ps(sum);
}

void write_row(const float* from, float factor, std::int64_t size, Element* to) {
  for (std::int64_t j = 0; j < size; j += kLanes)
    Numbers::write(to + j, Numbers::narrow(_mm512_mul_ps(_mm512_load_ps(from + j), _mm512_set1_ps(factor))));
}

// Where one head of one sample lies in a tensor [tokens, heads, size].
std::int64_t place(std::int64_t token, std::int64_t heads, std::int64_t head, std::int64_t size) {
  return (token * heads + head) * size;
}

struct Sample {
  std::int64_t start, length;
};

Sample sample_of(const AttentionShape& s, std::int64_t number) {
  return {s.cu_seqlens[number], s.cu_seqlens[number + 1] - s.cu_seqlens[number]};
}

struct Forward {
  const AttentionShape& s;
  const Element *query, *key, *value;
  Element* out;
  float* lse;

  void head(const Sample& sample, std::int64_t head, const Extent& e, const Unit* keys, const Unit* values) const {
    const std::int64_t size = s.head_size, stride = s.query_heads * size;
    const Buffer<Unit> rows(e.rows * size / kPerUnit);
    const Buffer<float> scores(kRows * e.width), sums(kRows * size);
    const Buffer<Element> weights(kRows * e.width);
    const std::int64_t first = place(sample.start, s.query_heads, head, size);
    pack_rows({query + first, stride, e.length, size}, rows.get());
    for (std::int64_t row = 0; row < e.length; row += kRows) {
      const std::int64_t seen = e.keys_of(row);
      multiply_keys(rows.get() + row * size / kPerUnit, keys, size / kPerUnit, seen, scores.get(), e.width);
      float total[kRows];
      for (std::int64_t i = 0; i < kRows; ++i) {
        float peak;
        total[i] =
            softmax_row(scores.get() + i * e.width, e.limit(row + i), seen, s.scale, weights.get() + i * e.width, peak);
        if (row + i < e.length) lse[head * s.tokens + sample.start + row + i] = peak + __builtin_logf(total[i]);
      }
      const Left left{reinterpret_cast<const Unit*>(weights.get()), e.width / kPerUnit, 1};
      multiply_rows<false>(left, values, seen / kPerUnit, sums.get(), size);
      for (std::int64_t i = 0; i < kRows && row + i < e.length; ++i)
        write_row(sums.get() + i * size, 1 / total[i], size, out + first + (row + i) * stride);
    }
  }

  void operator()(std::int64_t task) const {
    const Sample sample = sample_of(s, task / s.key_heads);
    if (sample.length <= 0) return;
    const std::int64_t key_head = task % s.key_heads, size = s.head_size, group = s.query_heads / s.key_heads;
    const Extent e{sample.length, size};
    const std::int64_t first = place(sample.start, s.key_heads, key_head, size);
    const Buffer<Unit> keys(e.keys * size / kPerUnit), values(e.keys * size / kPerUnit);
    pack_over_size({key + first, s.key_heads * size, e.length, size}, keys.get());
    pack_over_rows({value + first, s.key_heads * size, e.length, size}, values.get());
    for (std::int64_t i = 0; i < group; ++i) head(sample, key_head * group + i, e, keys.get(), values.get());
  }
};

// What backward over one key head of one sample needs; gradients of keys and values are summed here in fp32.
struct BackwardBuffers {
  explicit BackwardBuffers(const Extent& e)
      : keys_by_size(e.keys * e.size / kPerUnit),
        values_by_size(e.keys * e.size / kPerUnit),
        keys_by_row(e.keys * e.size / kPerUnit),
        d_keys(e.rows * e.size),
        d_values(e.rows * e.size),
        query(e.rows * e.size / kPerUnit),
        grad(e.rows * e.size / kPerUnit),
        query_by_row(e.rows * e.size / kPerUnit),
        grad_by_row(e.rows * e.size / kPerUnit),
        scores(kRows * e.width),
        d_weights(kRows * e.width),
        d_scores(kRows * e.width),
        d_query(kRows * e.size),
        weight_units(kBlock / kPerUnit * e.width),
        d_score_units(kBlock / kPerUnit * e.width) {}

  Buffer<Unit> keys_by_size, values_by_size, keys_by_row;
  Buffer<float> d_keys, d_values;
  Buffer<Unit> query, grad, query_by_row, grad_by_row;
  Buffer<float> scores, d_weights;
  Buffer<Element> d_scores;
  Buffer<float> d_query;
  Buffer<Unit> weight_units, d_score_units;
};

struct Backward {
  const AttentionShape& s;
  const Element *grad, *query, *key, *value, *out;
  const float* lse;
  Element *d_query, *d_key, *d_value;

  // The sum of out * grad along one row: what softmax's gradient subtracts.
  float delta(const Element* out_row, const Element* grad_row) const {
    __m512 sum = _mm512_setzero_ps();
    for (std::int64_t j = 0; j < s.head_size; j += kLanes)
      sum = _mm512_fmadd_ps(Numbers::widen(out_row + j), Numbers::widen(grad_row + j), sum);
    return _mm512_reduce_add_ps(sum);
  }

  // Rows that share units: probabilities from scores, and the scores' gradients; both as units, the latter by row as
  // well.
  void unit_of_rows(const BackwardBuffers& b, const Extent& e, std::int64_t row, std::int64_t i, std::int64_t seen,
                    const float* lse_of, const float* deltas, Unit* weights, Unit* d_score_units) const {
    const __m512 scale = _mm512_set1_ps(s.scale);
    for (std::int64_t j = 0; j < seen; j += kLanes) {
      Numbers::Lanes p[kPerUnit], d[kPerUnit];
      for (std::int64_t r = 0; r < kPerUnit; ++r) {
        const std::int64_t at = (i + r) * e.width + j;
        const __m512 x = _mm512_fmsub_ps(_mm512_load_ps(b.scores.get() + at), scale, _mm512_set1_ps(lse_of[i + r]));
        const __m512 weight = _mm512_maskz_mov_ps(below(e.limit(row + i + r), j), exponential(x));
        const __m512 slope = _mm512_sub_ps(_mm512_load_ps(b.d_weights.get() + at), _mm512_set1_ps(deltas[i + r]));
        p[r] = Numbers::narrow(weight);
        d[r] = Numbers::narrow(_mm512_mul_ps(_mm512_mul_ps(weight, slope), scale));
        Numbers::write(b.d_scores.get() + at, d[r]);
      }
      Numbers::join(weights + j, p);
      Numbers::join(d_score_units + j, d);
    }
  }

  // Six rows: dQ is finished, probabilities and scores' gradients go to the block's units.
  void six_rows(const BackwardBuffers& b, const Extent& e, const Sample& sample, std::int64_t head, std::int64_t row,
                std::int64_t row_in_block) const {
    const std::int64_t size = s.head_size, units = size / kPerUnit, seen = e.keys_of(row);
    multiply_keys(b.query.get() + row * units, b.keys_by_size.get(), units, seen, b.scores.get(), e.width);
    multiply_keys(b.grad.get() + row * units, b.values_by_size.get(), units, seen, b.d_weights.get(), e.width);
    float lse_of[kRows] = {}, deltas[kRows] = {};
    for (std::int64_t i = 0; i < kRows && row + i < e.length; ++i) {
      const std::int64_t token = sample.start + row + i, at = place(token, s.query_heads, head, size);
      lse_of[i] = lse[head * s.tokens + token];
      deltas[i] = delta(out + at, grad + at);
    }
    for (std::int64_t i = 0; i < kRows; i += kPerUnit) {
      const std::int64_t at = (row_in_block + i) / kPerUnit * e.width;
      unit_of_rows(b, e, row, i, seen, lse_of, deltas, b.weight_units.get() + at, b.d_score_units.get() + at);
    }
    const Left left{reinterpret_cast<const Unit*>(b.d_scores.get()), e.width / kPerUnit, 1};
    multiply_rows<false>(left, b.keys_by_row.get(), seen / kPerUnit, b.d_query.get(), size);
    for (std::int64_t i = 0; i < kRows && row + i < e.length; ++i)
      write_row(b.d_query.get() + i * size, 1.f, size,
                d_query + place(sample.start + row + i, s.query_heads, head, size));
  }

  void query_head(const BackwardBuffers& b, const Extent& e, const Sample& sample, std::int64_t head) const {
    const std::int64_t size = s.head_size, first = place(sample.start, s.query_heads, head, size);
    const Rows q{query + first, s.query_heads * size, e.length, size}, g{grad + first, q.stride, e.length, size};
    pack_rows(q, b.query.get());
    pack_rows(g, b.grad.get());
    pack_over_rows(q, b.query_by_row.get());
    pack_over_rows(g, b.grad_by_row.get());
    for (std::int64_t start = 0; start < e.rows; start += kBlock) {
      const std::int64_t end = start + kBlock < e.rows ? start + kBlock : e.rows;
      for (std::int64_t row = start; row < end; row += kRows) six_rows(b, e, sample, head, row, row - start);
      for (std::int64_t k = 0; k < end; k += kRows) {
        const std::int64_t from = k > start ? k - start : 0;  // rows above the diagonal do not see these keys
        const std::int64_t at = from / kPerUnit * e.width + k, rows_at = (start + from) / kPerUnit * size;
        const std::int64_t count = (end - start - from) / kPerUnit;
        multiply_rows<true>({b.d_score_units.get() + at, 1, e.width}, b.query_by_row.get() + rows_at, count,
                            b.d_keys.get() + k * size, size);
        multiply_rows<true>({b.weight_units.get() + at, 1, e.width}, b.grad_by_row.get() + rows_at, count,
                            b.d_values.get() + k * size, size);
      }
    }
  }

  void operator()(std::int64_t task) const {
    const Sample sample = sample_of(s, task / s.key_heads);
    if (sample.length <= 0) return;
    const std::int64_t key_head = task % s.key_heads, size = s.head_size, group = s.query_heads / s.key_heads;
    const Extent e{sample.length, size};
    const BackwardBuffers b(e);
    const std::int64_t first = place(sample.start, s.key_heads, key_head, size), stride = s.key_heads * size;
    const Rows k{key + first, stride, e.length, size}, v{value + first, stride, e.length, size};
    pack_over_size(k, b.keys_by_size.get());
    pack_over_size(v, b.values_by_size.get());
    pack_over_rows(k, b.keys_by_row.get());
    for (std::int64_t i = 0; i < group; ++i) query_head(b, e, sample, key_head * group + i);
    for (std::int64_t i = 0; i < e.length; ++i) {
      write_row(b.d_keys.get() + i * size, 1.f, size, d_key + first + i * stride);
      write_row(b.d_values.get() + i * size, 1.f, size, d_value + first + i * stride);
    }
  }
};

}  // namespace

void attention_forward(const AttentionShape& shape, const Element* query, const Element* key, const Element* value,
                       Element* out, float* lse) {
  run_tasks(shape.num_samples * shape.key_heads, shape.threads, Forward{shape, query, key, value, out, lse});
}

void attention_backward(const AttentionShape& shape, const Element* grad, const Element* query, const Element* key,
                        const Element* value, const Element* out, const float* lse, Element* d_query, Element* d_key,
                        Element* d_value) {
  run_tasks(shape.num_samples * shape.key_heads, shape.threads,
            Backward{shape, grad, query, key, value, out, lse, d_query, d_key, d_value});
}

}  // namespace llamahome

#if defined(__clang__)
#pragma clang attribute pop  // pushed by the numbers' header
#endif
