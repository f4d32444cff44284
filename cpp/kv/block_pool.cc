#include "kv/block_pool.h"

#include <stdexcept>

namespace longspan {

BlockPool::BlockPool(int64_t num_blocks) : held_(static_cast<size_t>(num_blocks), false) {
  free_.reserve(held_.size());
  for (int64_t id = num_blocks - 1; id >= 0; --id) free_.push_back(static_cast<int32_t>(id));
}

bool BlockPool::promise(int64_t count) {
  if (count < 0 || count > num_available()) return false;
  promised_ += count;
  return true;
}

void BlockPool::withdraw(int64_t count) {
  if (count < 0 || count > promised_)
    throw std::logic_error("[block_pool] withdraw exceeds promise");
  promised_ -= count;
}

int32_t BlockPool::take() {
  if (promised_ == 0) throw std::logic_error("[block_pool] take without a promise");
  --promised_;
  const int32_t id = free_.back();
  free_.pop_back();
  held_[static_cast<size_t>(id)] = true;
  return id;
}

void BlockPool::release(std::span<const int32_t> blocks) {
  for (const int32_t id : blocks) {
    if (id < 0 || id >= num_blocks() || !held_[static_cast<size_t>(id)]) {
      throw std::logic_error("[block_pool] release of a block that is not held");
    }
    held_[static_cast<size_t>(id)] = false;
    free_.push_back(id);
  }
}

void BlockPool::check_integrity() const {
  std::vector<bool> seen(held_.size(), false);
  for (const int32_t id : free_) {
    if (seen.at(static_cast<size_t>(id))) throw std::logic_error("[block_pool] block free twice");
    seen[static_cast<size_t>(id)] = true;
  }
  for (size_t id = 0; id < held_.size(); ++id) {
    if (seen[id] == held_[id]) throw std::logic_error("[block_pool] block lost or free and held");
  }
  if (promised_ < 0 || promised_ > static_cast<int64_t>(free_.size())) {
    throw std::logic_error("[block_pool] more blocks promised than free");
  }
}

}  // namespace longspan
