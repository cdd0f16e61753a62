// Cross-entropy over rows of logits in bf16, on processors with AVX512-BF16 (processor.h).
#pragma once

#include <cstdint>

#include "bf16.h"

namespace llamahome {

// losses [rows] of logits [rows, size] by labels [rows], each in [0, size). Where `gradient` is set, `factor` by the
// gradient of a row's loss replaces its logits. What the label loses is not taken from a sum that its own logit
// dominates, so that small losses keep their digits. The bits do not depend on the number of threads.
void cross_entropy(Bf16* logits, const std::int64_t* labels, std::int64_t rows, std::int64_t size, float factor,
                   bool gradient, int threads, float* losses);

}  // namespace llamahome
