#include "engine/prefix_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "engine/scheduler.h"
#include "longspan/error.h"

namespace longspan {
namespace {

using Tokens = std::vector<int32_t>;

constexpr int64_t kBlockLen = 4;

ModelConfig tiny() {
  ModelConfig c;
  c.num_layers = c.hidden_size = c.intermediate_size = 1;
  c.num_heads = c.num_kv_heads = c.head_dim = 1;
  return c;
}

RopeProfile profile_of(double frequency, int64_t length = 0) {
  RopeProfile profile;
  profile.inv_freq = {1.0, frequency};
  profile.length = length;
  return profile;
}

std::shared_ptr<RequestState> request_of(Tokens prompt, int64_t max_new_tokens,
                                         RopeProfile profile = profile_of(0.5)) {
  Request request;
  request.input_ids = std::move(prompt);
  RequestLengths lengths;
  lengths.prompt = std::ssize(request.input_ids);
  lengths.max_new_tokens = max_new_tokens;
  return std::make_shared<RequestState>(std::move(request), lengths, std::move(profile), 0);
}

/// A scheduler over a cache that holds, for every token, the number of the path of tokens that ends
/// with it: all that keys and values depend on. It checks in every step that each sequence finds in
/// its blocks what it would have computed itself.
class Simulation {
 public:
  Simulation(int64_t num_blocks, int64_t max_batch_size, int64_t max_prefill_tokens)
      : pool(num_blocks),
        cache(pool, kBlockLen,
              [this](int32_t from, int32_t to, int64_t tokens) { copy(from, to, tokens); }),
        scheduler(pool, &cache, kBlockLen, max_batch_size, max_prefill_tokens),
        contents_(static_cast<size_t>(num_blocks), std::vector<int64_t>(kBlockLen, kNothing)) {}

  void add(const std::shared_ptr<RequestState>& state) {
    scheduler.add(std::make_unique<Sequence>(state));
  }

  /// One step as the engine does it, or one that is abandoned half-way; returns its token counts.
  std::vector<int64_t> step(bool abandon = false) {
    scheduler.remove_if([](const Sequence& s) { return s.state->cancelled(); });
    check();
    const std::vector<ScheduledSequence> step = scheduler.schedule(cost_);
    check();
    std::vector<int64_t> counts;
    for (const auto& [sequence, count] : step) {
      counts.push_back(count);
      compute(*sequence, count);
    }
    if (abandon) return counts;
    for (const auto& [sequence, count] : step) advance(*sequence, count);
    scheduler.publish(step);
    check();
    scheduler.remove_if([](const Sequence& s) {
      if (s.state->ended()) s.state->hand_out();
      return s.state->ended();
    });
    check();
    return counts;
  }

  void run_dry() {
    for (int i = 0; !scheduler.empty(); ++i) {
      ASSERT_LT(i, 10000);
      step();
    }
  }

  int64_t copied = 0;
  BlockPool pool;
  PrefixCache cache;
  Scheduler scheduler;

 private:
  static constexpr int64_t kNothing = -1;

  void check() const {
    pool.check_integrity();
    cache.check_integrity();
  }

  /// The number of the path that goes on from another with a token.
  int64_t path_after(int64_t path, int64_t token) {
    return paths_.try_emplace({path, token}, std::ssize(paths_) + 1000000).first->second;
  }

  void copy(int32_t from, int32_t to, int64_t tokens) {
    ASSERT_NE(from, to);
    auto& target = contents_[static_cast<size_t>(to)];
    std::fill(target.begin(), target.end(), kNothing);
    std::copy_n(contents_[static_cast<size_t>(from)].begin(), tokens, target.begin());
    copied += tokens;
  }

