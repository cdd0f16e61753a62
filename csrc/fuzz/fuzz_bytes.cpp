// The quick targets, for millions of executions: bytes of a damaged token file, lengths to be packed, orders of
// samples. No thread and no disk, as opposed to fuzz_reader: the file is in memory and small. The input's first byte
// chooses the target. Built with -fsanitize=fuzzer it is a libFuzzer target; without, it mutates by itself. Run under
// address and undefined-behaviour sanitizers. Usage: fuzz_bytes SECONDS [SEED] [CORPUS_FILE...]
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "../batch_reader.h"
#include "../packing.h"
#include "../sample_order.h"
#include "../token_writer.h"
#include "mend.h"

namespace {

using namespace llamahome;
using namespace llamahome::fuzz;

enum Target : std::uint8_t { kFile, kMendedFile, kPacking, kOrder, kTargets };
constexpr std::array<const char*, kTargets> kNames = {"file", "file with right checksums", "packing", "order"};

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

std::string scratch_path() {
  return std::filesystem::temp_directory_path() / ("fuzz_bytes." + std::to_string(::getpid()));
}

template <typename T>
T take(std::span<const std::uint8_t>& data) {
  T value{};
  const std::size_t size = std::min(sizeof value, data.size());
  std::memcpy(&value, data.data(), size);
  data = data.subspan(size);
  return value;
}

void read_documents(const BatchReader& reader) {
  for (std::int64_t id = 0; id < static_cast<std::int64_t>(reader.num_documents()); ++id) {
    std::uint32_t length = 0, trained = 0;
    reader.lengths(std::span(&id, 1), std::span(&length, 1));
    reader.trained_counts(std::span(&id, 1), std::span(&trained, 1));
    if (length == 0 || trained > length || length > 1 << 16) fail("a document that cannot be was let through");
    std::vector<std::int64_t> out(3 * std::size_t{length});
    std::array<std::int32_t, 2> bounds{};
    const std::span all(out);
    reader.pack(std::span(&id, 1), all.subspan(0, length), all.subspan(length, length),
                all.subspan(2 * std::size_t{length}, length), bounds);
  }
}

template <typename F>
void attempt(F f) {
  try {
    f();
  } catch (const DamagedFile&) {
  } catch (const std::out_of_range&) {
  }
}

// Whatever the bytes say, the reader may only answer or throw.
void read_file(std::span<const std::uint8_t> data, bool mended) {
  static const std::string path = scratch_path();
  static const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  Bytes file(data.begin(), data.end());
  if (mended) mend(file);
  if (::ftruncate(fd, static_cast<off_t>(file.size())) != 0) fail("ftruncate");
  if (::pwrite(fd, file.data(), file.size(), 0) != static_cast<ssize_t>(file.size())) fail("pwrite");
  const ReadMode mode = file.size() % 2 == 0 ? ReadMode::kMap : ReadMode::kRead;
  attempt([&] {
    BatchReader reader({path}, mode);
    if (reader.num_documents() > 1 << 16) fail("more documents than the file has bytes");
    attempt([&] { read_documents(reader); });
    attempt([&] {
      const std::uint64_t width = 7, count = std::min<std::uint64_t>((reader.num_tokens() + width - 1) / width, 64);
      std::vector<std::int64_t> rows(count), ids(count * width), labels(count * width);
      std::iota(rows.begin(), rows.end(), 0);
      reader.rows(rows, width, ids, labels);
    });
    attempt([&] { reader.verify(0); });
  });
}

// Every document is in exactly one row, and no row of several is longer than the budget.
void pack(std::span<const std::uint8_t> data) {
  const std::uint64_t budget = 1 + take<std::uint16_t>(data) % 4096;
  std::vector<std::uint32_t> lengths;
  while (!data.empty() && lengths.size() < 256) lengths.push_back(take<std::uint16_t>(data));
  const PackingPlan plan = plan_packing(lengths, budget);
  std::vector<bool> seen(lengths.size());
  for (std::size_t row = 0; row + 1 < plan.bounds.size(); ++row) {
    std::uint64_t sum = 0;
    const std::int64_t begin = plan.bounds[row], end = plan.bounds[row + 1];
    for (std::int64_t i = begin; i < end; ++i) {
      const auto document = static_cast<std::size_t>(plan.order.at(static_cast<std::size_t>(i)));
      if (seen.at(document)) fail("a document is packed twice");
      seen[document] = true;
      sum += lengths[document];
    }
    if (sum > budget && end - begin > 1) fail("a row is over the budget");
  }
  if (!std::all_of(seen.begin(), seen.end(), [](bool b) { return b; })) fail("a document is not packed");
}

// A window of the order has no sample twice and none that does not exist.
void order(std::span<const std::uint8_t> data) {
  const auto size = 1 + take<std::uint64_t>(data) % (std::uint64_t{1} << 40);
  const auto seed = take<std::uint64_t>(data), epoch = take<std::uint64_t>(data);
  const std::uint64_t choice = take<std::uint8_t>(data), block = choice % 3 == 0 ? 0 : std::uint64_t{1} << choice % 11;
  const std::uint64_t start = take<std::uint64_t>(data) % size;
  std::vector<std::int64_t> out(std::min<std::uint64_t>(size - start, 32));
  SampleOrder(size, seed, epoch, choice % 2 == 0, block).fill(start, out);
  std::sort(out.begin(), out.end());
  if (std::adjacent_find(out.begin(), out.end()) != out.end()) fail("a sample comes twice");
  if (out.front() < 0 || static_cast<std::uint64_t>(out.back()) >= size) fail("no such sample");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const std::span<const std::uint8_t> rest(data + 1, size - 1);
  switch (data[0] % kTargets) {
    case kPacking:
      pack(rest);
      break;
    case kOrder:
      order(rest);
      break;
    default:
      read_file(rest, data[0] % kTargets == kMendedFile);
  }
  return 0;
}

#if !defined(LLAMAHOME_LIBFUZZER)
namespace {

// A small valid file with up to four documents, after the byte of its target.
Bytes make_file(std::mt19937_64& random, Target target) {
  const std::string path = scratch_path() + ".seed";
  std::filesystem::remove(path);
  TokenFileWriter writer(path, random() % 2 != 0 ? 2 : 4);
  for (std::size_t i = 0, documents = random() % 5; i < documents; ++i) {
    std::vector<std::uint32_t> ids(1 + random() % 24);
    for (std::uint32_t& id : ids) id = static_cast<std::uint32_t>(random() % 60000);
    const auto trained = std::make_unique<bool[]>(ids.size());
    for (std::size_t k = 0, every = 1 + random() % 5; k < ids.size(); ++k) trained[k] = random() % every == 0;
    writer.append(ids, std::span<const bool>(trained.get(), ids.size()), random());
  }
  writer.finish();
  std::ifstream file(path, std::ios::binary);
  Bytes bytes{target};
  bytes.insert(bytes.end(), std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  std::filesystem::remove(path);
  return bytes;
}

Bytes make_input(std::mt19937_64& random, Target target) {
  if (target == kFile || target == kMendedFile) return make_file(random, target);
  Bytes bytes(1 + random() % 96);
  for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random());
  bytes[0] = target;
  return bytes;
}

// Bits, and whole words of values at the edges, half of them in the file's header or after its first page.
void mutate(Bytes& input, std::mt19937_64& random) {
  constexpr std::uint64_t kEdges[] = {0, 1, 2, 63, 64, 4095, 4096, UINT32_MAX, std::uint64_t{1} << 61, UINT64_MAX};
  for (std::size_t i = 0, count = 1 + random() % 5; i < count && input.size() > 1; ++i) {
    std::size_t at = random() % input.size();
    if (input.size() > kPage && random() % 4 != 0)
      at = random() % 2 != 0 ? random() % sizeof(Header) : kPage + random() % (input.size() - kPage);
    at = std::max<std::size_t>(at, 1);
    switch (random() % 5) {
      case 0:
        input[at] ^= static_cast<std::uint8_t>(1u << random() % 8);
        break;
      case 1:
        put(input, at / 8 * 8 + 1, kEdges[random() % std::size(kEdges)]);
        break;
      case 2:
        put(input, at / 4 * 4 + 1, static_cast<std::uint32_t>(random() % 64));
        break;
      case 3:
        put(input, at / 8 * 8 + 1, random() % (2 * input.size()));
        break;
      default:
        if (random() % 16 == 0) input.resize(at);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::strtod(argv[1], nullptr) : 10;
  std::mt19937_64 random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
  for (int i = 3; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    const Bytes input((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  std::array<std::uint64_t, kTargets> done{};
  std::array<Bytes, kTargets> seeds;
  for (std::uint64_t round = 0; round % 64 != 0 || std::chrono::steady_clock::now() < end; ++round) {
    const auto target = static_cast<Target>(round % kTargets);
    if (round / kTargets % 256 == 0) seeds[target] = make_input(random, target);
    Bytes input = seeds[target];
    mutate(input, random);
    input[0] = target;
    LLVMFuzzerTestOneInput(input.data(), input.size());
    ++done[target];
  }
  std::filesystem::remove(scratch_path());
  for (std::size_t target = 0; target < kTargets; ++target)
    std::printf("%llu %s, ", static_cast<unsigned long long>(done[target]), kNames[target]);
  std::printf("%llu executions\n", static_cast<unsigned long long>(std::accumulate(done.begin(), done.end(), 0ull)));
  return 0;
}
#endif
