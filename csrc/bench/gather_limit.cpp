// The limit that benchmarks/reader.py measures against: nothing but random rows of a mapped file, widened into buffers
// that stay in the cache. No bounds, no documents, no checksums. Usage: gather_limit FILE WIDTH ROWS SECONDS
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

double thread_seconds() {
  timespec now{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

void widen(const std::uint16_t* __restrict tokens, std::size_t count, std::int64_t* __restrict ids,
           std::int64_t* __restrict labels) {
  for (std::size_t i = 0; i < count; ++i) ids[i] = tokens[i];
  for (std::size_t i = 0; i < count; ++i) labels[i] = tokens[i];
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const int fd = ::open(argv[1], O_RDONLY);
  struct stat status{};
  if (fd < 0 || ::fstat(fd, &status) != 0) return 1;
  const auto size = static_cast<std::size_t>(status.st_size);
  void* map = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
  if (map == MAP_FAILED) return 1;
  const auto* tokens = static_cast<const std::uint16_t*>(map);
  const auto width = std::strtoull(argv[2], nullptr, 10), rows = std::strtoull(argv[3], nullptr, 10);
  const double limit = std::strtod(argv[4], nullptr);
  const std::size_t places = size / 2 / width;
  if (places == 0) return 2;
  std::vector<std::int64_t> ids(width * rows), labels(width * rows);
  std::mt19937_64 random(1);
  std::uint64_t touched = 0;
  for (std::size_t i = 0; i < size; i += 4096) touched += tokens[i / 2];  // every page is mapped
  double best = 0;
  for (const double end = thread_seconds() + limit; thread_seconds() < end;) {
    constexpr int kBatches = 2000;
    const double begin = thread_seconds();
    for (int batch = 0; batch < kBatches; ++batch) {
      for (std::size_t row = 0; row < rows; ++row)
        widen(tokens + random() % places * width, width, &ids[row * width], &labels[row * width]);
      touched += static_cast<std::uint64_t>(ids[0]);
    }
    const double rate = kBatches * static_cast<double>(rows * width) / (thread_seconds() - begin);
    best = rate > best ? rate : best;
  }
  std::printf("%.0f %llu\n", best, static_cast<unsigned long long>(touched));
  return 0;
}
