#include "core/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "longspan/error.h"

namespace longspan {
namespace {

class ThreadPoolOfSize : public testing::TestWithParam<int> {};

TEST_P(ThreadPoolOfSize, CallsEveryIndexOnce) {
  ThreadPool pool(GetParam());
  ASSERT_EQ(pool.size(), GetParam());
  for (const int64_t count : {0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 1000, 10007}) {
    // Plain ints: the pool alone must order the workers' writes before the caller's reads.
    std::vector<int> calls(static_cast<size_t>(count), 0);
    std::atomic<bool> thread_in_range = true;
    pool.parallel_for(count, [&](int64_t index, int thread) {
      ++calls[static_cast<size_t>(index)];
      if (thread < 0 || thread >= pool.size()) thread_in_range = false;
    });
    for (int64_t i = 0; i < count; ++i) {
      ASSERT_EQ(calls[static_cast<size_t>(i)], 1) << "index " << i << " of " << count;
    }
    EXPECT_TRUE(thread_in_range);
  }
}

TEST_P(ThreadPoolOfSize, OneThreadNumberIsOneThreadAtATime) {
  ThreadPool pool(GetParam());
  std::vector<std::atomic<int>> inside(static_cast<size_t>(pool.size()));
  std::atomic<bool> overlapped = false;
  for (int job = 0; job < 200; ++job) {
    pool.parallel_for(64, [&](int64_t, int thread) {
      if (inside[static_cast<size_t>(thread)].fetch_add(1) != 0) overlapped = true;
      inside[static_cast<size_t>(thread)].fetch_sub(1);
    });
  }
  EXPECT_FALSE(overlapped);
}

TEST_P(ThreadPoolOfSize, ShortJobsFollowOneAnother) {
  ThreadPool pool(GetParam());
  constexpr int kJobs = 5000;
  int64_t plain = 0;
  std::vector<int64_t> out(5, 0);
  for (int job = 0; job < kJobs; ++job) {
    // Each job reads what the last one wrote.
    pool.parallel_for(5, [&](int64_t index, int) { out[static_cast<size_t>(index)] += plain; });
    plain = out[0] % 7 + 1;
  }
  for (const int64_t value : out) EXPECT_EQ(value, out[0]);
}

TEST_P(ThreadPoolOfSize, WakesAfterSleeping) {
  ThreadPool pool(GetParam());
  for (int job = 0; job < 20; ++job) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    std::atomic<int64_t> sum = 0;
    pool.parallel_for(100, [&](int64_t index, int) { sum += index; });
    ASSERT_EQ(sum, 4950);
  }
}

TEST_P(ThreadPoolOfSize, DestructionJoinsHotAndSleepingWorkers) {
  for (int i = 0; i < 30; ++i) {
    auto pool = std::make_unique<ThreadPool>(GetParam());
    if (i % 3 != 0) pool->parallel_for(i, [](int64_t, int) {});
    if (i % 5 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

INSTANTIATE_TEST_SUITE_P(Threads, ThreadPoolOfSize, testing::Values(1, 2, 3, 4, 5, 8));

TEST(ThreadPool, SleepingWorkersWakeForAJob) {
  ThreadPool pool(2);
  for (int job = 0; job < 5; ++job) {
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
    std::atomic<int> inside = 0;
    // Each of the two indices waits for the other, so one thread alone would never end.
    pool.parallel_for(2, [&](int64_t, int) {
      ++inside;
      while (inside < 2) std::this_thread::yield();
    });
    EXPECT_EQ(inside, 2);
  }
}

TEST(ThreadPool, PoolsAreIndependent) {
  ThreadPool outer(3);
  std::vector<std::atomic<int64_t>> sums(6);
  outer.parallel_for(6, [&](int64_t index, int) {
    ThreadPool inner(2);
    inner.parallel_for(50, [&](int64_t i, int) { sums[static_cast<size_t>(index)] += i; });
  });
  for (const auto& sum : sums) EXPECT_EQ(sum, 1225);
}

TEST(ThreadPool, RefusesNoThreads) {
  EXPECT_THROW(ThreadPool(0), InvalidArgument);
  EXPECT_THROW(ThreadPool(-3), InvalidArgument);
}

TEST(ThreadPool, CountsCpus) {
  EXPECT_GE(available_cpus(), 1);
  EXPECT_LE(available_cpus(), static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace
}  // namespace longspan
