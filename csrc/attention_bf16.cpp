#include "attention.h"
#include "parallel.h"

// Sets the target of all that follows.
#include "bf16_numbers.h"

#ifdef LLAMAHOME_AVX512

#include "attention_tasks.h"

namespace llamahome {

void attention_forward(const AttentionShape& shape, const Bf16* query, const Bf16* key, const Bf16* value, Bf16* out,
                       float* lse) {
  run_tasks(shape.num_samples * shape.key_heads, shape.threads, Forward{shape, query, key, value, out, lse});
}

void attention_backward(const AttentionShape& shape, const Bf16* grad, const Bf16* query, const Bf16* key,
                        const Bf16* value, const Bf16* out, const float* lse, Bf16* d_query, Bf16* d_key,
                        Bf16* d_value) {
  run_tasks(shape.num_samples * shape.key_heads, shape.threads,
            Backward{shape, grad, query, key, value, out, lse, d_query, d_key, d_value});
}

}  // namespace llamahome

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace llamahome {

void attention_forward(const AttentionShape&, const Bf16*, const Bf16*, const Bf16*, Bf16*, float*) {}

void attention_backward(const AttentionShape&, const Bf16*, const Bf16*, const Bf16*, const Bf16*, const Bf16*,
                        const float*, Bf16*, Bf16*, Bf16*) {}

}  // namespace llamahome

#endif
