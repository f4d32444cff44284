#include "engine/context_blocks.h"

#include <utility>

#include "core/check.h"

namespace longspan {
namespace {

/// A context as the prefix cache knows sequences.
std::unique_ptr<Sequence> sequence_of(const Context& context) {
  Request request;
  request.input_ids = context.token_ids;
  RequestLengths lengths;
  lengths.prompt = std::ssize(request.input_ids);
  return std::make_unique<Sequence>(
      std::make_shared<RequestState>(std::move(request), lengths, context.rope_profile, 0));
}

}  // namespace

int64_t ContextBlocks::open(std::unique_ptr<Sequence> sequence) {
  open_[next_id_] = std::move(sequence);
  return next_id_++;
}

int64_t ContextBlocks::hold(const Context& context) {
  std::unique_ptr<Sequence> sequence = sequence_of(context);
  const int64_t tokens = sequence->num_tokens();
  const std::vector<int32_t> cached = prefix_cache_.find(*sequence);
  require<CapacityError>(std::ssize(cached) == blocks_for(tokens, block_len_),
                         "save_context: expected all ", tokens, " tokens in the prefix cache, got ",
                         std::ssize(cached) * block_len_, ": other requests took the room");
  std::optional<BlockTable> blocks = BlockTable::reserve(pool_, block_len_, tokens, cached);
  require<CapacityError>(blocks.has_value(), "save_context: expected to hold the ", cached.size(),
                         " blocks of the context, got requests that are promised them");
  sequence->blocks.emplace(std::move(*blocks));
  return open(std::move(sequence));
}

ContextBlocks::Room ContextBlocks::take(const Context& context) {
  std::unique_ptr<Sequence> sequence = sequence_of(context);
  const int64_t tokens = sequence->num_tokens();
  const std::vector<int32_t> known = prefix_cache_.match(*sequence);
  std::optional<BlockTable> blocks = BlockTable::reserve(pool_, block_len_, tokens, known);
  require<CapacityError>(blocks.has_value(), "load_context: expected ",
                         blocks_for(tokens, block_len_) - std::ssize(known),
                         " free blocks of the KV cache, got ", pool_.num_available(),
                         "; try again when running requests have ended");
  sequence->blocks.emplace(std::move(*blocks));
  sequence->blocks->grow_to(tokens);
  sequence->num_published = std::ssize(known);
  return {open(std::move(sequence)), std::ssize(known)};
}

void ContextBlocks::read(int64_t id, int64_t index, int64_t tokens, std::span<std::byte> rows) {
  ranks_.export_kv_block(block(id, index), tokens, rows);
}

void ContextBlocks::write(int64_t id, int64_t index, int64_t tokens, std::vector<std::byte>& rows) {
  ranks_.import_kv_block(block(id, index), tokens, rows);
}

void ContextBlocks::publish(int64_t id) {
  Sequence& sequence = *open_.at(id);
  sequence.num_computed = sequence.num_tokens();
  prefix_cache_.retire(sequence);
}

}  // namespace longspan
