#include "engine/cost_model.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <utility>

#include "backend/named_devices.h"
#include "core/check.h"
#include "engine/memory_plan.h"
#include "engine/plan_remedies.h"
#include "engine/step_cost.h"
#include "model/row_split.h"

namespace longspan {
namespace {

constexpr double kBf16 = 2;               // bytes
constexpr double kF32 = 4;                // bytes
constexpr int64_t kAttentionRows = 128;   // of a head, that one multiprocessor attends with
constexpr double kBytesPerGbit = 1.25e8;  // a second, in one direction

CostParts& operator+=(CostParts& sum, const CostParts& more) {
  sum.products += more.products;
  sum.attention += more.attention;
  sum.rows += more.rows;
  sum.ranks += more.ranks;
  return sum;
}

double real(int64_t count) { return static_cast<double>(count); }

/// The share of the device that so many blocks of one multiprocessor each keep busy.
double occupancy(int64_t blocks, int num_sms) {
  const int64_t rounds = (blocks + num_sms - 1) / num_sms;
  return real(blocks) / real(rounds * num_sms);
}

}  // namespace

std::string CostParts::limit() const {
  const std::array<std::pair<double, const char*>, 4> parts = {
      {{products, "products"}, {attention, "attention"}, {rows, "rows"}, {ranks, "ranks"}}};
  return std::ranges::max_element(parts)->second;
}

CostModel::CostModel(const ModelConfig& model, const EngineConfig& config,
                     const BackendSizes& backend, const DeviceRates& rates, int num_sms,
                     const Cluster& cluster)
    : model_(model),
      config_(config),
      rates_(rates),
      num_sms_(num_sms),
      cluster_(cluster),
      traits_(backend.traits()),
      shard_(Shard::largest(model, config.tp, config.cp)),
      kv_(kv_shape(config, model, shard_)),
      linears_(linear_dtype(config)),
      kv_bytes_(real(backend.kv_block_bytes(kv_)) / real(kv_.block_len * kv_.num_layers)),
      least_rows_(least_prefill_tokens(config, model, backend)) {}

CostParts CostModel::prefill(int64_t tokens) const {
  // As the engine sizes its steps, and learns from each what the next may hold.
  StepCost steps(model_, traits_.flops_per_second * config_.tp, traits_.step_seconds, least_rows_);
  CostParts sum;
  for (int64_t position = 0; position < tokens;) {
    const int64_t wanted = std::min(config_.max_prefill_token_num, tokens - position);
    const int64_t rows = steps.fitting_tokens(wanted, position);
    const CostParts step = chunk(rows, position);
    steps.measured(steps.flops(rows, position), step.total());
    sum += step;
    position += rows;
  }
  return sum;
}

CostParts CostModel::chunk(int64_t rows, int64_t position) const {
  const int64_t hidden = model_.hidden_size;
  const int64_t q = shard_.q_heads.size() * model_.head_dim;
  const int64_t inner = shard_.inner.size();
  // Two norms read and write the residual in float32, read what is added and write what is normed;
  // rotation reads q, k and v and writes them; SiLU reads gate and up and writes their product.
  const double norms = 2 * real(hidden) * (2 * kF32 + 2 * kBf16);
  const double rotation = real(qkv_features()) * 2 * kBf16;
  const double silu = real(inner) * 3 * kBf16;
  const int64_t parts = RowSplit::splits(rows, config_.tp) ? config_.tp : 1;
  const double row_bytes = real(rows) * (norms / real(parts) + rotation + silu);
  CostParts layer;
  layer.products = product_seconds(rows, qkv_features(), hidden) +
                   product_seconds(rows, hidden, q) + product_seconds(rows, 2 * inner, hidden) +
                   product_seconds(rows, hidden, inner);
  layer.attention = attention_seconds(rows, position);
  layer.rows = std::max(row_bytes / rates_.copy.value, terms_.layer_seconds.value);
  const double layers = real(model_.num_layers);
  return {layers * layer.products, layers * layer.attention, layers * layer.rows,
          ranks_seconds(rows)};
}

CostParts CostModel::decode(int64_t keys, int64_t sequences) const {
  const int64_t hidden = model_.hidden_size;
  const int64_t q = shard_.q_heads.size() * model_.head_dim;
  const double of_layer = real(hidden) * real(qkv_features() + q + 3 * shard_.inner.size());
  const double head = real(hidden) * real(shard_.tokens.size());
  const double layers = real(model_.num_layers);
  double read = rates_.copy.value * terms_.kv_read_share.value;
  if (kv_.format != KvFormat::kNative) {
    read = std::min(read, terms_.kv_codes[static_cast<size_t>(kv_.format) - 1].value);
  }
  const double kv = layers * kv_bytes_ * real(keys) * real(sequences) / config_.cp;
  const double linears = linears_ == LinearDType::kInt8 ? of_layer / terms_.int8_linear_read.value
                                                        : kBf16 * of_layer / rates_.copy.value;
  return {layers * linears + kBf16 * head / rates_.copy.value, kv / read,
          layers * terms_.layer_seconds.value, ranks_seconds(sequences)};
}

/// y = x W^T: x [rows, in], y [rows, out]. In bfloat16 products of a chunk take the sum of both,
/// from those of one rank to those of 512; in codes so many times less, with their quantising.
double CostModel::product_seconds(int64_t rows, int64_t out, int64_t in) const {
  const double flops = 2 * real(rows) * real(out) * real(in);
  const double bytes = kBf16 * (real(rows) * real(out + in) + real(out) * real(in));
  const double gain = linears_ == LinearDType::kInt8 ? terms_.int8_linear_gain.value : 1;
  return (flops / rates_.product.value + bytes / rates_.copy.value) / gain;
}

/// Of a layer: rows whose first stands at a position, causal half counted.
double CostModel::attention_seconds(int64_t rows, int64_t position) const {
  const int64_t heads = shard_.q_heads.size();
  const double pairs = real(rows) * (real(position) + real(rows) / 2);
  const double flops = 4 * real(heads * model_.head_dim) * pairs / config_.cp;
  const int64_t tiles = heads * ((rows + kAttentionRows - 1) / kAttentionRows);
  // At full load power limits the clock, which rises where multiprocessors idle.
  const double busy = std::min(1.0, occupancy(tiles, num_sms_) * terms_.clock_gain.value);
  double rate = rates_.product.value * terms_.attention_share.value * busy;
  if (config_.prefill_attention == name_of(PrefillAttention::kInt8)) {
    rate *= terms_.int8_gain.value;
  } else if (config_.prefill_attention == name_of(PrefillAttention::kInt8Fp8)) {
    rate *= terms_.int8_fp8_gain.value;
  }
  double seconds = flops / rate;
  if (kv_.format != KvFormat::kNative) {  // keys and values are written out in bfloat16 first
    const double native = 2 * kBf16 * real(kv_.num_kv_heads * kv_.head_dim);
    seconds += (kv_bytes_ + native) * real(position + rows) / config_.cp / rates_.copy.value;
  }
  return seconds;
}

/// What the ranks tell each other in a step: the embedding's rows in float32, then two sums of
/// rows a layer, and with context shards the log-sum-exps of every rank's heads. A sum of rows that
/// are split is a reduce-scatter and, once they are normed, an all-gather.
double CostModel::ranks_seconds(int64_t rows) const {
  if (config_.tp == 1) return 0;
  const double values = real(rows) * real(model_.hidden_size);
  const double gather = collective_seconds(kBf16 * values, 1);
  const bool split = RowSplit::splits(rows, config_.tp);
  double layer = 2 * (split ? 2 * gather : all_reduce_seconds(kBf16 * values));
  if (config_.cp > 1) {
    layer += collective_seconds(kF32 * real(rows * shard_.q_heads.size()) * config_.tp, 1);
  }
  const double embedding =
      split ? collective_seconds(kF32 * values, 1) + gather : all_reduce_seconds(kF32 * values);
  return embedding + real(model_.num_layers) * layer;
}

double CostModel::all_reduce_seconds(double bytes) const { return collective_seconds(bytes, 2); }

/// NCCL's: within a host at its bus bandwidth; between hosts each GPU passes on its share of the
/// bytes, at the same time. A sum goes round twice, a gather once.
double CostModel::collective_seconds(double bytes, int rounds) const {
  const int ranks = config_.tp;
  if (ranks == 1) return 0;
  const int local = std::min(ranks, cluster_.gpus_per_host);
  const int hosts = (ranks + local - 1) / local;
  const auto moved = [rounds](double total, int size) {
    return static_cast<double>(rounds) * (size - 1) / size * total;
  };
  const double bus =
      (local == 2 ? terms_.bus_pair.value : terms_.bus.value) * terms_.message_share.value;
  const double inside = moved(bytes, local) / bus;
  const double between = moved(bytes / local, hosts) / (cluster_.link_gbps * kBytesPerGbit);
  const int stages = rounds * std::bit_width(static_cast<unsigned>(hosts - 1));  // of a tree
  return terms_.reduce_seconds.value + stages * terms_.hop_seconds.value +
         std::max(inside, between);
}

int64_t CostModel::qkv_features() const {
  return (shard_.q_heads.size() + 2 * shard_.kv_heads.size()) * model_.head_dim;
}

CostPrediction predict_cost(const std::string& model_dir, const EngineConfig& config,
                            const Cluster& cluster, int64_t sequences) {
  require<InvalidArgument>(cluster.gpus_per_host >= 1,
                           "gpus_per_host: expected an integer >= 1, got ", cluster.gpus_per_host);
  require<InvalidArgument>(std::isfinite(cluster.link_gbps) && cluster.link_gbps > 0,
                           "link_gbps: expected a number > 0, got ", cluster.link_gbps);
  require<InvalidArgument>(sequences >= 1, "sequences: expected an integer >= 1, got ", sequences);
  const DeviceRates* rates = find_rates(config.device);
  require<Unsupported>(rates != nullptr, "device: expected one of ", measured_devices(),
                       ", which were measured, got \"", config.device, "\"");
  const NamedDevice& device = *find_named_device(config.device);
  const ModelConfig model =
      read_model_config(model_dir, config.hf_overrides, config.rope_scaling_factor, config_dialect);
  EngineConfig resolved = resolve_engine_config(config, model);
  const auto sizes = make_sizes(device, config.dtype);
  // Context shards are predicted for devices whose backend does not have them yet.
  const int cp = std::exchange(resolved.cp, 1);
  take_device_defaults(resolved, model, *sizes);
  resolved.cp = cp;
  const CostModel costs(model, resolved, *sizes, *rates, device.num_sms, cluster);
  return {plan_with_remedies(resolved, model, *sizes, device.bytes),
          costs.prefill(resolved.session_len), costs.decode(resolved.session_len, sequences),
          list_terms(*rates)};
}

}  // namespace longspan
