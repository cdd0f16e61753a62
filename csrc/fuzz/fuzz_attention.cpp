// Attention in bf16 and fp32 over random packed samples, held to the plain definition in double. Every tensor stands at
// the end of its own allocation, so that the address sanitizer sees a read past it. Usage: fuzz_attention SECONDS
// [SEED]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../attention.h"
#include "../processor.h"

namespace {

using namespace llamahome;
template <typename Number>
using Numbers = std::vector<Number>;

struct Case {
  std::vector<std::int32_t> edges{0};
  std::int64_t tokens, query_heads, key_heads, size;

  AttentionShape shape() const {
    return {edges.data(), static_cast<std::int64_t>(edges.size()) - 1, tokens, query_heads, key_heads,
            size,         1 / std::sqrt(static_cast<float>(size)),     1};
  }
};

double value(float number) { return number; }

double value(Bf16 bits) {
  const std::uint32_t wide = std::uint32_t{bits} << 16;
  float number;
  std::memcpy(&number, &wide, sizeof number);
  return number;
}

template <typename Random>
Case draw(Random& random) {
  const auto upto = [&](std::int64_t n) { return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n)); };
  Case c;
  for (std::int64_t i = upto(4) + 1; i > 0; --i)
    c.edges.push_back(c.edges.back() + static_cast<std::int32_t>(upto(150)));
  c.tokens = c.edges.back() + upto(3);
  c.key_heads = upto(3) + 1;
  c.query_heads = c.key_heads * (upto(3) + 1);
  c.size = 16 * (upto(8) + 1);
  return c;
}

// How far `out` is from softmax(q k^T) v at worst.
template <typename Number>
double difference(const Case& c, const Numbers<Number>& q, const Numbers<Number>& k, const Numbers<Number>& v,
                  const Numbers<Number>& out) {
  const auto at = [&](std::int64_t token, std::int64_t heads, std::int64_t head) {
    return (token * heads + head) * c.size;
  };
  double worst = 0;
  for (std::size_t s = 1; s < c.edges.size(); ++s)
    for (std::int64_t h = 0; h < c.query_heads; ++h)
      for (std::int64_t row = c.edges[s - 1]; row < c.edges[s]; ++row) {
        const std::int64_t key_head = h / (c.query_heads / c.key_heads);
        std::vector<double> weights, sums(static_cast<std::size_t>(c.size));
        double total = 0;
        for (std::int64_t key = c.edges[s - 1]; key <= row; ++key) {
          double score = 0;
          for (std::int64_t i = 0; i < c.size; ++i)
            score += value(q[at(row, c.query_heads, h) + i]) * value(k[at(key, c.key_heads, key_head) + i]);
          weights.push_back(std::exp(score / std::sqrt(static_cast<double>(c.size))));
          total += weights.back();
        }
        for (std::size_t j = 0; j < weights.size(); ++j)
          for (std::int64_t i = 0; i < c.size; ++i)
            sums[i] += weights[j] / total *
                       value(v[at(c.edges[s - 1] + static_cast<std::int64_t>(j), c.key_heads, key_head) + i]);
        for (std::int64_t i = 0; i < c.size; ++i)
          worst = std::max(worst, std::abs(sums[i] - value(out[at(row, c.query_heads, h) + i])));
      }
  return worst;
}

void round(float drawn, float& to) { to = drawn; }

void round(float drawn, Bf16& to) {
  std::uint32_t bits;
  std::memcpy(&bits, &drawn, sizeof bits);
  to = static_cast<Bf16>(bits >> 16);
}

template <typename Number, typename Random>
double run(const Case& c, Random& random) {
  const std::size_t queries = static_cast<std::size_t>(c.tokens * c.query_heads * c.size),
                    keys = static_cast<std::size_t>(c.tokens * c.key_heads * c.size);
  std::normal_distribution<float> normal;
  const auto fill = [&](std::size_t count) {
    Numbers<Number> numbers(count);
    for (Number& x : numbers) round(normal(random), x);
    return numbers;
  };
  const Numbers<Number> q = fill(queries), grad = fill(queries), k = fill(keys), v = fill(keys);
  Numbers<Number> out(queries), dq(queries), dk(keys), dv(keys);
  std::vector<float> lse(static_cast<std::size_t>(c.tokens * c.query_heads));
  attention_forward(c.shape(), q.data(), k.data(), v.data(), out.data(), lse.data());
  attention_backward(c.shape(), grad.data(), q.data(), k.data(), v.data(), out.data(), lse.data(), dq.data(), dk.data(),
                     dv.data());
  return difference(c, q, k, v, out);
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 5;
  std::mt19937_64 random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
  if (!has_avx512()) return std::puts("no AVX-512 here"), 0;
  const auto start = std::chrono::steady_clock::now();
  std::int64_t cases = 0;
  for (; std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds; ++cases) {
    const Case c = draw(random);
    const bool low = has_avx512_bf16() && random() % 2;
    const double worst = low ? run<Bf16>(c, random) : run<float>(c, random);
    if (!(worst < (low ? 0.05 : 1e-5)))
      return std::printf("case %lld: off by %g\n", static_cast<long long>(cases), worst), 1;
  }
  std::printf("%lld cases\n", static_cast<long long>(cases));
}
