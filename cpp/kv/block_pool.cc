#include "kv/block_pool.h"

#include <algorithm>
#include <stdexcept>

namespace longspan {

BlockPool::BlockPool(int64_t num_blocks) : blocks_(static_cast<size_t>(num_blocks)) {
  free_.reserve(blocks_.size());
  for (int64_t id = num_blocks - 1; id >= 0; --id) free_.push_back(static_cast<int32_t>(id));
}

bool BlockPool::promise(int64_t count, std::span<const int32_t> shared) {
  const auto idle =
      std::count_if(shared.begin(), shared.end(), [this](int32_t id) { return is_idle(at(id)); });
  if (count < 0 || count + idle > num_available()) return false;
  for (const int32_t id : shared) hold(id);
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
  if (free_.empty()) {
    const int32_t oldest = idle_.front();
    idle_.pop_front();
    at(oldest).kept = false;
    --num_kept_;
    free_.push_back(oldest);
    if (evicted_) evicted_(oldest);
  }
  --promised_;
  const int32_t id = free_.back();
  free_.pop_back();
  at(id).holders = 1;
  return id;
}

void BlockPool::hold(int32_t id) {
  Block& block = at(id);
  if (block.holders == 0) {
    if (!block.kept) throw std::logic_error("[block_pool] a free block cannot be shared");
    idle_.erase(block.idle);
  }
  ++block.holders;
}

bool BlockPool::share(int32_t block) {
  if (is_idle(at(block)) && num_available() == 0) return false;
  hold(block);
  return true;
}

void BlockPool::release(std::span<const int32_t> blocks) {
  for (size_t i = blocks.size(); i-- > 0;) {
    const int32_t id = blocks[i];
    if (id < 0 || id >= num_blocks() || at(id).holders == 0) {
      throw std::logic_error("[block_pool] release of a block that is not held");
    }
    Block& block = at(id);
    if (--block.holders > 0) continue;
    if (block.kept) {
      block.idle = idle_.insert(idle_.end(), id);
    } else {
      free_.push_back(id);
    }
  }
}

void BlockPool::keep(int32_t block) {
  if (at(block).holders == 0 || at(block).kept) {
    throw std::logic_error("[block_pool] keep of a block that is not held, or kept already");
  }
  at(block).kept = true;
  ++num_kept_;
}

void BlockPool::check_integrity() const {
  std::vector<int> seen(blocks_.size(), 0);
  int64_t kept = 0;
  for (const int32_t id : free_) {
    if (at(id).kept) throw std::logic_error("[block_pool] block free and kept");
    ++seen.at(static_cast<size_t>(id));
  }
  for (auto it = idle_.begin(); it != idle_.end(); ++it) {
    if (!at(*it).kept || *at(*it).idle != *it)
      throw std::logic_error("[block_pool] idle, not kept");
    ++seen.at(static_cast<size_t>(*it));
  }
  for (size_t id = 0; id < blocks_.size(); ++id) {
    kept += blocks_[id].kept;
    const int expected = blocks_[id].holders > 0 ? 0 : 1;
    if (blocks_[id].holders < 0 || seen[id] != expected) {
      throw std::logic_error("[block_pool] block lost, free twice, or free and held");
    }
  }
  if (kept != num_kept_) throw std::logic_error("[block_pool] kept blocks miscounted");
  if (promised_ < 0 || num_available() < 0) {
    throw std::logic_error("[block_pool] more blocks promised than free or idle");
  }
}

}  // namespace longspan
