#include "engine/prefix_cache.h"

#include <algorithm>
#include <span>

namespace longspan {
namespace {

template <class T>
void append_bytes(std::string& key, std::span<const T> values) {
  key.append(reinterpret_cast<const char*>(values.data()), values.size_bytes());
}

/// Tokens at the beginning of a request that need no computing once their keys are cached.
int64_t num_reusable(const Sequence& sequence) {
  const RequestState& state = *sequence.state;
  if (state.scores_prompt()) return 0;
  if (state.request.kind == RequestKind::kLogits) return state.request.logit_positions.front();
  return state.lengths.prompt - 1;
}

std::span<const int32_t> slice(const std::vector<int32_t>& tokens, int64_t begin, int64_t end) {
  return std::span(tokens).subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin));
}

int32_t block_before(const Sequence& sequence, int64_t block) {
  return block == 0 ? PrefixIndex::kRoot
                    : sequence.blocks->blocks()[static_cast<size_t>(block - 1)];
}

}  // namespace

std::string prefix_key(const RopeProfile& profile) {
  // Every field is named, so that a new one does not compile until it is decided here.
  const auto& [type, inv_freq, attention_factor, base, factor, length, native_length, logn_length] =
      profile;
  std::string key;
  // These two change the scores, on which the keys and values of every layer but the first depend.
  append_bytes(key, std::span(&attention_factor, 1));
  append_bytes(key, std::span(&logn_length, 1));
  append_bytes(key, std::span(inv_freq));
  return key;
}

std::vector<int32_t> PrefixCache::match(const Sequence& sequence) const {
  return index_.find_whole(prefix_key(*sequence.state->profile),
                           slice(sequence.tokens, 0, num_reusable(sequence)));
}

std::vector<int32_t> PrefixCache::find(const Sequence& sequence) const {
  const std::string key = prefix_key(*sequence.state->profile);
  std::vector<int32_t> blocks = index_.find_whole(key, sequence.tokens);
  const int64_t found = std::ssize(blocks) * block_len_;
  const std::span<const int32_t> rest = slice(sequence.tokens, found, sequence.num_tokens());
  if (rest.empty() || std::ssize(rest) >= block_len_) return blocks;
  const int32_t parent = blocks.empty() ? PrefixIndex::kRoot : blocks.back();
  const PrefixIndex::Match match = index_.find(key, parent, rest);
  if (match.tokens == std::ssize(rest)) blocks.push_back(match.block);
  return blocks;
}

bool PrefixCache::between_blocks(const Sequence& sequence) const {
  // Blocks that an abandoned step took are there already.
  return std::ssize(sequence.blocks->blocks()) * block_len_ == sequence.num_computed;
}

PrefixIndex::Match PrefixCache::find_next(const Sequence& sequence) const {
  const int64_t end = num_reusable(sequence);
  if (!between_blocks(sequence) || sequence.num_computed >= end) return {};
  const int64_t block = sequence.num_computed / block_len_;
  return index_.find(prefix_key(*sequence.state->profile), block_before(sequence, block),
                     slice(sequence.tokens, sequence.num_computed, end));
}

void PrefixCache::reuse_whole(Sequence& sequence) {
  while (true) {
    const PrefixIndex::Match next = find_next(sequence);
    if (next.tokens == 0 || next.tokens < block_len_) return;
    sequence.blocks->adopt(next.block);
    ++sequence.num_published;
    sequence.num_computed += block_len_;
  }
}

void PrefixCache::reuse_part(Sequence& sequence) {
  const PrefixIndex::Match next = find_next(sequence);
  // The source must not be evicted for the copy; where nothing else is left, it is not copied.
  if (next.tokens == 0 || !pool_.share(next.block)) return;
  sequence.blocks->grow_to(sequence.num_computed + next.tokens);
  try {
    copy_(next.block, sequence.blocks->blocks().back(), next.tokens);
  } catch (...) {  // another rank failed
    pool_.release({&next.block, 1});
    throw;
  }
  pool_.release({&next.block, 1});
  sequence.num_computed += next.tokens;
}

bool PrefixCache::will_fill_next_block_of(const Sequence& sequence, const Sequence& other,
                                          int64_t num_tokens) const {
  const int64_t begin = sequence.num_computed;
  const int64_t end = begin + block_len_;
  if (!between_blocks(sequence) || end > num_reusable(sequence)) return false;
  if (other.num_computed < begin || other.num_computed + num_tokens < end) return false;
  const int64_t block = begin / block_len_;
  if (block_before(sequence, block) != block_before(other, block)) return false;
  if (block == 0 && prefix_key(*sequence.state->profile) != prefix_key(*other.state->profile)) {
    return false;
  }
  return std::ranges::equal(slice(sequence.tokens, begin, end), slice(other.tokens, begin, end));
}

int32_t PrefixCache::insert(const Sequence& sequence, int64_t block, int64_t tokens) {
  const int64_t begin = block * block_len_;
  return index_.insert(prefix_key(*sequence.state->profile), block_before(sequence, block),
                       slice(sequence.tokens, begin, begin + tokens),
                       sequence.blocks->blocks()[static_cast<size_t>(block)]);
}

void PrefixCache::publish(Sequence& sequence) {
  // What a step under way computes may yet turn out to be no numbers.
  for (; sequence.num_published < sequence.num_settled() / block_len_; ++sequence.num_published) {
    const auto block = static_cast<size_t>(sequence.num_published);
    const int32_t known = insert(sequence, sequence.num_published, block_len_);
    // Who holds a block of the index holds those above it; and one copy is enough.
    if (known != sequence.blocks->blocks()[block]) sequence.blocks->replace(block, known);
  }
}

void PrefixCache::retire(Sequence& sequence) {
  publish(sequence);
  const int64_t rest = sequence.num_computed % block_len_;
  if (rest > 0) insert(sequence, sequence.num_computed / block_len_, rest);
}

}  // namespace longspan
