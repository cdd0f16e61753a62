// Causal attention of packed samples in bf16 on processors with AVX512-BF16, forward and backward.
#pragma once

#include <cstdint>

namespace llamahome {

// Numbers of bf16 are passed as their bits.
using Bf16 = std::uint16_t;

struct AttentionShape {
  const std::int32_t* cu_seqlens;  // boundaries of the samples, num_samples + 1 of them, rising from 0
  std::int64_t num_samples;
  std::int64_t tokens;
  std::int64_t query_heads, key_heads;  // the first a multiple of the second
  std::int64_t head_size;               // a multiple of 16
  float scale;
  int threads;
};

// Whether this processor has the instructions and this build the code.
bool has_bf16_attention();

// query, out [tokens, query_heads, head_size]; key, value [tokens, key_heads, head_size]; lse [query_heads, tokens],
// the natural log-sum-exp. Tokens past the last boundary are neither read nor written.
void attention_forward(const AttentionShape& shape, const Bf16* query, const Bf16* key, const Bf16* value, Bf16* out,
                       float* lse);

// The gradients of query, key and value from that of out.
void attention_backward(const AttentionShape& shape, const Bf16* grad, const Bf16* query, const Bf16* key,
                        const Bf16* value, const Bf16* out, const float* lse, Bf16* d_query, Bf16* d_key,
                        Bf16* d_value);

}  // namespace llamahome
