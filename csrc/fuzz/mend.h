// A token file whose damage gets past its checksums.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../crc32c.h"
#include "../token_file.h"

namespace llamahome::fuzz {

using Bytes = std::vector<std::uint8_t>;

template <typename T>
void put(Bytes& file, std::size_t at, T value) {
  if (at + sizeof value <= file.size()) std::memcpy(&file[at], &value, sizeof value);
}

// Makes all checksums right, as far as the header leads to them.
inline void mend(Bytes& file) {
  if (file.size() < kPage) return;
  Header header;
  std::memcpy(&header, file.data(), sizeof header);
  const std::uint64_t table = header.checksums_at;
  if (table >= kPage && table < file.size()) {
    for (std::uint64_t block = 0; kPage * (block + 1) < table; ++block) {
      const std::uint64_t begin = kPage * (block + 1), end = std::min(begin + kPage, table);
      put(file, table + 4 * block, crc32c(&file[begin], end - begin));
    }
    put(file, offsetof(Header, checksums_crc), crc32c(&file[table], file.size() - table));
  }
  put(file, kPage - 4, crc32c(file.data(), kPage - 4));
}

}  // namespace llamahome::fuzz
