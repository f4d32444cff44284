#include "model/weights.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <functional>
#include <mutex>
#include <set>
#include <thread>

#include "core/check.h"

namespace longspan {
namespace {

int64_t bytes_of(const WeightView& view) { return view.rows * view.cols * size_of(view.dtype); }

/// A share of the loading: the tensors it reads, and what it makes of them.
struct Task {
  std::vector<WeightView> tensors;
  std::function<void()> pack;
};

/// Whether b's elements follow a's in the file, so that both are one slice of their tensor.
bool adjoins(const WeightView& a, const WeightView& b) {
  if (a.name != b.name || a.cols != a.stride) return false;
  return b.data == a.row(a.rows) && (b.cols == a.cols || a.rows == 1);
}

/// Slices of one tensor that adjoin become one, so that a packed tensor is checked and released as
/// the whole it is in the file.
std::vector<WeightView> merged(std::vector<WeightView> views) {
  std::ranges::sort(views, std::less<const void*>(), &WeightView::data);
  std::vector<WeightView> out;
  for (const WeightView& view : views) {
    WeightView* last = out.empty() ? nullptr : &out.back();
    if (last == nullptr || !adjoins(*last, view)) {
      out.push_back(view);
    } else if (last->rows == 1 && view.rows == 1) {  // of a vector
      last->cols += view.cols;
      last->stride += view.cols;
    } else {
      last->rows += view.rows;
    }
  }
  return out;
}

/// The slices of tensors behind linears.
std::vector<WeightView> tensors_of(std::initializer_list<const LinearTensors*> linears) {
  std::vector<WeightView> all;
  for (const LinearTensors* linear : linears) {
    all.insert(all.end(), linear->parts.begin(), linear->parts.end());
    all.insert(all.end(), linear->bias.begin(), linear->bias.end());
  }
  return merged(std::move(all));
}

/// The names of a model's tensors.
std::set<std::string> names_of(const OuterTensors& outer, const std::vector<LayerTensors>& layers) {
  std::set<std::string> names = {outer.embedding.name, outer.final_norm.name, outer.head.name};
  for (const LayerTensors& t : layers) {
    names.insert({t.input_norm.name, t.q_norm.name, t.k_norm.name, t.post_attention_norm.name});
    for (const WeightView& tensor : tensors_of({&t.q, &t.k, &t.v, &t.o, &t.gate, &t.up, &t.down})) {
      names.insert(tensor.name);
    }
  }
  return names;
}

/// Refuses a checkpoint with tensors that nobody asked for: it is not what config.json says it is.
void require_all_used(const ModelConfig& config, const Checkpoint& checkpoint,
                      const Architecture& architecture, const std::set<std::string>& used) {
  std::string unused;
  int64_t count = 0;
  for (const std::string& name : checkpoint.names()) {
    if (used.contains(name) || architecture.ignores(config, name)) continue;
    if (++count <= 5) unused += (count == 1 ? "" : ", ") + name;
  }
  require<CheckpointError>(count == 0, "checkpoint: expected only tensors that ",
                           architecture.name(), " uses, got ", count, " more: ", unused,
                           count > 5 ? ", ..." : "");
}

class Loader {
 public:
  Loader(const Checkpoint& checkpoint, std::vector<Task> tasks, const WeightProgress& progress)
      : checkpoint_(checkpoint), tasks_(std::move(tasks)), progress_(progress) {
    for (const Task& task : tasks_) {
      for (const WeightView& tensor : task.tensors) total_ += bytes_of(tensor);
    }
  }

