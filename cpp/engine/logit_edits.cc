#include "engine/logit_edits.h"

#include <algorithm>
#include <limits>

namespace longspan {

bool LogitEdits::needed(const GenerationConfig& c) {
  return c.repetition_penalty != 1.0 || c.frequency_penalty != 0.0 || c.presence_penalty != 0.0 ||
         c.min_new_tokens > 0 || !c.bad_sequences.empty();
}

LogitEdits::LogitEdits(const GenerationConfig& config, std::span<const int32_t> input_ids,
                       std::span<const int32_t> eos_token_ids)
    : config_(config),
      prompt_(std::ssize(input_ids)),
      seen_(prompt_),
      ends_(config.stop_token_ids) {
  if (!config.ignore_eos) ends_.insert(ends_.end(), eos_token_ids.begin(), eos_token_ids.end());
  if (config.repetition_penalty == 1.0) return;
  for (const int32_t token : input_ids) {
    edits_[index_of(token)].penalty = static_cast<float>(config.repetition_penalty);
  }
}

size_t LogitEdits::index_of(int32_t token) {
  const auto [place, is_new] = index_.try_emplace(token, edits_.size());
  if (is_new) {
    edits_.push_back({.token = token});
    generated_.push_back(0);
  }
  return place->second;
}

void LogitEdits::count(int32_t token) {
  const size_t index = index_of(token);
  ++generated_[index];
  edits_[index].penalty = static_cast<float>(config_.repetition_penalty);
  refresh(index);
}

/// OpenAI's definition: a logit loses count * frequency_penalty, and presence_penalty if count > 0.
void LogitEdits::refresh(size_t index) {
  const auto times = static_cast<double>(generated_[index]);
  const double loss = times * config_.frequency_penalty + (times > 0) * config_.presence_penalty;
  edits_[index].add = static_cast<float>(-loss);
}

void LogitEdits::ban(int32_t token) {
  const size_t index = index_of(token);
  edits_[index].add = -std::numeric_limits<float>::infinity();
  banned_.push_back(index);
}

std::span<LogitEdit> LogitEdits::next(std::span<const int32_t> tokens) {
  for (const size_t index : banned_) refresh(index);
  banned_.clear();
  for (; seen_ < std::ssize(tokens); ++seen_) count(tokens[static_cast<size_t>(seen_)]);
  for (const std::vector<int32_t>& bad : config_.bad_sequences) {
    const size_t before = bad.size() - 1;
    if (before <= tokens.size() && std::equal(bad.begin(), bad.end() - 1, tokens.end() - before)) {
      ban(bad.back());
    }
  }
  if (std::ssize(tokens) - prompt_ < config_.min_new_tokens) {
    for (const int32_t token : ends_) ban(token);
  }
  return edits_;
}

}  // namespace longspan