  void compute(const Sequence& sequence, int64_t count) {
    // Profiles of equal frequencies start from the same root.
    int64_t path = static_cast<int64_t>(sequence.state->profile->inv_freq.back() * 1000);
    for (int64_t p = 0; p < sequence.num_computed + count; ++p) {
      path = path_after(path, sequence.tokens.at(static_cast<size_t>(p)));
      const int32_t block = sequence.blocks->blocks().at(static_cast<size_t>(p / kBlockLen));
      int64_t& slot = contents_[static_cast<size_t>(block)][static_cast<size_t>(p % kBlockLen)];
      if (p < sequence.num_computed) {
        ASSERT_EQ(slot, path) << "position " << p << " of a sequence of " << sequence.num_tokens();
      } else {
        ASSERT_EQ(pool.num_holders(block), 1);
        slot = path;
      }
    }
  }

  static void advance(Sequence& sequence, int64_t count) {
    RequestState& state = *sequence.state;
    sequence.num_computed += count;
    if (sequence.in_prefill()) return;
    if (sequence.num_tokens() < state.lengths.total()) {
      sequence.tokens.push_back(sequence.tokens.back() % 3);
      state.add_token(sequence.tokens.back(), {});
    }
    if (sequence.num_tokens() == state.lengths.total()) state.finish(FinishReason::kLength);
  }

