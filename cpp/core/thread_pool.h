#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace longspan {

/// A fork-join pool: the calling thread works too. Workers spin briefly for the next job, then
/// sleep, so that the hundreds of short jobs of a forward pass cost about a microsecond each and an
/// idle engine costs nothing. One thread at a time may call parallel_for; no nesting.
class ThreadPool {
 public:
  /// num_threads >= 1 counts the caller.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const;

  /// Calls fn(index, thread) for each index in [0, count), handed out one at a time in ascending
  /// order; thread is in [0, size()). Returns when all are done. fn must not throw.
  template <class Fn>
  void parallel_for(int64_t count, Fn&& fn) {
    using Plain = std::remove_reference_t<Fn>;
    const auto call = [](const void* plain, int64_t index, int thread) {
      (*static_cast<Plain*>(const_cast<void*>(plain)))(index, thread);
    };
    run({call, &fn, count});
  }

 private:
  /// A callable by address, so that a job allocates nothing.
  struct Job {
    void (*call)(const void* fn, int64_t index, int thread) = nullptr;
    const void* fn = nullptr;
    int64_t count = 0;
  };
  void run(const Job& job);

  class Impl;
  std::unique_ptr<Impl> impl_;
};

/// CPUs this process may run on (affinity and cgroup quota), >= 1.
int available_cpus();

}  // namespace longspan
