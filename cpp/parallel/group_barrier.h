#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>

namespace longspan {

/// A barrier of the threads of a group that one of them can break. A thread that waits spins for a
/// moment, then sleeps, so that a group that works costs microseconds and an idle one nothing.
class GroupBarrier {
 public:
  explicit GroupBarrier(int size) : size_(size) {}

  /// Returns when all have come; what each wrote before is then seen by all. Throws ParallelError
  /// when they will not, because of fail().
  void wait();

  /// Throws what wait() would, without waiting.
  void check();

  /// Breaks the barrier: `why` is what wait() throws. The first call counts.
  void fail(const std::string& why);

  /// Returns when all have called it; the barrier is then whole again. No other thread may be in
  /// wait() or come to it before.
  void recover();

 private:
  // The state word: a bit for failure, and above it how often all have come.
  static constexpr uint32_t kFailed = 1;
  static constexpr uint32_t kOneGeneration = 2;

  [[noreturn]] void throw_failure();

  const int size_;
  alignas(64) std::atomic<int> arrived_ = 0;
  alignas(64) std::atomic<uint32_t> state_ = 0;
  std::atomic<int> recovering_ = 0;
  std::atomic<uint32_t> recovered_ = 0;
  std::mutex mutex_;
  std::string why_;  // guarded by mutex_
};

}  // namespace longspan
