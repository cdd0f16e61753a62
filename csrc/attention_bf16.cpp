#include "attention.h"
#include "parallel.h"

// Sets the target of all that follows.
#include "bf16_numbers.h"

#ifdef LLAMAHOME_AVX512

#include "attention_tasks.h"

#else

namespace llamahome {

void attention_forward(const AttentionShape&, const Bf16*, const Bf16*, const Bf16*, Bf16*, float*) {}

void attention_backward(const AttentionShape&, const Bf16*, const Bf16*, const Bf16*, const Bf16*, const Bf16*,
                        const float*, Bf16*, Bf16*, Bf16*) {}

}  // namespace llamahome

#endif
