#include "parallel.h"

#include <atomic>
#include <new>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace llamahome {
namespace {

struct Queue {
  void (*task)(const void*, std::int64_t);
  const void* context;
  std::int64_t count;
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
};

// No exception may leave an OpenMP thread.
void work(void* data) {
  Queue& queue = *static_cast<Queue*>(data);
  try {
    for (std::int64_t i = queue.next++; i < queue.count; i = queue.next++) queue.task(queue.context, i);
  } catch (const std::bad_alloc&) {
    queue.out_of_memory = true;
  }
}

// How GCC's OpenMP runs a function on its threads; torch loads that library where everyone can see it.
using Runner = void (*)(void (*)(void*), void*, unsigned, unsigned);

Runner openmp() {
#if defined(__linux__)
  static const auto runner = reinterpret_cast<Runner>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return runner;
#else
  return nullptr;
#endif
}

}  // namespace

void run_tasks(std::int64_t count, int threads, void (*task)(const void*, std::int64_t), const void* context) {
  Queue queue{task, context, count};
  if (threads > count) threads = static_cast<int>(count);
  const Runner run = threads > 1 ? openmp() : nullptr;
  run ? run(work, &queue, static_cast<unsigned>(threads), 0) : work(&queue);
  if (queue.out_of_memory) throw std::bad_alloc();
}

}  // namespace llamahome
