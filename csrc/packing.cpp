#include "packing.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <stdexcept>

namespace llamahome {
namespace {

constexpr std::uint32_t kNone = UINT32_MAX;

// A set of small integers that finds its first member at or above a bound: a bitmap, and a bitmap of its words.
class FreeSpace {
 public:
  explicit FreeSpace(std::size_t size) : words_(size / 64 + 1), summary_(words_.size() / 64 + 1) {}

  void insert(std::uint32_t value) {
    words_[value / 64] |= bit(value);
    summary_[value / 4096] |= bit(value / 64);
  }

  void erase(std::uint32_t value) {
    if ((words_[value / 64] &= ~bit(value)) == 0) summary_[value / 4096] &= ~bit(value / 64);
  }

  std::uint32_t first_from(std::uint32_t bound) const {
    const std::uint64_t here = words_[bound / 64] >> (bound % 64);
    if (here != 0) return bound + static_cast<std::uint32_t>(std::countr_zero(here));
    const std::size_t next = bound / 64 + 1;
    if (next >= words_.size()) return kNone;
    std::size_t group = next / 64;
    std::uint64_t found = summary_[group] & (~std::uint64_t{0} << (next % 64));
    while (found == 0 && ++group < summary_.size()) found = summary_[group];
    if (found == 0) return kNone;
    const std::size_t word = group * 64 + static_cast<std::size_t>(std::countr_zero(found));
    return static_cast<std::uint32_t>(word * 64) + static_cast<std::uint32_t>(std::countr_zero(words_[word]));
  }

 private:
  static std::uint64_t bit(std::uint32_t value) { return std::uint64_t{1} << (value % 64); }

  std::vector<std::uint64_t> words_;
  std::vector<std::uint64_t> summary_;
};

// Indices by descending length, equal lengths in their order. A length above `largest` counts as largest + 1.
std::vector<std::uint32_t> sort_by_length(std::span<const std::uint32_t> lengths, std::uint32_t largest) {
  std::vector<std::uint32_t> next(largest + 3);
  const auto key = [&](std::uint32_t length) { return largest + 1 - std::min(length, largest + 1); };
  for (const std::uint32_t length : lengths) ++next[key(length) + 1];
  std::partial_sum(next.begin(), next.end(), next.begin());
  std::vector<std::uint32_t> order(lengths.size());
  for (std::uint32_t i = 0; i < lengths.size(); ++i) order[next[key(lengths[i])]++] = i;
  return order;
}

}  // namespace

PackingPlan plan_packing(std::span<const std::uint32_t> lengths, std::uint64_t budget) {
  if (budget == 0) throw std::invalid_argument("a row needs a budget of at least one token");
  if (lengths.size() >= kNone) throw std::invalid_argument("too many documents for one plan");
  // Tables have an entry per unit of free space. Above 2^20 tokens a unit is several: lengths are rounded up and the
  // budget down, so rows stay within it.
  const std::uint64_t total = std::accumulate(lengths.begin(), lengths.end(), std::uint64_t{0});
  const std::uint64_t useful = std::max<std::uint64_t>(1, std::min(budget, total));
  const std::uint64_t unit = (useful + (std::uint64_t{1} << 20) - 1) >> 20;
  const auto room = static_cast<std::uint32_t>(useful / unit);

  std::vector<std::uint32_t> units(lengths.begin(), lengths.end());
  if (unit > 1)
    for (std::uint32_t& u : units) u = static_cast<std::uint32_t>((u + unit - 1) / unit);

  FreeSpace space(room);
  std::vector<std::uint32_t> top(room + 1, kNone);  // by free space: the row opened or filled last, then down the stack
  std::vector<std::uint32_t> below, sizes;          // by row
  std::vector<std::uint32_t> row_of(lengths.size());
  const std::vector<std::uint32_t> by_length = sort_by_length(units, room);
  for (const std::uint32_t i : by_length) {
    const std::uint32_t length = units[i];
    std::uint32_t free = length <= room ? space.first_from(length) : kNone, row;
    if (free == kNone) {
      row = static_cast<std::uint32_t>(sizes.size());
      sizes.push_back(0);
      below.push_back(kNone);
      free = std::max(length, room);
    } else {
      row = top[free];
      if ((top[free] = below[row]) == kNone) space.erase(free);
    }
    row_of[i] = row;
    ++sizes[row];
    const std::uint32_t left = free - length;
    if (left == 0) continue;
    below[row] = top[left];
    top[left] = row;
    space.insert(left);
  }

  PackingPlan plan{std::vector<std::int64_t>(lengths.size()), std::vector<std::int64_t>(sizes.size() + 1)};
  for (std::size_t row = 0; row < sizes.size(); ++row) plan.bounds[row + 1] = plan.bounds[row] + sizes[row];
  std::vector<std::int64_t> next(plan.bounds.begin(), plan.bounds.end() - 1);
  for (const std::uint32_t i : by_length) plan.order[static_cast<std::size_t>(next[row_of[i]]++)] = i;
  return plan;
}

}  // namespace llamahome