  /// Runs every task; rethrows the first failure after all threads have stopped.
  void run(int num_threads) {
    std::vector<std::thread> threads;
    for (int i = 1; i < num_threads; ++i) threads.emplace_back([this] { work(); });
    work();
    for (std::thread& thread : threads) thread.join();
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  void work() {
    for (;;) {
      const size_t index = next_.fetch_add(1);
      if (index >= tasks_.size()) return;
      try {
        finish(tasks_[index]);
      } catch (...) {
        const std::lock_guard lock(mutex_);
        if (!failure_) failure_ = std::current_exception();
        next_ = tasks_.size();
        return;
      }
    }
  }

  void finish(const Task& task) {
    int64_t bytes = 0;
    for (const WeightView& tensor : task.tensors) {
      check_finite(tensor);
      bytes += bytes_of(tensor);
    }
    task.pack();
    for (const WeightView& tensor : task.tensors) checkpoint_.release(tensor);
    const std::lock_guard lock(mutex_);
    done_ += bytes;
    if (progress_) progress_(done_, total_);
  }

  const Checkpoint& checkpoint_;
  const std::vector<Task> tasks_;
  const WeightProgress& progress_;
  int64_t total_ = 0;
  std::atomic<size_t> next_ = 0;
  std::mutex mutex_;
  int64_t done_ = 0;            // guarded by mutex_
  std::exception_ptr failure_;  // guarded by mutex_
};

}  // namespace

DecoderWeights load_weights(const ModelConfig& config, const Checkpoint& checkpoint,
                            Backend& backend, const Shard& shard, LinearDType dtype,
                            int num_threads, const WeightProgress& progress) {
  const Architecture& architecture = find_architecture(config.architecture);
  DecoderWeights weights;
  weights.layers.resize(static_cast<size_t>(config.num_layers));
  OuterTensors outer = architecture.outer(config, checkpoint);
  std::vector<LayerTensors> layers;
  layers.reserve(weights.layers.size());
  for (int64_t i = 0; i < config.num_layers; ++i) {
    layers.push_back(architecture.layer(config, checkpoint, i));
  }
  require_all_used(config, checkpoint, architecture, names_of(outer, layers));
  outer = slice(outer, shard);
  for (LayerTensors& layer : layers) layer = slice(layer, config, shard);

  std::vector<Task> tasks;
  const auto add_vector = [&](const WeightView& tensor, Buffer& out) {
    tasks.push_back({{tensor}, [&] { out = backend.pack_vector(tensor); }});
  };
  const auto add_table = [&](const WeightView& tensor, std::unique_ptr<PackedLinear>& out) {
    tasks.push_back(
        {{tensor}, [&] { out = backend.pack_linear({&tensor, 1}, {}, LinearDType::kNative); }});
  };
  const auto add_column = [&](std::optional<ColumnParallelLinear>& out,
                              std::initializer_list<const LinearTensors*> fused) {
    tasks.push_back({tensors_of(fused),
                     [&, parts = std::vector(fused)] { out.emplace(backend, parts, dtype); }});
  };
  const auto add_row = [&](std::optional<RowParallelLinear>& out, const LinearTensors& tensors) {
    tasks.push_back({tensors_of({&tensors}), [&] { out.emplace(backend, tensors, dtype); }});
  };
  add_table(outer.embedding, weights.embedding);
  if (outer.head.data != nullptr) add_table(outer.head, weights.own_head);
  for (size_t i = 0; i < layers.size(); ++i) {
    const LayerTensors& from = layers[i];
    LayerWeights& to = weights.layers[i];
    add_vector(from.input_norm, to.input_norm);
    add_column(to.qkv, {&from.q, &from.k, &from.v});
    if (config.qk_norm) {
      add_vector(from.q_norm, to.q_norm);
      add_vector(from.k_norm, to.k_norm);
    }
    add_row(to.o, from.o);
    add_vector(from.post_attention_norm, to.post_attention_norm);
    add_column(to.gate_up, {&from.gate, &from.up});
    add_row(to.down, from.down);
  }
  add_vector(outer.final_norm, weights.final_norm);

  Loader(checkpoint, std::move(tasks), progress).run(num_threads);
  return weights;
}

int64_t weight_bytes(const ModelConfig& c, const BackendSizes& backend, const Shard& shard,
                     LinearDType dtype) {
  const int64_t heads = shard.q_heads.size();
  const int64_t kv_heads = shard.kv_heads.size();
  const int64_t inner = shard.inner.size();
  const int64_t norm = c.hidden_size * 4;
  const auto linear = [&](int64_t out_features, int64_t in_features) {
    return backend.packed_linear_bytes(out_features, in_features, dtype);
  };
  const int64_t layer = linear((heads + 2 * kv_heads) * c.head_dim, c.hidden_size) +
                        linear(c.hidden_size, heads * c.head_dim) +
                        linear(2 * inner, c.hidden_size) + linear(c.hidden_size, inner) + 2 * norm +
                        (c.qk_norm ? 2 * c.head_dim * 4 : 0);
  const int64_t table =
      backend.packed_linear_bytes(shard.tokens.size(), c.hidden_size, LinearDType::kNative);
  return c.num_layers * layer + (c.tie_word_embeddings ? 1 : 2) * table + norm;
}

int64_t num_parameters(const ModelConfig& c) {
  const int64_t q = c.num_heads * c.head_dim;
  const int64_t kv = c.num_kv_heads * c.head_dim;
  int64_t layer = c.hidden_size * (2 * q + 2 * kv + 3 * c.intermediate_size + 2);
  if (c.qkv_bias) layer += q + 2 * kv;
  if (c.o_bias) layer += c.hidden_size;
  if (c.mlp_bias) layer += 2 * c.intermediate_size + c.hidden_size;
  if (c.qk_norm) layer += 2 * c.head_dim;
  const int64_t tables = (c.tie_word_embeddings ? 1 : 2) * c.vocab_size * c.hidden_size;
  return c.num_layers * layer + tables + c.hidden_size;
}

}  // namespace longspan