  const StepCost cost_{tiny(), 5e10};
  std::vector<std::vector<int64_t>> contents_;  // [num_blocks][block_len]
  std::map<std::pair<int64_t, int64_t>, int64_t> paths_;
};

Tokens counted(int64_t count, int32_t from = 0) {
  Tokens tokens;
  for (int64_t i = 0; i < count; ++i) tokens.push_back(from + static_cast<int32_t>(i));
  return tokens;
}

int64_t cached_tokens(const std::shared_ptr<RequestState>& state) {
  return state->wait().cached_tokens;
}

TEST(PrefixCache, ARequestSkipsWhatAnotherHasComputed) {
  Simulation sim(20, 4, 100);
  const auto first = request_of(counted(10), 3);  // caches 12 tokens, the 13th is not fed back
  sim.add(first);
  sim.run_dry();
  EXPECT_EQ(cached_tokens(first), 0);
  EXPECT_EQ(sim.pool.num_available(), 20);
  EXPECT_EQ(sim.pool.num_kept(), 3);

  const auto same = request_of(counted(10), 3);
  sim.add(same);
  EXPECT_EQ(sim.step(), std::vector<int64_t>{1});  // the last token is always computed
  sim.run_dry();
  EXPECT_EQ(cached_tokens(same), 9);
  EXPECT_EQ(sim.copied, 1);
}

TEST(PrefixCache, AConversationGoesOnFromItsLastToken) {
  Simulation sim(20, 4, 100);
  const auto first = request_of(counted(9), 4);
  sim.add(first);
  sim.run_dry();
  Tokens next = counted(9);
  const std::vector<int32_t> answer = first->wait().token_ids;
  next.insert(next.end(), answer.begin(), answer.end());
  next.insert(next.end(), {50, 51});
  const auto second = request_of(next, 2);
  sim.add(second);
  EXPECT_EQ(sim.step(), std::vector<int64_t>{3});  // the answer's last token, and two new ones
  sim.run_dry();
  EXPECT_EQ(cached_tokens(second), 12);
}

TEST(PrefixCache, RequestsSubmittedTogetherComputeTheirPrefixOnce) {
  Simulation sim(40, 4, 100);
  Tokens other = counted(17);
  other[14] = 90;
  const auto a = request_of(counted(17), 2);
  const auto b = request_of(counted(17), 2);
  const auto c = request_of(other, 2);
  for (const auto& state : {a, b, c}) sim.add(state);
  EXPECT_EQ(sim.step(), std::vector<int64_t>{17});
  EXPECT_EQ(sim.step(), (std::vector<int64_t>{1, 1, 3}));
  sim.run_dry();
  EXPECT_EQ(cached_tokens(a), 0);
  EXPECT_EQ(cached_tokens(b), 16);
  EXPECT_EQ(cached_tokens(c), 14);
  EXPECT_EQ(sim.scheduler.num_hit_tokens(), 30);
}

TEST(PrefixCache, WaitsOnlyForABlockThatTheStepFills) {
  Simulation sim(40, 4, 6);
  const auto a = request_of(counted(5), 2);
  const auto b = request_of(counted(5), 2);
  sim.add(a);
  sim.add(b);
  EXPECT_EQ(sim.step(), std::vector<int64_t>{5});
  EXPECT_EQ(sim.step(), (std::vector<int64_t>{1, 1}));
  // Nothing of {7, 8, 9} fills a block, so there is nothing to wait for.
  sim.run_dry();
  sim.add(request_of({7, 8, 9}, 1));
  sim.add(request_of({7, 8, 9}, 1));
  EXPECT_EQ(sim.step(), (std::vector<int64_t>{3, 3}));
}

TEST(PrefixCache, AWaitingRequestGoesAheadWhenTheOtherIsCancelled) {
  Simulation sim(40, 4, 100);
  const auto a = request_of(counted(12), 5);
  const auto b = request_of(counted(12), 1);
  sim.add(a);
  sim.add(b);
  EXPECT_EQ(sim.step(/*abandon=*/true), std::vector<int64_t>{12});
  a->cancel();
  EXPECT_EQ(sim.step(), std::vector<int64_t>{12});
  EXPECT_EQ(cached_tokens(b), 0);
}

TEST(PrefixCache, SharingCountsWhenARequestIsAdmitted) {
  Simulation sim(6, 4, 100);
  sim.add(request_of(counted(16), 4));  // 5 blocks
  EXPECT_EQ(sim.step(), std::vector<int64_t>{16});
  sim.add(request_of(counted(17, 40), 3));  // 5 blocks, none of them shared: waits
  EXPECT_EQ(sim.step(), std::vector<int64_t>{1});
  EXPECT_EQ(sim.scheduler.num_waiting(), 1);
  sim.scheduler.remove_if([](const Sequence& s) { return s.tokens[0] == 40; });
  sim.add(request_of(counted(17), 3));  // 5 blocks, of which 4 are there
  EXPECT_EQ(sim.step().size(), 2U);
  EXPECT_EQ(sim.pool.num_available(), 0);
  sim.run_dry();
  EXPECT_EQ(sim.pool.num_available(), 6);
}

TEST(PrefixCache, ACopyIsNotWorthABlockThatIsPromised) {
  Simulation sim(2, 4, 100);
  sim.add(request_of({1, 2, 3, 4, 5, 6, 7}, 1));
  sim.run_dry();
  EXPECT_EQ(sim.pool.num_kept(), 2);
  // Needs both blocks: the one whose beginning it shares may have to go.
  const auto state = request_of({1, 2, 9, 9, 9, 9}, 2);
  sim.add(state);
  sim.run_dry();
  EXPECT_EQ(cached_tokens(state), 0);
  EXPECT_EQ(sim.copied, 0);
  EXPECT_EQ(sim.cache.num_evicted(), 2);
}

TEST(PrefixCache, ScoresShareOnlyWhatTheyLeaveAndLogitsUpToTheFirstRow) {
  Simulation sim(40, 4, 100);
  const auto of_kind = [](RequestKind kind, std::vector<int64_t> positions) {
    Request request;
    request.kind = kind;
    request.input_ids = counted(16);
    request.logit_positions = std::move(positions);
    RequestLengths lengths;
    lengths.prompt = 16;
    return std::make_shared<RequestState>(std::move(request), lengths, profile_of(0.5), 0);
  };
  const auto score = of_kind(RequestKind::kScore, {});
  const auto again = of_kind(RequestKind::kScore, {});
  sim.add(score);
  sim.run_dry();
  sim.add(again);
  sim.run_dry();
  EXPECT_EQ(cached_tokens(again), 0);
  EXPECT_EQ(sim.pool.num_kept(), 4);  // one copy of the same blocks
  for (const int64_t position : {0, 3, 4, 7, 15}) {
    const auto logits = of_kind(RequestKind::kLogits, {position, 15});
    sim.add(logits);
    sim.run_dry();
    EXPECT_EQ(cached_tokens(logits), position);
  }
}

TEST(PrefixCache, ProfilesShareByTheirValues) {
  Simulation sim(40, 4, 100);
  sim.add(request_of(counted(16), 1, profile_of(0.5, 100)));
  sim.run_dry();
  const auto longer = request_of(counted(16), 1, profile_of(0.5, 200));
  const auto other = request_of(counted(16), 1, profile_of(0.25, 100));
  RopeProfile louder = profile_of(0.5, 100);
  louder.attention_factor = 1.1;
  sim.add(longer);
  sim.add(other);
  sim.run_dry();
  EXPECT_EQ(cached_tokens(longer), 15);
  EXPECT_EQ(cached_tokens(other), 0);
  EXPECT_NE(prefix_key(louder), prefix_key(profile_of(0.5)));
  RopeProfile logn = profile_of(0.5);
  logn.logn_length = 100;
  EXPECT_NE(prefix_key(logn), prefix_key(profile_of(0.5)));
  EXPECT_EQ(prefix_key(profile_of(0.5, 7)), prefix_key(profile_of(0.5)));
}

TEST(PrefixCache, WhatAFailedRequestHasCachedIsNotShared) {
  Simulation sim(40, 4, 8);
  const auto failing = request_of(counted(20), 3);
  sim.add(failing);
  sim.step();
  failing->fail(std::make_exception_ptr(NumericalError("test")));
  sim.step();
  EXPECT_TRUE(sim.scheduler.empty());
  EXPECT_EQ(sim.pool.num_kept(), 2);  // of the step before it failed
}

/// Thousands of requests over few tokens, so that much is shared, in pools so small that much is
/// evicted, with cancellations, failures and abandoned steps. In every step every sequence must
/// find what it would have computed, and the books must balance; all must end.
TEST(PrefixCache, SurvivesThousandsOfRandomRequests) {
  int64_t hits = 0;
  int64_t evicted = 0;
  int64_t copied = 0;
  for (uint32_t seed = 0; seed < 40; ++seed) {
    std::mt19937 random(seed);
    const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
    Simulation sim(12 + below(60), 1 + below(6), 1 + below(40));
    const int64_t longest = std::min<int64_t>(sim.pool.num_blocks() * kBlockLen, 60);
    std::vector<std::shared_ptr<RequestState>> states;
    std::vector<Tokens> known{{0}};
    for (int i = 0; i < 150; ++i) {
      // A beginning of something known, and something new.
      Tokens prompt = known[below(std::ssize(known))];
      prompt.resize(static_cast<size_t>(below(std::ssize(prompt) + 1)));
      const int64_t more = 1 + below(12);
      for (int64_t t = 0; t < more; ++t) prompt.push_back(static_cast<int32_t>(below(3)));
      if (std::ssize(prompt) > longest - 8) prompt.resize(static_cast<size_t>(longest - 8));
      known.push_back(prompt);
      Request request;
      RequestLengths lengths;
      lengths.prompt = std::ssize(prompt);
      switch (below(6)) {
        case 0:
          request.kind = RequestKind::kScore;
          break;
        case 1:
          request.kind = RequestKind::kLogits;
          request.logit_positions = {below(lengths.prompt)};
          break;
        default:
          lengths.max_new_tokens = below(9);
      }
      request.input_ids = std::move(prompt);
      states.push_back(std::make_shared<RequestState>(std::move(request), lengths,
                                                      profile_of(below(4) == 0 ? 0.25 : 0.5), 0));
      sim.add(states.back());
      for (int64_t steps = below(4); steps > 0; --steps) sim.step(below(10) == 0);
      RequestState& victim = *states[below(std::ssize(states))];
      if (below(5) == 0) victim.cancel();
      if (below(20) == 0 && !victim.ended()) {
        victim.fail(std::make_exception_ptr(NumericalError("test")));
      }
      if (HasFatalFailure()) return;
    }
    sim.run_dry();
    if (HasFatalFailure()) return;
    EXPECT_EQ(sim.pool.num_available(), sim.pool.num_blocks());
    hits += sim.scheduler.num_hit_tokens();
    evicted += sim.cache.num_evicted();
    copied += sim.copied;
  }
  EXPECT_GT(hits, 10000);
  EXPECT_GT(evicted, 1000);
  EXPECT_GT(copied, 1000);
}

}  // namespace
}  // namespace longspan
