#include "parallel/group_barrier.h"

#include <chrono>
#include <thread>

#include "longspan/error.h"

namespace longspan {
namespace {

constexpr std::chrono::microseconds kSpin{40};

/// Returns once `word` is no longer `old`.
void wait_for_change(const std::atomic<uint32_t>& word, uint32_t old) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  while (word.load(std::memory_order_acquire) == old) {
    if (std::chrono::steady_clock::now() < end) {
      std::this_thread::yield();  // there may be more ranks than CPUs
    } else {
      word.wait(old, std::memory_order_acquire);
    }
  }
}

}  // namespace

void GroupBarrier::throw_failure() {
  const std::lock_guard lock(mutex_);
  throw ParallelError(why_);
}

void GroupBarrier::wait() {
  const uint32_t before = state_.load(std::memory_order_acquire);
  if ((before & kFailed) != 0) throw_failure();
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    state_.fetch_add(kOneGeneration);
    state_.notify_all();
    return;
  }
  wait_for_change(state_, before);
  // All came, even if one has failed since: that is for the next to find.
  if (state_.load(std::memory_order_acquire) == (before | kFailed)) throw_failure();
}

void GroupBarrier::check() {
  if ((state_.load() & kFailed) != 0) throw_failure();
}

void GroupBarrier::fail(const std::string& why) {
  const std::lock_guard lock(mutex_);
  if ((state_.load() & kFailed) != 0) return;
  why_ = why;
  state_.fetch_or(kFailed);
  state_.notify_all();
}

void GroupBarrier::recover() {
  const uint32_t recovered = recovered_.load();
  if (recovering_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    recovering_.store(0, std::memory_order_relaxed);
    arrived_.store(0, std::memory_order_relaxed);
    state_.fetch_and(~kFailed);
    recovered_.fetch_add(1);
    recovered_.notify_all();
  } else {
    wait_for_change(recovered_, recovered);
  }
}

}  // namespace longspan
