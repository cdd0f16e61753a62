// The inner loops of reading: tokens of 2 or 4 bytes become int64, in several instruction sets.
#pragma once

#include <cstdint>

namespace llamahome {

// Ids, and the same as labels.
void widen(const std::uint16_t* tokens, std::uint64_t count, std::int64_t* ids, std::int64_t* labels);
void widen(const std::uint32_t* tokens, std::uint64_t count, std::int64_t* ids, std::int64_t* labels);

// A whole document: its positions 0, 1, 2, ... too.
void widen_document(const std::uint16_t* tokens, std::uint64_t count, std::int64_t* ids, std::int64_t* labels,
                    std::int64_t* positions);
void widen_document(const std::uint32_t* tokens, std::uint64_t count, std::int64_t* ids, std::int64_t* labels,
                    std::int64_t* positions);

}  // namespace llamahome
