#include "engine/rank_group.h"

#include <pthread.h>

#include <exception>
#include <utility>

#include "core/check.h"
#include "engine/rank_blocks.h"

namespace longspan {
namespace {

/// Tells the group of the exception at hand and waits for the others. False where the group is
/// lost.
bool give_up(Communicator& communicator) {
  std::string why = "unknown error";
  try {
    throw;
  } catch (const std::exception& error) {
    why = error.what();
  } catch (...) {  // on purpose: the why above has to do
  }
  communicator.fail(why);
  return communicator.recover();
}

/// Rank 0's answer to a question that all ranks ask.
bool agree(Communicator& communicator, bool answer) {
  if (communicator.size() == 1) return answer;
  std::vector<std::byte> message(1, static_cast<std::byte>(answer));
  communicator.broadcast(message);
  return message.at(0) != std::byte{0};
}

/// Copies what the rank has of the first `tokens` tokens of a block.
void copy_block(Rank& rank, int32_t from, int32_t to, int64_t tokens) {
  const int64_t mine = rank.cache.shape.context().keys(tokens);
  if (mine > 0) rank.backend->copy_kv_block(rank.cache, from, to, mine);
}

void execute(Rank& rank, const RankCommand& command) {
  switch (command.kind) {
    case RankCommand::Kind::kForward:
      rank.decoder->forward(command.step, rank.cache, command.cache_only,
                            [&](int64_t) { return agree(*rank.communicator, true); });
      break;
    case RankCommand::Kind::kLogits:
      rank.decoder->logits(command.rows);
      break;
    case RankCommand::Kind::kScore: {
      std::vector<double> nll(command.rows.size());
      rank.decoder->negative_log_likelihood(command.rows, command.targets, nll);
      break;
    }
    case RankCommand::Kind::kCopyBlock:
      copy_block(rank, command.from, command.to, command.tokens);
      break;
    case RankCommand::Kind::kExportBlock:
      send_block(rank, command.from, command.tokens);
      break;
    case RankCommand::Kind::kImportBlock:
      receive_block(rank, command.to, command.tokens);
      break;
    case RankCommand::Kind::kStop:
      break;
  }
}

}  // namespace

void follow(Rank& rank) {
  for (;;) {
    try {
      std::vector<std::byte> message;
      rank.communicator->broadcast(message);
      const RankCommand command = RankCommand::from_bytes(message);
      if (command.kind == RankCommand::Kind::kStop) return;
      execute(rank, command);
    } catch (...) {
      if (!give_up(*rank.communicator)) throw;
    }
  }
}

RankGroup::RankGroup(std::vector<Rank> ranks) : ranks_(std::move(ranks)) {
  for (size_t i = 1; i < ranks_.size(); ++i) {
    threads_.emplace_back([this, i] {
      pthread_setname_np(pthread_self(), "longspan-rank");
      try {
        follow(ranks_[i]);
      } catch (...) {  // on purpose: rank 0 has been told
      }
    });
  }
}

RankGroup::~RankGroup() {
  // The first try may find that another rank has failed since the last call.
  for (int tries = 0; tries < 2 && broken_.empty(); ++tries) {
    try {
      send({.kind = RankCommand::Kind::kStop});
      break;
    } catch (const std::exception& error) {
      if (!give_up(*ranks_.front().communicator)) broken_ = error.what();
    }
  }
  for (std::thread& thread : threads_) thread.join();
}

void RankGroup::send(const RankCommand& command) {
  Communicator& communicator = *ranks_.front().communicator;
  if (communicator.size() == 1) return;
  std::vector<std::byte> message = command.to_bytes();
  communicator.broadcast(message);
}

template <class Work>
auto RankGroup::lead(const RankCommand& command, Work work) {
  require<ParallelError>(broken_.empty(), "expected all ranks of the group, got: ", broken_,
                         "; load the engine again");
  Rank& rank = ranks_.front();
  try {
    send(command);
    return work(rank);
  } catch (const std::exception& error) {
    if (!give_up(*rank.communicator)) broken_ = error.what();
    throw;
  }
}

bool RankGroup::forward(StepInput input, bool cache_only, const LayerCallback& after_layer) {
  const RankCommand command = {
      .kind = RankCommand::Kind::kForward, .step = std::move(input), .cache_only = cache_only};
  return lead(command, [&](Rank& rank) {
    return rank.decoder->forward(command.step, rank.cache, cache_only, [&](int64_t layers_done) {
      return agree(*rank.communicator, after_layer(layers_done));
    });
  });
}

MatrixView RankGroup::logits(std::span<const int64_t> rows) {
  const RankCommand command = {.kind = RankCommand::Kind::kLogits,
                               .rows = {rows.begin(), rows.end()}};
  return lead(command, [&](Rank& rank) { return rank.decoder->logits(rows); });
}

void RankGroup::negative_log_likelihood(std::span<const int64_t> rows,
                                        std::span<const int32_t> targets, std::span<double> nll) {
  const RankCommand command = {.kind = RankCommand::Kind::kScore,
                               .rows = {rows.begin(), rows.end()},
                               .targets = {targets.begin(), targets.end()}};
  lead(command, [&](Rank& rank) { rank.decoder->negative_log_likelihood(rows, targets, nll); });
}

void RankGroup::copy_kv_block(int32_t from, int32_t to, int64_t tokens) {
  const RankCommand command = {
      .kind = RankCommand::Kind::kCopyBlock, .from = from, .to = to, .tokens = tokens};
  lead(command, [&](Rank& rank) { copy_block(rank, from, to, tokens); });
}

KvRows RankGroup::kv_rows(int64_t tokens) const { return whole_rows(ranks_.front(), tokens); }

void RankGroup::export_kv_block(int32_t block, int64_t tokens, std::span<std::byte> rows) {
  const RankCommand command = {
      .kind = RankCommand::Kind::kExportBlock, .from = block, .tokens = tokens};
  lead(command, [&](Rank& rank) { collect_block(rank, block, tokens, rows); });
}

void RankGroup::import_kv_block(int32_t block, int64_t tokens, std::vector<std::byte>& rows) {
  const RankCommand command = {
      .kind = RankCommand::Kind::kImportBlock, .to = block, .tokens = tokens};
  lead(command, [&](Rank& rank) { hand_out_block(rank, block, tokens, rows); });
}

}  // namespace longspan
