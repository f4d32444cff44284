#include "longspan/signal.h"

#include <utility>

namespace longspan {

bool Signal::wait_for(std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  moved_.wait_for(lock, timeout, [this] { return raised_; });
  return std::exchange(raised_, false);
}

void Signal::notify() {
  {
    const std::lock_guard lock(mutex_);
    raised_ = true;
  }
  moved_.notify_one();
}

}  // namespace longspan
