// What the processor offers, asked while the program runs.
#pragma once

namespace llamahome {

bool has_avx512();       // F, BW and VL
bool has_avx512_bf16();  // and BF16
bool is_amd();

}  // namespace llamahome
