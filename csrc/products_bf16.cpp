#include <memory>
#include <vector>

#include "parallel.h"
#include "products.h"

// Sets the target of all that follows.
#include "bf16_numbers.h"

#ifdef LLAMAHOME_AVX512

#include "tiles.h"

namespace llamahome {
namespace {

constexpr std::int64_t kTaskRows = 480;  // for which a task packs its columns of B once
constexpr std::int64_t kLeastRows = 48;
constexpr std::int64_t kDepth = 1024;  // units of B packed at a time: 256 KiB, in the second cache
constexpr std::int64_t kLong = 8 * kDepth;
constexpr std::int64_t kSums = kRows * kTile;

// Not the library's: the linker might take what is compiled here for the whole program.
std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// A as micro-kernels read it, and the last rows where fewer than six are left, zeros below.
class Rearranged {
 public:
  Rearranged(const Product& product, std::int64_t rows)
      : units_(round_up(product.size, kPerUnit) / kPerUnit), first_tail_(rows / kRows * kRows) {
    const Matrix& left = product.left;
    if (left.turned) {
      // The last six rows may end past the last unit.
      packed_ = std::make_unique<Buffer<Unit>>(units_ * rows + kRows);
      pack_over_rows({left.data, left.stride, product.size, rows}, packed_->get());
      all_ = {packed_->get(), 1, rows};
      first_tail_ = rows;
      return;
    }
    all_ = {reinterpret_cast<const Unit*>(left.data), left.stride / kPerUnit, 1};
    packed_ = std::make_unique<Buffer<Unit>>(kRows * units_);
    pack_rows({left.data + first_tail_ * left.stride, left.stride, rows - first_tail_, product.size}, packed_->get());
  }

  std::int64_t units() const { return units_; }
  // Six rows from `row`, from unit `first` on.
  Left at(std::int64_t row, std::int64_t first) const {
    if (row >= first_tail_) return {packed_->get() + first, units_, 1};
    return {all_.data + row * all_.row_step + first * all_.step, all_.row_step, all_.step};
  }

 private:
  std::int64_t units_;
  std::int64_t first_tail_;
  Left all_{};
  std::unique_ptr<Buffer<Unit>> packed_;
};

struct Sum {
  const Product* products;
  const std::vector<Rearranged>& lefts;
  const Bf16* start;
  Bf16* out;
  std::int64_t columns;
  std::int64_t units;  // of all products

  // f(number, first unit, count, place in [from, to)) of each product's part of those units
  template <typename F>
  void parts(std::int64_t from, std::int64_t to, const F& f) const {
    std::int64_t begin = 0;
    for (std::size_t i = 0; i < lefts.size(); ++i) {
      const std::int64_t end = begin + lefts[i].units();
      const std::int64_t first = larger(from, begin), last = smaller(to, end);
      if (first < last) f(i, first - begin, last - first, first - from);
      begin = end;
    }
  }

  void pack(const Product& product, std::int64_t column, std::int64_t width, std::int64_t first, std::int64_t count,
            Unit* to) const {
    const Matrix& right = product.right;
    const std::int64_t from = first * kPerUnit, size = smaller(count * kPerUnit, product.size - from);
    if (right.turned)
      pack_over_size({right.data + column * right.stride + from, right.stride, width, size}, to);
    else
      pack_over_rows({right.data + from * right.stride + column, right.stride, size, width}, to);
  }

  void begin_tile(std::int64_t row, std::int64_t count, std::int64_t column, std::int64_t width, float* sums) const {
    for (std::int64_t i = 0; i < count; ++i)
      for (std::int64_t j = 0; j < width; j += kLanes)
        _mm512_store_ps(sums + i * kTile + j, Numbers::widen(start + (row + i) * columns + column + j));
  }

  void end_tile(std::int64_t row, std::int64_t count, std::int64_t column, std::int64_t width,
                const float* sums) const {
    for (std::int64_t i = 0; i < count; ++i)
      for (std::int64_t j = 0; j < width; j += kLanes)
        Numbers::write(out + (row + i) * columns + column + j, Numbers::narrow(_mm512_load_ps(sums + i * kTile + j)));
  }

