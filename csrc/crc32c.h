// CRC-32C (Castagnoli): the checksum of every block of a token file.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llamahome {

// CRC-32C of `size` bytes, continuing from `crc` (0 to begin). Uses the processor's instruction where it has one.
std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t crc = 0) noexcept;

// The same by tables: what processors without the instruction run, and what the tests compare with.
std::uint32_t crc32c_portable(const void* data, std::size_t size, std::uint32_t crc = 0) noexcept;

}  // namespace llamahome
