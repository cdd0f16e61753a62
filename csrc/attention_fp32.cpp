#include "attention.h"
#include "parallel.h"

// Sets the target of all that follows.
#include "fp32_numbers.h"

#ifdef LLAMAHOME_AVX512

#include "attention_tasks.h"

#else

namespace llamahome {

void attention_forward(const AttentionShape&, const float*, const float*, const float*, float*, float*) {}

void attention_backward(const AttentionShape&, const float*, const float*, const float*, const float*, const float*,
                        const float*, float*, float*, float*) {}

}  // namespace llamahome

#endif
