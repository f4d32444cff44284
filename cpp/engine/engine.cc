#include "longspan/engine.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <future>
#include <iterator>
#include <mutex>
#include <optional>
#include <random>
#include <thread>
#include <utility>

#include "backend/registry.h"
#include "checkpoint/fingerprint.h"
#include "core/check.h"
#include "core/thread_pool.h"
#include "engine/context_checkpoints.h"
#include "engine/load_ranks.h"
#include "engine/memory_plan.h"
#include "engine/plan_remedies.h"
#include "engine/step_loop.h"
#include "model/shard.h"

namespace longspan {
namespace {

constexpr std::chrono::milliseconds kCallbackInterval{500};

ModelInfo make_info(const ModelConfig& model, const EngineConfig& config, const Backend& backend,
                    const RopeMethod& method) {
  ModelInfo info;
  info.architecture = model.architecture;
  info.vocab_size = model.vocab_size;
  info.num_layers = model.num_layers;
  info.hidden_size = model.hidden_size;
  info.num_heads = model.num_heads;
  info.num_kv_heads = model.num_kv_heads;
  info.head_dim = model.head_dim;
  info.num_parameters = num_parameters(model);
  info.native_length = method.profile(1).native_length;
  info.eos_token_ids = model.eos_token_ids;
  info.dtype = name_of(backend.activation_dtype());
  std::string ranks = config.tp > 1 ? message("tp ", config.tp, ", ") : "";
  if (config.cp > 1) ranks += message("cp ", config.cp, ", ");
  info.backend = message(ranks, ranks.empty() ? "" : "each like ", backend.describe());
  info.rope = describe_rope(model.rope, method);
  return info;
}

MemoryPlan plan_or_throw(const EngineConfig& config, const ModelConfig& model,
                         const std::vector<Rank>& ranks) {
  // The last rank has as many tokens and threads as any.
  MemoryPlan plan = plan_with_remedies(config, model, *ranks.back().backend, bytes_per_rank(ranks));
  if (!plan.fits) throw CapacityError(describe_misfit(plan, config));
  return plan;
}

uint64_t random_seed() {
  std::random_device device;
  return (static_cast<uint64_t>(device()) << 32) | device();
}

}  // namespace

/// Everything that lives between load() and close(), and the thread that steps it.
class Engine::Impl {
 public:
  Impl(ModelConfig model, std::string fingerprint, const EngineConfig& config,
       const MemoryPlan& plan, std::vector<Rank> ranks)
      : model_(std::move(model)),
        fingerprint_(std::move(fingerprint)),
        config_(config),
        plan_(plan),
        rope_(make_rope_method(model_.rope)),
        info_(make_info(model_, config_, *ranks.front().backend, *rope_)),
        loaded_(std::make_unique<Loaded>(*this, std::move(ranks))) {
    metrics_.total_blocks = metrics_.free_blocks = plan_.num_blocks;
    thread_ = std::thread([this] { loop(); });
  }

  ~Impl() { close(); }

  RequestLengths lengths_of(const Request& request) const {
    return resolve_lengths(request, config_, info_.native_length, model_.vocab_size,
                           plan_.kv_capacity);
  }

  /// The engine's thread takes in the inbox as a whole, and so all of them at one time.
  std::vector<RequestHandle> submit(std::vector<Request> requests,
                                    const std::shared_ptr<Signal>& signal) {
    std::vector<std::unique_ptr<Sequence>> sequences;
    std::vector<RequestHandle> handles;
    for (Request& request : requests) {
      const RequestLengths lengths = lengths_of(request);
      const uint64_t seed = request.generation.seed.value_or(random_seed());
      auto state = std::make_shared<RequestState>(std::move(request), lengths,
                                                  rope_->profile(lengths.rope_length), seed, signal,
                                                  StepCost(model_).flops(lengths.prompt, 0));
      sequences.push_back(std::make_unique<Sequence>(state));
      handles.emplace_back(std::move(state));
    }
    {
      const std::lock_guard lock(mutex_);
      if (closing_) throw EngineClosed("submit: expected an open engine, got a closed one");
      std::move(sequences.begin(), sequences.end(), std::back_inserter(inbox_));
    }
    wake_.notify_one();
    return handles;
  }

