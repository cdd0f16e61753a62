// Which documents share a row: best-fit packing of whole documents into a token budget.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace llamahome {

struct PackingPlan {
  std::vector<std::int64_t> order;   // indices of the documents, row after row
  std::vector<std::int64_t> bounds;  // row r is order[bounds[r]] to order[bounds[r + 1]]
};

// Best-fit decreasing, in near-linear time: a counting sort by length, then for each document the fullest row that
// still has room, found in a bitmap of free space. Deterministic; every document is in exactly one row, a longer one
// than the budget alone in its own. Throws std::invalid_argument for a budget of 0.
PackingPlan plan_packing(std::span<const std::uint32_t> lengths, std::uint64_t budget);

}  // namespace llamahome
