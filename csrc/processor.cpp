#include "processor.h"

namespace llamahome {

#if defined(__x86_64__) && defined(__GNUC__)

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

bool is_amd() { return __builtin_cpu_is("amd"); }

#else

bool has_avx512() { return false; }

bool has_avx512_bf16() { return false; }

bool is_amd() { return false; }

#endif

}  // namespace llamahome