  // Rows [first_row, last_row) of up to 64 columns: units [from, until) of the sum, which is kept in `sums`, tile after
  // tile, where it takes more than one turn.
  void panel(std::int64_t first_row, std::int64_t last_row, std::int64_t column, std::int64_t from, std::int64_t until,
             Unit* packed, float* sums) const {
    const std::int64_t width = smaller(columns - column, kTile);
    for (; from < until; from += kDepth) {
      const std::int64_t to = smaller(from + kDepth, until);
      parts(from, to, [&](std::size_t i, std::int64_t first, std::int64_t count, std::int64_t place) {
        pack(products[i], column, width, first, count, packed + place * kTile);
      });
      for (std::int64_t row = first_row; row < last_row; row += kRows) {
        float* tile = units > kDepth ? sums + (row - first_row) / kRows * kSums : sums;
        const std::int64_t count = smaller(kRows, last_row - row);
        if (from == 0 && start) begin_tile(row, count, column, width, tile);
        parts(from, to, [&](std::size_t i, std::int64_t first, std::int64_t number, std::int64_t place) {
          const Unit* right = packed + place * kTile;
          const std::int64_t stride = products[i].right.turned ? kTile : width;
          const Left left = lefts[i].at(row, first);
          if (start || from + place > 0)
            multiply<true>(left, right, stride, number, tile, kTile, width / kLanes);
          else
            multiply<false>(left, right, stride, number, tile, kTile, width / kLanes);
        });
        if (to == units) end_tile(row, count, column, width, tile);
      }
    }
  }
};

// As many as share a packed panel, if that leaves no thread idle for a twentieth of the time.
std::int64_t rows_of_task(std::int64_t rows, std::int64_t panels, int threads) {
  std::int64_t blocks = round_up(rows, kTaskRows) / kTaskRows;
  const auto idle = [&] {
    const std::int64_t tasks = panels * blocks, places = round_up(tasks, threads);
    return 20 * (places - tasks) > places;
  };
  while (idle() && rows / (blocks + 1) >= kLeastRows) ++blocks;
  return round_up((rows + blocks - 1) / blocks, kRows);
}

}  // namespace

void sum_products(const Product* products, std::int64_t count, const Bf16* start, Bf16* out, std::int64_t rows,
                  std::int64_t columns, int threads) {
  std::vector<Rearranged> lefts;
  std::int64_t units = 0;
  for (std::int64_t i = 0; i < count; ++i) units += lefts.emplace_back(products[i], rows).units();
  const Sum sum{products, lefts, start, out, columns, units};
  const std::int64_t panels = round_up(columns, kTile) / kTile;
  const std::int64_t step = rows_of_task(rows, panels, threads), blocks = round_up(rows, step) / step;
  const std::int64_t tasks = panels * blocks;
  // Of a long sum all panels take a turn before the next: else A comes from main memory once for each panel.
  const bool in_turns = units > kLong;
  const std::int64_t space = units > kDepth ? step * kTile : kSums;
  const Buffer<float> all_sums(in_turns ? tasks * space : 0, false);
  for (std::int64_t from = 0; from < units; from += in_turns ? kDepth : units) {
    const std::int64_t until = in_turns ? smaller(from + kDepth, units) : units;
    std::int64_t next = 0;
    run_tasks(threads, threads, [&](std::int64_t) {
      const Buffer<Unit> packed(smaller(until - from, kDepth) * kTile, false);
      const Buffer<float> sums(in_turns ? 0 : space, false);
      for (std::int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;) {
        const std::int64_t row = task % blocks * step;
        sum.panel(row, smaller(rows, row + step), task / blocks * kTile, from, until, packed.get(),
                  in_turns ? all_sums.get() + task * space : sums.get());
      }
    });
  }
}

}  // namespace llamahome

#else

namespace llamahome {

void sum_products(const Product*, std::int64_t, const Bf16*, Bf16*, std::int64_t, std::int64_t, int) {}

}  // namespace llamahome

#endif
