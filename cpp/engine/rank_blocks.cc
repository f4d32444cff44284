#include "engine/rank_blocks.h"

#include <cstring>

#include "core/check.h"
#include "engine/rank_group.h"

namespace longspan {
namespace {

/// What a rank has of a block: some heads, and of the tokens those of its part of the context.
struct Part {
  KvPlace place;
  int64_t tokens = 0;  ///< none where the block's end is not this rank's
};

Part part_of(const Rank& rank, int64_t tokens) {
  const KvShape& shape = rank.cache.shape;
  return {{rank.decoder->shard().kv_heads.begin, shape.context_rank * shape.block_len},
          shape.context().keys(tokens)};
}

KvRows own_rows(const Rank& rank, int64_t tokens) {
  return {rank.cache.shape, rank.backend->activation_dtype(), tokens};
}

/// What a rank sends: which part follows, and its rows.
std::vector<std::byte> message_of(Rank& rank, int32_t block, int64_t tokens) {
  const Part part = part_of(rank, tokens);
  std::vector<std::byte> message(sizeof(part) +
                                 static_cast<size_t>(own_rows(rank, part.tokens).bytes()));
  std::memcpy(message.data(), &part, sizeof(part));
  if (part.tokens > 0) {
    rank.backend->export_kv_block(rank.cache, block, part.tokens,
                                  std::span(message).subspan(sizeof(part)));
  }
  return message;
}

void import_own(Rank& rank, int32_t block, int64_t tokens, std::span<const std::byte> rows) {
  const KvRows all = whole_rows(rank, tokens);
  require<ParallelError>(std::ssize(rows) == all.bytes(), "block of rank 0: expected ", all.bytes(),
                         " bytes, got ", rows.size());
  const Part part = part_of(rank, tokens);
  if (part.tokens == 0) return;
  const KvRows own = own_rows(rank, part.tokens);
  std::vector<std::byte> mine(static_cast<size_t>(own.bytes()));
  take_rows(all, rows, part.place, own, mine);
  rank.backend->import_kv_block(rank.cache, block, part.tokens, mine);
}

}  // namespace

KvRows whole_rows(const Rank& rank, int64_t tokens) {
  KvShape shape = rank.cache.shape;
  shape.num_kv_heads = rank.decoder->config().num_kv_heads;
  return {shape, rank.backend->activation_dtype(), tokens};
}

void collect_block(Rank& rank, int32_t block, int64_t tokens, std::span<std::byte> rows) {
  if (rank.communicator->size() == 1) {
    return rank.backend->export_kv_block(rank.cache, block, tokens, rows);
  }
  std::vector<std::vector<std::byte>> messages;
  rank.communicator->gather(message_of(rank, block, tokens), messages);
  const KvRows all = whole_rows(rank, tokens);
  for (const std::span<const std::byte> message : messages) {
    Part part;
    std::memcpy(&part, message.data(), sizeof(part));
    const auto bytes = message.subspan(sizeof(part));
    put_rows(own_rows(rank, part.tokens), bytes, part.place, all, rows);
  }
}

void send_block(Rank& rank, int32_t block, int64_t tokens) {
  std::vector<std::vector<std::byte>> none;
  rank.communicator->gather(message_of(rank, block, tokens), none);
}

void hand_out_block(Rank& rank, int32_t block, int64_t tokens, std::vector<std::byte>& rows) {
  if (rank.communicator->size() == 1) {
    return rank.backend->import_kv_block(rank.cache, block, tokens, rows);
  }
  rank.communicator->broadcast(rows);
  import_own(rank, block, tokens, rows);
}

void receive_block(Rank& rank, int32_t block, int64_t tokens) {
  std::vector<std::byte> rows;
  rank.communicator->broadcast(rows);
  import_own(rank, block, tokens, rows);
}

}  // namespace longspan
