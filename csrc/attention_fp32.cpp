#include "attention.h"
#include "parallel.h"

// Sets the target of all that follows.
#include "fp32_numbers.h"

#ifdef LLAMAHOME_AVX512

#include "attention_tasks.h"

namespace llamahome {

void attention_forward(const AttentionShape& shape, const float* query, const float* key, const float* value,
                       float* out, float* lse) {
  run_tasks(shape.num_samples * shape.key_heads, shape.threads, Forward{shape, query, key, value, out, lse});
}

void attention_backward(const AttentionShape& shape, const float* grad, const float* query, const float* key,
                        const float* value, const float* out, const float* lse, float* d_query, float* d_key,
                        float* d_value) {
  run_tasks(shape.num_samples * shape.key_heads, shape.threads,
            Backward{shape, grad, query, key, value, out, lse, d_query, d_key, d_value});
}

}  // namespace llamahome

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace llamahome {

void attention_forward(const AttentionShape&, const float*, const float*, const float*, float*, float*) {}

void attention_backward(const AttentionShape&, const float*, const float*, const float*, const float*, const float*,
                        const float*, float*, float*, float*) {}

}  // namespace llamahome

#endif
