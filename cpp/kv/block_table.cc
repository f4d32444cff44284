#include "kv/block_table.h"

#include <utility>

namespace longspan {

std::optional<BlockTable> BlockTable::reserve(BlockPool& pool, int64_t block_len,
                                              int64_t max_tokens, std::span<const int32_t> shared) {
  const int64_t blocks = blocks_for(max_tokens, block_len) - std::ssize(shared);
  if (!pool.promise(blocks, shared)) return std::nullopt;
  return BlockTable(pool, block_len, blocks, shared);
}

BlockTable::BlockTable(BlockPool& pool, int64_t block_len, int64_t promised,
                       std::span<const int32_t> shared)
    : pool_(&pool),
      block_len_(block_len),
      promised_(promised),
      blocks_(shared.begin(), shared.end()) {}

BlockTable::BlockTable(BlockTable&& other) noexcept
    : pool_(std::exchange(other.pool_, nullptr)),
      block_len_(other.block_len_),
      promised_(other.promised_),
      blocks_(std::move(other.blocks_)) {}

BlockTable::~BlockTable() {
  if (pool_ == nullptr) return;
  pool_->withdraw(promised_);
  pool_->release(blocks_);
}

void BlockTable::grow_to(int64_t tokens) {
  const auto wanted = static_cast<size_t>(blocks_for(tokens, block_len_));
  while (blocks_.size() < wanted) {
    blocks_.push_back(pool_->take());
    --promised_;
  }
}

void BlockTable::adopt(int32_t block) {
  pool_->withdraw(1);
  --promised_;
  pool_->share(block);
  blocks_.push_back(block);
}

void BlockTable::replace(size_t index, int32_t block) {
  pool_->release({&blocks_[index], 1});
  pool_->share(block);
  blocks_[index] = block;
}

}  // namespace longspan
