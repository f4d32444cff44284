#include "engine/request_state.h"

#include <algorithm>
#include <utility>

namespace longspan {
namespace {

double seconds(std::chrono::steady_clock::duration d) {
  return std::chrono::duration<double>(d).count();
}

}  // namespace

RequestState::RequestState(Request request_, const RequestLengths& lengths_, RopeProfile profile_,
                           uint64_t seed_, std::shared_ptr<Signal> signal, double prefill_flops_)
    : request(std::move(request_)),
      lengths(lengths_),
      profile(std::make_shared<const RopeProfile>(std::move(profile_))),
      seed(seed_),
      prefill_flops(prefill_flops_),
      signal_(std::move(signal)) {
  output_.input_token_len = lengths.prompt;
  output_.rope_profile = *profile;
  output_.seed = seed;
}

void RequestState::start() {
  const std::lock_guard lock(mutex_);
  started_ = Clock::now();
  output_.queue_s = seconds(started_ - submitted_);
}

void RequestState::skip_prefill(int64_t tokens, double work) {
  const std::lock_guard lock(mutex_);
  output_.cached_tokens += tokens;
  prefill_done_ += tokens;
  prefill_work_ += work;
  skipped_work_ += work;
}

void RequestState::set_prefill(int64_t tokens, double work) {
  const std::lock_guard lock(mutex_);
  // A pass that was abandoned repeats its layers; progress never goes back.
  prefill_done_ = std::max(prefill_done_, tokens);
  prefill_work_ = std::max(prefill_work_, work);
  if (tokens == lengths.prompt && prefilled_ == Clock::time_point{}) {
    prefilled_ = Clock::now();
    output_.prefill_s = seconds(prefilled_ - started_);
  }
}

void RequestState::moved() {
  moved_.notify_all();
  if (signal_) signal_->notify();
}

void RequestState::add_token(int32_t id, std::span<const TokenLogprob> logprobs) {
  const std::lock_guard lock(mutex_);
  output_.token_ids.push_back(id);
  output_.logprobs.insert(output_.logprobs.end(), logprobs.begin(), logprobs.end());
  moved();
}

void RequestState::add_nll(const std::vector<double>& nll) {
  const std::lock_guard lock(mutex_);
  for (const double value : nll) output_.nll_sum += value;
  output_.nll_count += static_cast<int64_t>(nll.size());
  if (request.token_nll) output_.token_nll.insert(output_.token_nll.end(), nll.begin(), nll.end());
}

void RequestState::add_logits(const float* row, int64_t count) {
  const std::lock_guard lock(mutex_);
  output_.logits.insert(output_.logits.end(), row, row + count);
}

void RequestState::end_locked() {
  ended_ = true;
  end_ = Clock::now();
  if (prefilled_ != Clock::time_point{}) output_.decode_s = seconds(end_ - prefilled_);
}

void RequestState::finish(FinishReason reason, std::optional<int32_t> stop_token_id) {
  const std::lock_guard lock(mutex_);
  if (ended_) return;
  output_.stop_token_id = stop_token_id;
  output_.finish_reason = reason;
  end_locked();
}

void RequestState::fail(std::exception_ptr error) {
  const std::lock_guard lock(mutex_);
  if (ended_) return;
  error_ = std::move(error);
  end_locked();
}

void RequestState::hand_out() {
  const std::lock_guard lock(mutex_);
  handed_out_ = true;
  moved();
}

bool RequestState::failed() {
  const std::lock_guard lock(mutex_);
  return error_ != nullptr;
}

bool RequestState::wait_for(std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  return moved_.wait_for(lock, timeout, [this] { return finished(); });
}

bool RequestState::wait_for_tokens(int64_t count, std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  return moved_.wait_for(lock, timeout,
                         [&] { return finished() || std::ssize(output_.token_ids) > count; });
}

const RequestOutput& RequestState::wait() {
  std::unique_lock lock(mutex_);
  moved_.wait(lock, [this] { return finished(); });
  if (error_) std::rethrow_exception(error_);
  return output_;  // nobody writes it any more
}

std::vector<int32_t> RequestState::tokens_from(int64_t from) {
  const std::lock_guard lock(mutex_);
  const auto size = static_cast<int64_t>(output_.token_ids.size());
  const int64_t begin = std::clamp<int64_t>(from, 0, size);
  return {output_.token_ids.begin() + begin, output_.token_ids.end()};
}

std::vector<TokenLogprob> RequestState::logprobs_from(int64_t from) {
  const std::lock_guard lock(mutex_);
  const auto size = static_cast<int64_t>(output_.logprobs.size());
  const int64_t each = 1 + request.generation.logprobs.value_or(0);
  const int64_t begin = std::clamp<int64_t>(from, 0, size / each) * each;
  return {output_.logprobs.begin() + begin, output_.logprobs.end()};
}

Progress RequestState::progress() {
  const std::lock_guard lock(mutex_);
  const Clock::time_point now = ended_ ? end_ : Clock::now();
  Progress p;
  p.prefill_done = prefill_done_;
  p.prefill_total = lengths.prompt;
  p.generated = static_cast<int64_t>(output_.token_ids.size());
  p.elapsed_s = seconds(now - submitted_);
  const int64_t computed = prefill_done_ - output_.cached_tokens;
  if (started_ == Clock::time_point{} || computed == 0) return p;
  const bool prefilled = prefilled_ != Clock::time_point{};
  const double spent = std::max(seconds((prefilled ? prefilled_ : now) - started_), 1e-9);
  p.tokens_per_s = static_cast<double>(computed) / spent;
  const double work = std::max(prefill_work_ - skipped_work_, 1e-9);
  p.flops_per_s = work * prefill_flops / spent;
  p.eta_s = prefilled ? 0.0 : spent * (1.0 - prefill_work_) / work;
  return p;
}

bool RequestHandle::wait_for(std::chrono::milliseconds timeout) const {
  return state_->wait_for(timeout);
}
const RequestOutput& RequestHandle::wait() const { return state_->wait(); }
std::vector<int32_t> RequestHandle::tokens_from(int64_t from) const {
  return state_->tokens_from(from);
}
bool RequestHandle::wait_for_tokens(int64_t count, std::chrono::milliseconds timeout) const {
  return state_->wait_for_tokens(count, timeout);
}
std::vector<TokenLogprob> RequestHandle::logprobs_from(int64_t from) const {
  return state_->logprobs_from(from);
}
Progress RequestHandle::progress() const { return state_->progress(); }
void RequestHandle::cancel() const { state_->cancel(); }

}  // namespace longspan
