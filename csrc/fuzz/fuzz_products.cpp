// Sums of products in bf16 over random shapes and layouts, held to double. Every matrix stands at the end of its own
// allocation, so that the address sanitizer sees a read past it. Usage: fuzz_products SECONDS [SEED]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <list>
#include <random>
#include <vector>

#include "../processor.h"
#include "../products.h"

namespace {

using namespace llamahome;
using Random = std::mt19937_64;

std::int64_t below(Random& random, std::int64_t n) {
  return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n));
}

double value(Bf16 bits) {
  const std::uint32_t wide = std::uint32_t{bits} << 16;
  float number;
  std::memcpy(&number, &wide, sizeof number);
  return number;
}

std::vector<Bf16> numbers(Random& random, std::int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<Bf16> drawn(static_cast<std::size_t>(count));
  for (Bf16& x : drawn) {
    const float number = normal(random);
    std::uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    x = static_cast<Bf16>(bits >> 16);
  }
  return drawn;
}

// A matrix whose rows, or columns, lie up to seven pairs apart; the last one has no gap behind it.
Matrix draw(Random& random, std::list<std::vector<Bf16>>& memory, std::int64_t rows, std::int64_t columns,
            bool turned) {
  if (turned) std::swap(rows, columns);
  const std::int64_t stride = columns + columns % 2 + 2 * below(random, 8);
  memory.push_back(numbers(random, (rows - 1) * stride + columns));
  return {memory.back().data(), stride, turned};
}

double at(const Matrix& x, std::int64_t row, std::int64_t column) {
  return value(x.turned ? x.data[column * x.stride + row] : x.data[row * x.stride + column]);
}

// How far a sum is from that in double at worst, by the size of what was added up.
double run(Random& random) {
  const bool by_columns = below(random, 3) == 0;
  const std::int64_t rows = by_columns ? 16 * (below(random, 4) + 1) : below(random, 150) + 1;
  const std::int64_t columns = 16 * (below(random, 12) + 1);
  std::list<std::vector<Bf16>> memory;
  std::vector<Product> products;
  for (std::int64_t i = below(random, 3) + 1; i > 0; --i) {
    const bool left = by_columns && below(random, 2), right = below(random, 2);
    std::int64_t size = below(random, 20) ? below(random, 200) + 1 : 2000 + below(random, 20000);
    if (!left || right) size += size % 2;
    products.push_back({draw(random, memory, rows, size, left), draw(random, memory, size, columns, right), size});
  }
  const std::vector<Bf16> start = numbers(random, rows * columns);
  std::vector<Bf16> out(start.size());
  const bool adds = below(random, 2);
  sum_products(products.data(), static_cast<std::int64_t>(products.size()), adds ? start.data() : nullptr, out.data(),
               rows, columns, 2);
  double worst = 0;
  for (std::int64_t row = 0; row < rows; ++row)
    for (std::int64_t column = 0; column < columns; ++column) {
      const auto place = static_cast<std::size_t>(row * columns + column);
      double sum = adds ? value(start[place]) : 0, size = std::abs(sum) + 1;
      for (const Product& p : products)
        for (std::int64_t k = 0; k < p.size; ++k) {
          const double product = at(p.left, row, k) * at(p.right, k, column);
          sum += product;
          size += std::abs(product) / 100;
        }
      worst = std::max(worst, std::abs(sum - value(out[place])) / (size + std::abs(sum)));
    }
  return worst;
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 5;
  Random random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
  if (!has_avx512_bf16()) return std::puts("no AVX512-BF16 here"), 0;
  const auto start = std::chrono::steady_clock::now();
  std::int64_t cases = 0;
  for (; std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds; ++cases)
    if (const double worst = run(random); !(worst < 0.004))
      return std::printf("case %lld: off by %g\n", static_cast<long long>(cases), worst), 1;
  std::printf("%lld cases\n", static_cast<long long>(cases));
}
