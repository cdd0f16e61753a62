// Many threads read, check, prefetch and verify the same files at once; what they read is compared with what one thread
// read. To be run under the thread sanitizer. Usage: stress_reader [THREADS] [ROUNDS]
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "../batch_reader.h"
#include "../sample_order.h"
#include "../token_writer.h"

namespace {

using namespace llamahome;

constexpr std::uint32_t kDocuments = 500;

void write_file(const std::string& path, std::uint32_t first) {
  std::filesystem::remove(path);
  TokenFileWriter writer(path, 2);
  for (std::uint32_t i = 0; i < kDocuments; ++i) {
    std::vector<std::uint32_t> ids(1 + i * 37 % 400);
    std::iota(ids.begin(), ids.end(), first + i);
    const auto trained = std::make_unique<bool[]>(ids.size());
    for (std::size_t k = 0; k < ids.size(); ++k) trained[k] = k % 16 > i % 16;
    writer.append(ids, std::span<const bool>(trained.get(), ids.size()), i);
  }
  writer.finish();
}

// Out of the page cache, so that there is something to prefetch.
void evict(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY);
#if defined(POSIX_FADV_DONTNEED)
  ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
#endif
  ::close(fd);
}

// The sum of all that an epoch in this order reads, which does not depend on the order.
std::int64_t read_epoch(BatchReader& reader, std::uint64_t epoch) {
  std::vector<std::int64_t> ids(reader.num_documents());
  SampleOrder(ids.size(), 1, epoch, true).fill(0, ids);
  std::int64_t sum = 0;
  for (std::size_t at = 0; at < ids.size(); at += 20) {
    const std::span<const std::int64_t> part(&ids[at], 20);
    reader.prefetch(part);
    std::vector<std::uint32_t> lengths(part.size());
    reader.lengths(part, lengths);
    std::vector<std::int64_t> out(3 * std::accumulate(lengths.begin(), lengths.end(), std::size_t{0}));
    const std::size_t total = out.size() / 3;
    std::vector<std::int32_t> bounds(part.size() + 1);
    const std::span all(out);
    reader.pack(part, all.subspan(0, total), all.subspan(total, total), all.subspan(2 * total, total), bounds);
    sum = std::accumulate(out.begin(), out.end(), sum);
  }
  return sum;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 4, rounds = argc > 2 ? std::atoi(argv[2]) : 20;
  const std::string base = "/tmp/stress_reader." + std::to_string(::getpid());
  const std::vector<std::string> paths = {base + ".0", base + ".1"};
  for (std::size_t i = 0; i < paths.size(); ++i) write_file(paths[i], static_cast<std::uint32_t>(1000 * i));
  std::atomic<int> wrong = 0;
  for (int round = 0; round < rounds; ++round) {
    std::int64_t expected;
    {
      BatchReader alone(paths, ReadMode::kRead);
      expected = read_epoch(alone, 0);
    }
    for (const std::string& path : paths) evict(path);
    BatchReader shared(paths, round % 2 == 0 ? ReadMode::kMap : ReadMode::kRead);
    std::vector<std::thread> workers;
    for (int i = 0; i < threads; ++i)
      workers.emplace_back([&, i] {
        if (i < 2) shared.verify(static_cast<std::size_t>(i));
        if (read_epoch(shared, static_cast<std::uint64_t>(i)) != expected) ++wrong;
      });
    for (std::thread& worker : workers) worker.join();
  }
  for (const std::string& path : paths) std::filesystem::remove(path);
  std::printf("%d threads, %d rounds, %d wrong\n", threads, rounds, wrong.load());
  return wrong == 0 ? 0 : 1;
}
