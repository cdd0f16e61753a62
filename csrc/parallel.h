// Independent tasks on the threads that torch uses: two pools would fight for the cores.
#pragma once

#include <cstdint>

namespace llamahome {

// task(context, i) for i in [0, count), each once, in any order; returns when all are done. Where no torch has been
// loaded, or one without GCC's OpenMP, one thread does them all. Throws std::bad_alloc when a task did, and then some
// tasks are not done; a task must throw nothing else.
void run_tasks(std::int64_t count, int threads, void (*task)(const void*, std::int64_t), const void* context);

template <typename F>
void run_tasks(std::int64_t count, int threads, const F& f) {
  run_tasks(count, threads, [](const void* context, std::int64_t i) { (*static_cast<const F*>(context))(i); }, &f);
}

}  // namespace llamahome
