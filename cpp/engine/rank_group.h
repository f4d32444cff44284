#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "backend/kv_rows.h"
#include "engine/rank_command.h"
#include "model/decoder.h"

namespace longspan {

/// One rank of an engine: a device, and its share of the weights and of the cache.
struct Rank {
  std::unique_ptr<Backend> backend;
  KvCache cache;
  std::unique_ptr<Decoder> decoder;
  /// Goes first: freeing memory may wait for the device, which may wait for a rank that is gone.
  std::unique_ptr<Communicator> communicator;
};

/// The ranks of an engine as one model. The caller's thread is rank 0; every other rank has a
/// thread here that does what rank 0 does. Where any rank fails, the call throws, with
/// ParallelError when it was another, and the group is as before it; where the ranks cannot be
/// brought together again, every later call throws ParallelError.
class RankGroup {
 public:
  /// ranks: this process's, in order of rank, the first of which is rank 0.
  explicit RankGroup(std::vector<Rank> ranks);
  ~RankGroup();
  RankGroup(const RankGroup&) = delete;
  RankGroup& operator=(const RankGroup&) = delete;

  int size() const { return ranks_.front().communicator->size(); }
  Backend& backend() { return *ranks_.front().backend; }  ///< rank 0's, to work on logits with

  // See Decoder. Whether a forward goes on after a layer is rank 0's to say, for all.
  bool forward(StepInput input, bool cache_only, const LayerCallback& after_layer);
  MatrixView logits(std::span<const int64_t> rows);
  void negative_log_likelihood(std::span<const int64_t> rows, std::span<const int32_t> targets,
                               std::span<double> nll);
  /// See Backend; tokens of all ranks that share the context.
  void copy_kv_block(int32_t from, int32_t to, int64_t tokens);
  /// The same for all heads of the model, whichever rank has them: kv_rows(tokens).
  KvRows kv_rows(int64_t tokens) const;
  void export_kv_block(int32_t block, int64_t tokens, std::span<std::byte> rows);
  void import_kv_block(int32_t block, int64_t tokens, std::vector<std::byte>& rows);

 private:
  template <class Work>
  auto lead(const RankCommand& command, Work work);
  void send(const RankCommand& command);

  std::vector<Rank> ranks_;
  std::string broken_;  // why the group cannot be used any more; empty: it can
  std::vector<std::thread> threads_;
};

/// Does what rank 0 says until it says stop. Throws what went wrong where the group is lost.
void follow(Rank& rank);

}  // namespace longspan
