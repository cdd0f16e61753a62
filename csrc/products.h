// Sums of matrix products in bf16, on processors with AVX512-BF16 (processor.h).
#pragma once

#include <cstdint>

#include "bf16.h"

namespace llamahome {

// Rows `stride` numbers apart; `turned` where it is the transposed matrix that lies so.
struct Matrix {
  const Bf16* data;
  std::int64_t stride;
  bool turned;
};

// left [rows, size] times right [size, columns]. Where left is not turned or right is, pairs of neighbours in memory
// are read as one: size and stride are even and data is aligned to four bytes. The rows of a turned left are a multiple
// of 16.
struct Product {
  Matrix left, right;
  std::int64_t size;
};

// out [rows, columns] = start + the sum of all products, rounded once; columns is a multiple of 16. `start` has the
// shape of out, may be out, or is null. The bits depend on neither the number of threads nor the other rows.
void sum_products(const Product* products, std::int64_t count, const Bf16* start, Bf16* out, std::int64_t rows,
                  std::int64_t columns, int threads);

}  // namespace llamahome
