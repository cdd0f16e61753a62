// A thread that asks the kernel for bytes before they are needed.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "token_file.h"

namespace llamahome {

struct FileRange {
  const TokenFile* file;
  std::uint64_t offset;
  std::uint64_t size;
};

// Bounded: at most kMaxQueued ranges wait, more are dropped, for they are only hints. The files must outlive it.
class ReadAhead {
 public:
  ReadAhead();
  ~ReadAhead();
  ReadAhead(const ReadAhead&) = delete;
  ReadAhead& operator=(const ReadAhead&) = delete;

  void add(const std::vector<FileRange>& ranges);

  // A forked child has this object but not its thread.
  bool is_usable() const;

 private:
  static constexpr std::size_t kMaxQueued = 1 << 16;
  void run();

  pid_t owner_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<FileRange> queue_;
  bool stopping_ = false;
  std::thread thread_;  // last: it uses all the others
};

}  // namespace llamahome
