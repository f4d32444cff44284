#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>

#include "longspan/export.h"

namespace longspan {

/// Wakes one waiting thread whenever one of several requests moves on: it has a new token, or has
/// ended. Pass it to Engine::submit with each of them. Thread-safe.
class LONGSPAN_API Signal {
 public:
  /// True as soon as something has moved since the last call, false when the time is over.
  bool wait_for(std::chrono::milliseconds timeout);

  /// Something has moved.
  void notify();

 private:
  std::mutex mutex_;
  std::condition_variable moved_;
  bool raised_ = false;  // guarded by mutex_
};

}  // namespace longspan
