#include "read_ahead.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

namespace llamahome {

ReadAhead::ReadAhead() : owner_(::getpid()) {
  // Signals belong to the thread that runs Python.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    thread_ = std::thread([this] { run(); });
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

ReadAhead::~ReadAhead() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_one();
  thread_.join();
}

bool ReadAhead::is_usable() const { return owner_ == ::getpid(); }

void ReadAhead::add(const std::vector<FileRange>& ranges) {
  {
    const std::lock_guard lock(mutex_);
    for (const FileRange& range : ranges) {
      if (queue_.size() >= kMaxQueued) break;
      queue_.push_back(range);
    }
  }
  changed_.notify_one();
}

void ReadAhead::run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (stopping_) return;
    const FileRange range = queue_.front();
    queue_.pop_front();
    lock.unlock();
    range.file->will_need(range.offset, range.size);
    lock.lock();
  }
}

}  // namespace llamahome
