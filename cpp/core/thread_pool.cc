#include "core/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <system_error>
#include <thread>
#include <vector>

#include "core/cgroup.h"
#include "core/check.h"

namespace longspan {
namespace {

// A worker that finds no job for this long sleeps.
constexpr std::chrono::microseconds kSpin{80};
constexpr int kPausesPerClockRead = 32;

// The state word of the pool. A worker joins a job by adding kOneWorker with a compare-exchange
// against an open state, so none can touch a job that its caller has closed, and a caller waits
// only for those that joined, never for one that is still asleep. A generation that wraps at worst
// makes a worker sit out a job.
constexpr uint32_t kOpen = 1;          // a job may be joined
constexpr uint32_t kStop = 2;          // workers leave
constexpr uint32_t kOneWorker = 4;     // one worker inside the job
constexpr uint32_t kWorkers = 0xfffc;  // how many are: 14 bits
constexpr uint32_t kOneGeneration = 0x10000;
constexpr uint32_t kGeneration = 0xffff0000;
constexpr int kMaxThreads = 1 << 13;

void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Spins until ready() or the time is over; returns the last ready().
template <class Ready>
bool spin_until(Ready ready) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < kPausesPerClockRead; ++i) {
      if (ready()) return true;
      pause_cpu();
    }
  } while (std::chrono::steady_clock::now() < end);
  return ready();
}

}  // namespace

class ThreadPool::Impl {
 public:
  explicit Impl(int num_threads) {
    require<InvalidArgument>(num_threads >= 1 && num_threads <= kMaxThreads,
                             "num_threads: expected 1 to ", kMaxThreads, ", got ", num_threads);
    try {
      for (int thread = 1; thread < num_threads; ++thread) {
        workers_.emplace_back([this, thread] { work(thread); });
      }
    } catch (const std::system_error& error) {
      const size_t started = workers_.size();
      stop();
      throw CapacityError(message("num_threads: expected the system to start ", num_threads - 1,
                                  " threads, got ", started, " and \"", error.what(), "\""));
    }
  }

  ~Impl() { stop(); }

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  void run(const Job& job) {
    if (workers_.empty() || job.count <= 1) {
      for (int64_t i = 0; i < job.count; ++i) job.call(job.fn, i, 0);
      return;
    }
    job_ = job;
    next_.store(0, std::memory_order_relaxed);
    const uint32_t generation = state_.load(std::memory_order_relaxed) & kGeneration;
    // Sequentially consistent, as is a sleeper's check, so that notify_all misses no sleeper.
    state_.store((generation + kOneGeneration) | kOpen);
    state_.notify_all();
    run_indices(0);
    state_.fetch_and(~kOpen, std::memory_order_relaxed);
    const auto all_left = [this] {
      return (state_.load(std::memory_order_acquire) & kWorkers) == 0;
    };
    while (!spin_until(all_left)) std::this_thread::yield();
  }

 private:
  void run_indices(int thread) {
    for (;;) {
      const int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= job_.count) return;
      job_.call(job_.fn, index, thread);
    }
  }

  void work(int thread) {
    pthread_setname_np(pthread_self(), "longspan-cpu");
    uint32_t done = 0;  // generation of the last job this worker was in
    uint32_t seen = 0;
    const auto has_news = [&] {
      seen = state_.load();
      return (seen & kStop) != 0 || ((seen & kOpen) != 0 && (seen & kGeneration) != done);
    };
    for (;;) {
      while (!spin_until(has_news)) state_.wait(seen);
      if ((seen & kStop) != 0) return;
      if (!state_.compare_exchange_strong(seen, seen + kOneWorker, std::memory_order_acquire)) {
        continue;
      }
      done = seen & kGeneration;
      run_indices(thread);
      state_.fetch_sub(kOneWorker, std::memory_order_release);
    }
  }

  void stop() {
    state_.fetch_or(kStop);
    state_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  Job job_;  // written while no worker is inside one, published by state_
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint32_t> state_{0};
  std::vector<std::thread> workers_;
};

ThreadPool::ThreadPool(int num_threads) : impl_(std::make_unique<Impl>(num_threads)) {}
ThreadPool::~ThreadPool() = default;

int ThreadPool::size() const { return impl_->size(); }

void ThreadPool::run(const Job& job) { impl_->run(job); }

int available_cpus() {
  double cpus = read_cgroup_limits().cpus;
  // The mask may be wider than cpu_set_t; the kernel answers EINVAL until ours is wide enough.
  for (int width = CPU_SETSIZE; width <= (1 << 20); width *= 2) {
    const size_t bytes = CPU_ALLOC_SIZE(width);
    cpu_set_t* const set = CPU_ALLOC(width);
    if (set == nullptr) break;
    const bool read = sched_getaffinity(0, bytes, set) == 0;
    if (read) cpus = std::min(cpus, static_cast<double>(CPU_COUNT_S(bytes, set)));
    CPU_FREE(set);
    if (read) break;
  }
  if (std::isinf(cpus)) cpus = std::thread::hardware_concurrency();
  return std::max(1, static_cast<int>(cpus));  // a fractional quota rounds down: spinning costs it
}

}  // namespace longspan
