// Damages token files at random, mends their checksums so that the damage gets past them, and reads everything.
// Whatever the file says, the reader may only answer or throw. Built with -fsanitize=fuzzer it is a libFuzzer target;
// without, it mutates by itself. Run under address and undefined-behaviour sanitizers. Usage: fuzz_reader SECONDS
// [SEED]
#include <unistd.h>

#include <algorithm>
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
#include "../token_writer.h"
#include "mend.h"

namespace {

using namespace llamahome;
using namespace llamahome::fuzz;

std::string scratch_path() {
  const char* folder = std::getenv("TMPDIR");
  return std::string(folder != nullptr ? folder : "/tmp") + "/fuzz_reader." + std::to_string(::getpid());
}

// A small valid file with documents of all sorts.
Bytes make_seed(std::mt19937_64& random) {
  const std::string path = scratch_path() + ".seed";
  std::filesystem::remove(path);
  TokenFileWriter writer(path, random() % 2 != 0 ? 2 : 4);
  for (std::size_t i = 0, documents = random() % 12; i < documents; ++i) {
    std::vector<std::uint32_t> ids(1 + random() % (random() % 16 == 0 ? 5000 : 40));
    for (std::uint32_t& id : ids) id = static_cast<std::uint32_t>(random() % 60000);
    const auto trained = std::make_unique<bool[]>(ids.size());
    for (std::size_t k = 0, every = 1 + random() % 9; k < ids.size(); ++k) trained[k] = random() % every == 0;
    writer.append(ids, std::span<const bool>(trained.get(), ids.size()), random());
  }
  writer.finish();
  std::ifstream file(path, std::ios::binary);
  Bytes bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::filesystem::remove(path);
  return bytes;
}

// Changes that a random flip would seldom make: whole words, of values at the edges.
void mutate(Bytes& file, std::mt19937_64& random) {
  constexpr std::uint64_t kEdges[] = {0, 1, 2, 63, 64, 4095, 4096, UINT32_MAX, std::uint64_t{1} << 61, UINT64_MAX};
  for (std::size_t i = 0, count = 1 + random() % 6; i < count && !file.empty(); ++i) {
    // Half of the changes go to the header, the rest anywhere.
    const std::size_t at =
        random() % 2 == 0 ? random() % std::min<std::size_t>(file.size(), sizeof(Header)) : random() % file.size();
    switch (random() % 6) {
      case 0:
        file[at] ^= static_cast<std::uint8_t>(1u << random() % 8);
        break;
      case 1:
        put(file, at / 8 * 8, kEdges[random() % std::size(kEdges)]);
        break;
      case 2:
        put(file, at / 4 * 4, static_cast<std::uint32_t>(kEdges[random() % std::size(kEdges)]));
        break;
      case 3:
        put(file, at / 8 * 8, random() % (2 * file.size()));
        break;
      case 4:
        put(file, at / 4 * 4, static_cast<std::uint32_t>(random() % 64));
        break;
      default:
        if (random() % 8 == 0) file.resize(at);
        break;
    }
  }
}

void read_packed(const BatchReader& reader, std::span<const std::int64_t> ids) {
  std::vector<std::uint32_t> lengths(ids.size()), trained(ids.size());
  std::vector<std::uint64_t> sources(ids.size());
  reader.lengths(ids, lengths);
  reader.trained_counts(ids, trained);
  reader.sources(ids, sources);
  const auto total = std::accumulate(lengths.begin(), lengths.end(), std::uint64_t{0});
  if (total > 1 << 20) throw std::runtime_error("more tokens than the file has bytes");
  std::vector<std::int64_t> out(3 * total);
  std::vector<std::int32_t> bounds(ids.size() + 1);
  const std::span all(out);
  reader.pack(ids, all.subspan(0, total), all.subspan(total, total), all.subspan(2 * total, total), bounds);
  for (const std::int64_t length : lengths)
    if (length == 0) std::abort();
  plan_packing(lengths, 512);
}

void read_rows(const BatchReader& reader, std::uint64_t width) {
  const std::uint64_t count = (reader.num_tokens() + width - 1) / width;
  if (count > 1 << 16) std::abort();  // the file is small: its header must not have claimed this
  std::vector<std::int64_t> rows(count), ids(count * width), labels(count * width);
  std::iota(rows.begin(), rows.end(), 0);
  reader.rows(rows, width, ids, labels);
}

// Each way of reading by itself: one that throws must not hide the others.
template <typename F>
void attempt(F f) {
  try {
    f();
  } catch (const DamagedFile&) {
  } catch (const std::out_of_range&) {
  }
}

void read_everything(const std::string& path, ReadMode mode) {
  attempt([&] {
    BatchReader reader({path, path}, mode);
    if (reader.num_documents() > 1 << 16) std::abort();
    std::vector<std::int64_t> ids(reader.num_documents());
    std::iota(ids.begin(), ids.end(), 0);
    attempt([&] { read_packed(reader, ids); });
    for (const std::int64_t id : ids) attempt([&] { read_packed(reader, std::span(&id, 1)); });
    for (const std::uint64_t width : {5, 3000}) attempt([&] { read_rows(reader, width); });
    attempt([&] { reader.prefetch(ids); });
    attempt([&] { reader.verify(0); });
  });
}

void read_bytes(const Bytes& file) {
  static const std::string path = scratch_path();
  {
    std::ofstream out(path, std::ios::binary | std::ios::trunc);
    out.write(reinterpret_cast<const char*>(file.data()), static_cast<std::streamsize>(file.size()));
  }
  read_everything(path, ReadMode::kMap);
  read_everything(path, ReadMode::kRead);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Bytes file(data, data + size);
  mend(file);
  read_bytes(file);
  return 0;
}

#if !defined(LLAMAHOME_LIBFUZZER)
int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::strtod(argv[1], nullptr) : 10;
  std::mt19937_64 random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  std::uint64_t files = 0;
  Bytes seed;
  for (; std::chrono::steady_clock::now() < end; ++files) {
    if (files % 256 == 0) seed = make_seed(random);
    Bytes file = seed;
    mutate(file, random);
    if (random() % 8 != 0) mend(file);
    read_bytes(file);
  }
  std::filesystem::remove(scratch_path());
  std::printf("%llu damaged files read\n", static_cast<unsigned long long>(files));
  return 0;
}
#endif