  RequestOutput run(Request request, const ProgressCallback& on_progress) {
    std::vector<Request> requests;
    requests.push_back(std::move(request));
    const RequestHandle handle = submit(std::move(requests), nullptr).front();
    try {
      while (!handle.wait_for(kCallbackInterval)) {
        if (on_progress) on_progress(handle.progress());
      }
    } catch (...) {
      handle.cancel();
      throw;
    }
    return handle.wait();
  }

  Context save_context(std::vector<int32_t> input_ids, const std::string& path,
                       const std::optional<RopeLength>& rope_length, int64_t checkpoint_tokens,
                       const ContextCallback& on_progress) {
    require<InvalidArgument>(checkpoint_tokens >= 0,
                             "checkpoint_tokens: expected an integer >= 0, got ",
                             checkpoint_tokens);
    const ContextIo io = context_io();
    Request request;
    request.input_ids = std::move(input_ids);
    request.generation.max_new_tokens = 0;
    request.rope_length = rope_length;
    Context context = {request.input_ids, rope_->profile(lengths_of(request).rope_length)};
    request.rope_length = RopeLength{RopeLengthPolicy::kFixed, context.rope_profile.length};
    const auto compute = [&](int64_t tokens, const ProgressCallback& on_computed) {
      Request part = request;
      part.input_ids.resize(static_cast<size_t>(tokens));
      run(std::move(part), on_computed);
    };
    save_with_checkpoints(io, context, path, checkpoint_tokens, *rope_, model_.vocab_size, compute,
                          on_progress);
    return context;
  }

  Context load_context(const std::string& path, const ContextCallback& on_progress) {
    const auto check = [this](const Context& context, const ContextFile&) {
      const int64_t tokens = std::ssize(context.token_ids);
      if (tokens > config_.session_len) {
        throw ContextTooLong(tokens, config_.session_len, plan_.kv_capacity);
      }
    };
    return longspan::load_context(context_io(), path, *rope_, model_.vocab_size, check,
                                  on_progress);
  }

  RopeProfile rope_profile(int64_t prompt, int64_t max_new_tokens) const {
    require<InvalidArgument>(prompt >= 1, "prompt_tokens: expected an integer >= 1, got ", prompt);
    require<InvalidArgument>(max_new_tokens >= 0, "max_new_tokens: expected an integer >= 0, got ",
                             max_new_tokens);
    const int64_t total = std::min(prompt + max_new_tokens, config_.session_len);
    return rope_->profile(rope_length_of(config_.rope_length, prompt, total, config_.session_len,
                                         info_.native_length));
  }

  EngineMetrics metrics() const {
    const std::lock_guard lock(mutex_);
    EngineMetrics metrics = metrics_;
    metrics.waiting += static_cast<int64_t>(inbox_.size());
    return metrics;
  }

  void close() {
    {
      const std::lock_guard lock(mutex_);
      closing_ = true;
    }
    wake_.notify_one();
    const std::lock_guard lock(close_mutex_);  // a second caller waits for the first
    if (thread_.joinable()) thread_.join();
    loaded_.reset();
  }

  const ModelInfo& info() const { return info_; }
  const EngineConfig& config() const { return config_; }
  const MemoryPlan& plan() const { return plan_; }

 private:
  /// The memory and what works on it; gone after close().
  struct Loaded {
    Loaded(Impl& impl, std::vector<Rank> ranks_)
        : ranks(std::move(ranks_)),
          traits(ranks.backend().traits()),
          pool(impl.plan_.num_blocks),
          scheduler(pool, make_prefix_cache(impl.config_), tokens_per_block(impl.config_),
                    impl.config_.max_batch_size, impl.config_.max_prefill_token_num),
          cost(impl.model_, traits.flops_per_second * (traits.shares_memory ? 1 : impl.config_.tp),
               traits.step_seconds,
               least_prefill_tokens(impl.config_, impl.model_, ranks.backend())),
          // Where there are several, only rank 0 has the tokens on its device.
          runner(impl.model_, ranks, decoder_limits(impl.config_, traits).max_logit_rows,
                 traits.runs_behind && ranks.size() == 1, [&impl] { return impl.closing_.load(); }),
          steps(scheduler, cost, runner, impl.config_.enable_prefix_caching,
                [&impl] { impl.publish(); }) {
      if (prefix_cache) {
        contexts.emplace(pool, *prefix_cache, ranks, tokens_per_block(impl.config_));
      }
    }

