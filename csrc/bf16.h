#pragma once

#include <cstdint>

namespace llamahome {

// Numbers of bf16 are passed as their bits.
using Bf16 = std::uint16_t;

}  // namespace llamahome
