#include "engine/load_ranks.h"

#include <algorithm>
#include <exception>
#include <functional>
#include <limits>
#include <mutex>
#include <numeric>
#include <thread>
#include <utility>

#include "backend/registry.h"
#include "core/check.h"
#include "engine/memory_plan.h"

namespace longspan {
namespace {

constexpr int kRendezvousMs = 60000;

/// A value of each process, where there are several; else of this alone.
std::vector<int64_t> of_all_processes(const std::vector<Rank>& ranks, int64_t mine) {
  Communicator& communicator = *ranks.front().communicator;
  if (std::ssize(ranks) == communicator.size()) return {mine};
  std::vector<int64_t> all(static_cast<size_t>(communicator.size()));
  communicator.all_gather(std::as_bytes(std::span(&mine, 1)),
                          std::as_writable_bytes(std::span(all)));
  return all;
}

/// Calls work(rank) for each rank in a thread of its own; rethrows the first failure when all have
/// ended.
void for_each_rank(int size, const std::function<void(int)>& work) {
  std::mutex mutex;
  std::exception_ptr failure;  // guarded by mutex
  const auto guarded = [&](int rank) {
    try {
      work(rank);
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!failure) failure = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  for (int rank = 1; rank < size; ++rank) threads.emplace_back(guarded, rank);
  guarded(0);
  for (std::thread& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
}

/// Adds up the progress of ranks that load at the same time, and ends the others when one fails.
class SharedProgress {
 public:
  SharedProgress(int size, const WeightProgress& report)
      : report_(report), done_(static_cast<size_t>(size)), total_(static_cast<size_t>(size)) {}

  void advance(int rank, int64_t done, int64_t total) {
    const std::lock_guard lock(mutex_);
    require<ParallelError>(!failed_, "rank ", rank, ": expected all ranks to load, got a failure");
    done_[static_cast<size_t>(rank)] = done;
    total_[static_cast<size_t>(rank)] = total;
    // Until each has begun, the whole is not known.
    if (!report_ || std::ranges::find(total_, 0) != total_.end()) return;
    report_(std::accumulate(done_.begin(), done_.end(), int64_t{0}),
            std::accumulate(total_.begin(), total_.end(), int64_t{0}));
  }
  void fail() {
    const std::lock_guard lock(mutex_);
    failed_ = true;
  }

 private:
  const WeightProgress& report_;
  std::mutex mutex_;
  std::vector<int64_t> done_;   // [size], bytes; guarded by mutex_
  std::vector<int64_t> total_;  // [size], bytes; guarded by mutex_
  bool failed_ = false;         // guarded by mutex_
};

}  // namespace

std::vector<Rank> connect_ranks(std::vector<std::unique_ptr<Backend>> backends) {
  const auto size = static_cast<int>(backends.size());
  std::vector<std::unique_ptr<Communicator>> local;
  if (size == 1) {
    local.push_back(make_single_communicator());
  } else {
    local = make_local_communicators(size);
  }
  std::vector<Rank> ranks(backends.size());
  for_each_rank(size, [&](int r) {
    const auto i = static_cast<size_t>(r);
    ranks[i].backend = std::move(backends[i]);
    ranks[i].communicator = ranks[i].backend->make_communicator(std::move(local[i]));
  });
  return ranks;
}

std::vector<Rank> connect_launched(const Launch& launch, const EngineConfig& config) {
  auto host = make_tcp_communicator(launch, kRendezvousMs);
  std::vector<Rank> ranks(1);
  ranks[0].backend =
      make_launched_backend(config.device, config.dtype, config.num_threads, launch.local_rank);
  ranks[0].communicator = ranks[0].backend->make_communicator(std::move(host));
  return ranks;
}

int64_t bytes_per_rank(const std::vector<Rank>& ranks) {
  int64_t least = std::numeric_limits<int64_t>::max();
  for (const Rank& rank : ranks) least = std::min(least, rank.backend->free_bytes());
  for (const int64_t theirs : of_all_processes(ranks, least)) least = std::min(least, theirs);
  const Rank& rank = ranks.front();
  return rank.backend->traits().shares_memory ? least / rank.communicator->size() : least;
}

void load_ranks(const ModelConfig& model, const EngineConfig& config, const MemoryPlan& plan,
                const Checkpoint& checkpoint, const WeightProgress& progress,
                std::vector<Rank>& ranks) {
  const auto size = static_cast<int>(ranks.size());
  SharedProgress shared(size, progress);
  for_each_rank(size, [&](int r) {
    Rank& rank = ranks[static_cast<size_t>(r)];
    try {
      const auto threads = static_cast<int>(share_of(config.num_threads, r, size).size());
      const Shard shard(model, rank.communicator->rank(), config.tp, config.cp);
      DecoderWeights weights = load_weights(
          model, checkpoint, *rank.backend, shard, linear_dtype(config), std::max(1, threads),
          [&](int64_t done, int64_t total) { shared.advance(r, done, total); });
      rank.cache = {rank.backend->allocate(plan.kv_bytes), kv_shape(config, model, shard),
                    plan.num_blocks, plan.block_bytes};
      rank.decoder = std::make_unique<Decoder>(model, shard, *rank.backend, *rank.communicator,
                                               std::move(weights),
                                               decoder_limits(config, rank.backend->traits()));
    } catch (...) {
      shared.fail();
      throw;
    }
  });
  of_all_processes(ranks, 0);  // whoever failed is not there to answer
}

}  // namespace longspan