    PrefixCache* make_prefix_cache(const EngineConfig& config) {
      if (!config.enable_prefix_caching) return nullptr;
      return &prefix_cache.emplace(pool, tokens_per_block(config),
                                   [this](int32_t from, int32_t to, int64_t tokens) {
                                     ranks.copy_kv_block(from, to, tokens);
                                   });
    }

    RankGroup ranks;
    const DeviceTraits traits;
    BlockPool pool;
    std::optional<PrefixCache> prefix_cache;
    Scheduler scheduler;
    std::optional<ContextBlocks> contexts;  ///< with a prefix cache
    StepCost cost;
    StepRunner runner;
    StepLoop steps;
  };

  ContextIo context_io() {
    require<InvalidArgument>(config_.enable_prefix_caching,
                             "enable_prefix_caching: expected true, for contexts to be saved from "
                             "the prefix cache and loaded into it, got false");
    ContextBlocks* blocks = nullptr;
    std::optional<KvRows> rows;
    on_engine([&] {
      blocks = &*loaded_->contexts;
      rows = loaded_->ranks.kv_rows(1);
    });
    return {[this](const std::function<void()>& work) { on_engine(work); }, *blocks, fingerprint_,
            *rows, tokens_per_block(config_)};
  }

  /// See OnEngine.
  void on_engine(const std::function<void()>& work) {
    std::packaged_task<void()> task([&] {
      work();
      publish();
    });
    std::future<void> done = task.get_future();
    {
      const std::lock_guard lock(mutex_);
      require<EngineClosed>(!closing_, "context: expected an open engine, got a closed one");
      tasks_.push_back(std::move(task));
    }
    wake_.notify_one();
    try {
      done.get();
    } catch (const std::future_error&) {  // the task was dropped
      throw EngineClosed("context: expected an open engine, got close() before the end");
    }
  }

  void loop() {
    while (take_inbox()) {
      loaded_->steps.turn();
    }
    loaded_->steps.fail_all(std::make_exception_ptr(
        EngineClosed("request: expected an open engine, got close() before the end")));
    const std::lock_guard lock(mutex_);
    tasks_.clear();
  }

  /// Moves new requests to the scheduler and does what was asked of this thread, sleeping while
  /// there is nothing to do. False at the end.
  bool take_inbox() {
    std::unique_lock lock(mutex_);
    wake_.wait(lock, [this] {
      return closing_ || !inbox_.empty() || !tasks_.empty() || !loaded_->scheduler.empty();
    });
    for (auto& sequence : inbox_) loaded_->scheduler.add(std::move(sequence));
    inbox_.clear();
    // Until they are published as running or gone: no request is ever missing from both counts.
    metrics_.waiting = loaded_->scheduler.num_waiting();
    if (closing_) return false;
    std::vector<std::packaged_task<void()>> tasks = std::exchange(tasks_, {});
    lock.unlock();
    for (std::packaged_task<void()>& task : tasks) task();
    return true;
  }

  void publish() {
    const StepCounts& counts = loaded_->steps.counts();
    const std::lock_guard lock(mutex_);
    metrics_.steps = counts.steps;
    metrics_.prefilled_tokens = counts.prefilled_tokens;
    metrics_.generated_tokens = counts.generated_tokens;
    metrics_.prefix_miss_tokens = counts.prefix_miss_tokens;
    metrics_.waiting = loaded_->scheduler.num_waiting();
    metrics_.running = loaded_->scheduler.num_running();
    metrics_.free_blocks = loaded_->pool.num_available();
    metrics_.cached_blocks = loaded_->pool.num_kept();
    metrics_.prefix_hit_tokens = loaded_->scheduler.num_hit_tokens();
    if (loaded_->prefix_cache) metrics_.prefix_evictions = loaded_->prefix_cache->num_evicted();
  }

  const ModelConfig model_;
  const std::string fingerprint_;  // empty without a prefix cache
  const EngineConfig config_;
  const MemoryPlan plan_;
  const std::unique_ptr<RopeMethod> rope_;
  const ModelInfo info_;
  std::atomic<bool> closing_ = false;  // written under mutex_, so that no wake-up is lost
  std::unique_ptr<Loaded> loaded_;

  mutable std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::unique_ptr<Sequence>> inbox_;   // guarded by mutex_
  std::vector<std::packaged_task<void()>> tasks_;  // guarded by mutex_
  EngineMetrics metrics_;                          // guarded by mutex_

