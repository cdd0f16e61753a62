// Causal attention of packed samples, forward and backward: in fp32 on processors with AVX-512 (processor.h), in bf16
// on those with AVX512-BF16.
#pragma once

#include <cstdint>

#include "bf16.h"

namespace llamahome {

struct AttentionShape {
  const std::int32_t* cu_seqlens;  // boundaries of the samples, num_samples + 1 of them, rising from 0
  std::int64_t num_samples;
  std::int64_t tokens;
  std::int64_t query_heads, key_heads;  // the first a multiple of the second
  std::int64_t head_size;               // a multiple of 16
  float scale;
  int threads;
};

// query, out [tokens, query_heads, head_size]; key, value [tokens, key_heads, head_size]; lse [query_heads, tokens],
// the natural log-sum-exp. Tokens past the last boundary are neither read nor written.
void attention_forward(const AttentionShape& shape, const Bf16* query, const Bf16* key, const Bf16* value, Bf16* out,
                       float* lse);

void attention_forward(const AttentionShape& shape, const float* query, const float* key, const float* value,
                       float* out, float* lse);

// The gradients of query, key and value from that of out.
void attention_backward(const AttentionShape& shape, const Bf16* grad, const Bf16* query, const Bf16* key,
                        const Bf16* value, const Bf16* out, const float* lse, Bf16* d_query, Bf16* d_key,
                        Bf16* d_value);

void attention_backward(const AttentionShape& shape, const float* grad, const float* query, const float* key,
                        const float* value, const float* out, const float* lse, float* d_query, float* d_key,
                        float* d_value);

}  // namespace llamahome
