#include "widen.h"

#include <cstdlib>  // defines __GLIBC__ for vector_clones.h

#include "vector_clones.h"

// Function templates cannot be cloned for several targets, hence the macro.
#define LLAMAHOME_WIDEN(Token)                                                                                   \
  LLAMAHOME_CLONES void widen(const Token* __restrict tokens, std::uint64_t count, std::int64_t* __restrict ids, \
                              std::int64_t* __restrict labels) {                                                 \
    for (std::uint64_t i = 0; i < count; ++i) {                                                                  \
      ids[i] = tokens[i];                                                                                        \
      labels[i] = tokens[i];                                                                                     \
    }                                                                                                            \
  }                                                                                                              \
  LLAMAHOME_CLONES void widen_document(const Token* __restrict tokens, std::uint64_t count,                      \
                                       std::int64_t* __restrict ids, std::int64_t* __restrict labels,            \
                                       std::int64_t* __restrict positions) {                                     \
    for (std::uint64_t i = 0; i < count; ++i) {                                                                  \
      ids[i] = tokens[i];                                                                                        \
      labels[i] = tokens[i];                                                                                     \
      positions[i] = static_cast<std::int64_t>(i);                                                               \
    }                                                                                                            \
  }

namespace llamahome {

LLAMAHOME_WIDEN(std::uint16_t)
LLAMAHOME_WIDEN(std::uint32_t)

}  // namespace llamahome