  std::mutex close_mutex_;
  std::thread thread_;
};

namespace {

/// What an engine is made of.
struct Parts {
  ModelConfig model;
  std::string fingerprint;  // of the model, for what enable_prefix_caching has to do with files
  EngineConfig config;      // resolved
  MemoryPlan plan;
  std::vector<Rank> ranks;  // of this process
};

/// The other processes that a launcher started to be ranks of this engine, if there are.
Launch launch_of(const EngineConfig& config) {
  Launch launch = config.tp == 1 ? Launch{} : read_launch();
  require<InvalidArgument>(launch.size == 1 || launch.size == config.tp, "tp: expected ",
                           launch.size, ", the processes that the launcher started, got ",
                           config.tp);
  return launch;
}

Parts load_parts(const std::string& model_dir, const EngineConfig& config,
                 const LoadProgress& progress) {
  Parts parts;
  parts.model =
      read_model_config(model_dir, config.hf_overrides, config.rope_scaling_factor, config_dialect);
  EngineConfig& c = parts.config = resolve_engine_config(config, parts.model);
  const Launch launch = launch_of(c);
  if (c.num_threads == 0) {
    const Share share = share_of(available_cpus(), launch.local_rank, launch.local_size);
    c.num_threads = std::max(1, static_cast<int>(share.size()));
  }
  parts.ranks = launch.size == 1
                    ? connect_ranks(make_backends(c.device, c.dtype, c.num_threads, c.tp))
                    : connect_launched(launch, c);
  take_device_defaults(c, parts.model, *parts.ranks.front().backend);
  parts.plan = plan_or_throw(c, parts.model, parts.ranks);
  const std::unique_ptr<Checkpoint> checkpoint = Checkpoint::open(model_dir);
  load_ranks(parts.model, c, parts.plan, *checkpoint, progress, parts.ranks);
  if (c.enable_prefix_caching) parts.fingerprint = fingerprint(parts.model, *checkpoint);
  return parts;
}

}  // namespace

std::unique_ptr<Engine> Engine::load(const std::string& model_dir, const EngineConfig& config,
                                     const LoadProgress& progress) {
  const int rank = launch_of(config).rank;
  require<InvalidArgument>(rank == 0,
                           "engine: expected rank 0, which takes the requests, got rank ", rank,
                           ", which is to follow it");
  Parts p = load_parts(model_dir, config, progress);
  return std::unique_ptr<Engine>(new Engine(std::make_unique<Impl>(
      std::move(p.model), std::move(p.fingerprint), p.config, p.plan, std::move(p.ranks))));
}

bool Engine::follow(const std::string& model_dir, const EngineConfig& config,
                    const LoadProgress& progress) {
  if (launch_of(config).rank == 0) return false;
  Parts parts = load_parts(model_dir, config, progress);
  longspan::follow(parts.ranks.front());
  return true;
}

Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Engine::~Engine() = default;

RequestHandle Engine::submit(Request request, const std::shared_ptr<Signal>& signal) {
  std::vector<Request> requests;
  requests.push_back(std::move(request));
  return submit_all(std::move(requests), signal).front();
}
std::vector<RequestHandle> Engine::submit_all(std::vector<Request> requests,
                                              const std::shared_ptr<Signal>& signal) {
  return impl_->submit(std::move(requests), signal);
}
void Engine::check(const Request& request) const { impl_->lengths_of(request); }

RequestOutput Engine::run(Request request, const ProgressCallback& on_progress) {
  return impl_->run(std::move(request), on_progress);
}

Context Engine::save_context(std::vector<int32_t> input_ids, const std::string& path,
                             const std::optional<RopeLength>& rope_length,
                             int64_t checkpoint_tokens, const ContextCallback& on_progress) {
  return impl_->save_context(std::move(input_ids), path, rope_length, checkpoint_tokens,
                             on_progress);
}
Context Engine::load_context(const std::string& path, const ContextCallback& on_progress) {
  return impl_->load_context(path, on_progress);
}

RopeProfile Engine::rope_profile(int64_t prompt_tokens, int64_t max_new_tokens) const {
  return impl_->rope_profile(prompt_tokens, max_new_tokens);
}
EngineMetrics Engine::metrics() const { return impl_->metrics(); }
const ModelInfo& Engine::model() const { return impl_->info(); }
const EngineConfig& Engine::config() const { return impl_->config(); }
const MemoryPlan& Engine::plan() const { return impl_->plan(); }
void Engine::close() { impl_->close(); }

}  // namespace longspan
