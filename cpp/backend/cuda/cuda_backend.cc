#include "backend/cuda/cuda_backend.h"

#include <algorithm>

#include "backend/cuda/attention_decode.h"
#include "backend/cuda/attention_prefill_int8_fp8_sm90.h"
#include "backend/cuda/attention_prefill_int8_sm90.h"
#include "backend/cuda/attention_prefill_mma.h"
#include "backend/cuda/attention_prefill_sm90.h"
#include "backend/cuda/copy_kv_block.h"
#include "backend/cuda/cuda_check.h"
#include "backend/cuda/dequantize_kv.h"
#include "backend/cuda/kv_block_rows.h"
#include "backend/cuda/linear.h"
#include "backend/cuda/linear_skinny.h"
#include "backend/cuda/nccl_communicator.h"
#include "backend/cuda/partial_attention.h"
#include "backend/cuda/rotate_append.h"
#include "backend/cuda/rows.h"
#include "backend/cuda/step_plan.h"

namespace longspan::cuda {
namespace {

/// Rows a step must have before end_layer() waits: a short step is over before anyone could ask.
constexpr int64_t kLongStepRows = 256;

const CudaPackedLinear& packed(const PackedLinear& linear) {
  return static_cast<const CudaPackedLinear&>(linear);
}
const CudaInt8Linear& in_int8(const PackedLinear& linear) {
  return static_cast<const CudaInt8Linear&>(linear);
}
/// Columns up to a multiple of 8 are there on both sides, and zero.
MatrixView with_padding(MatrixView x, const CudaPackedLinear& weight) {
  x.cols = weight.stride();
  return x;
}
const CudaStepPlan& planned(const StepPlan& plan) { return static_cast<const CudaStepPlan&>(plan); }

}  // namespace

CudaBackend::CudaBackend(int device)
    : CudaSizes(
          (check_cuda(cudaSetDevice(device), "choosing the device"), read_device_facts(device))),
      stager_(device),
      cublas_(std::make_unique<CublasLt>()),
      small_(kSmallBytes, 8),
      drawn_(allocate_device(kMaxDrawn * 4)),
      drawn_on_host_(allocate_pinned(kDrawsKept * kMaxDrawn * 4)),
      results_(allocate_device(kSmallBytes)),
      results_on_host_(allocate_pinned(kSmallBytes)) {
  check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
  for (const std::span<cudaEvent_t> events : {std::span(layer_done_), std::span(draw_done_)}) {
    for (cudaEvent_t& event : events) {
      check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "creating an event");
    }
  }
}

CudaBackend::~CudaBackend() {
  cudaSetDevice(facts_.device);
  if (stream_ != nullptr) cudaStreamSynchronize(stream_);
  for (const std::span<cudaEvent_t> events : {std::span(layer_done_), std::span(draw_done_)}) {
    for (const cudaEvent_t event : events) {
      if (event != nullptr) cudaEventDestroy(event);
    }
  }
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

void CudaBackend::use_device() const {
  check_cuda(cudaSetDevice(facts_.device), "choosing the device");
}

void CudaBackend::wait() {
  if (group_ == nullptr) {
    check_cuda(cudaStreamSynchronize(stream_), "running a step");
  } else {
    query([this] { return cudaStreamQuery(stream_); }, "running a step");
  }
  check_cuda(cudaGetLastError(), "launching a kernel");
}

void CudaBackend::wait_for(cudaEvent_t event, const char* what) {
  if (group_ == nullptr) {
    check_cuda(cudaEventSynchronize(event), what);
  } else {
    query([event] { return cudaEventQuery(event); }, what);
  }
  check_cuda(cudaGetLastError(), "launching a kernel");
}

template <class Query>
void CudaBackend::query(Query query, const char* what) {
  constexpr int kQueriesPerCheck = 256;
  cudaError_t status = cudaErrorNotReady;
  for (int i = 1; (status = query()) == cudaErrorNotReady; ++i) {
    // The others may never come to what this rank waits in.
    if (i % kQueriesPerCheck == 0) group_->check();
  }
  check_cuda(status, what);
}

std::string CudaBackend::describe() const {
  return message("cuda:", facts_.device, " (", facts_.name, ", sm_", facts_.major, facts_.minor,
                 ", cuBLASLt ", cublas_->version(), ")");
}

int64_t CudaBackend::free_bytes() const {
  use_device();
  size_t free = 0;
  size_t total = 0;
  check_cuda(cudaMemGetInfo(&free, &total), "asking for free memory");
  // And what this backend and its group have taken by now.
  return static_cast<int64_t>(free) + kBeginBytes + (group_ == nullptr ? 0 : kGroupBytes);
}

std::unique_ptr<Communicator> CudaBackend::make_communicator(std::unique_ptr<Communicator> host) {
  if (host->size() == 1) return host;
  use_device();
  std::unique_ptr<Communicator> group = make_nccl_communicator(std::move(host), stream_);
  group_ = group.get();
  return group;
}

Buffer CudaBackend::allocate(int64_t bytes) {
  use_device();
  return allocate_device(bytes);
}

std::unique_ptr<PackedLinear> CudaBackend::pack_linear(std::span<const WeightView> parts,
                                                       std::span<const WeightView> biases,
                                                       LinearDType dtype) {
  use_device();
  if (dtype == LinearDType::kNative) {
    return std::make_unique<CudaPackedLinear>(stager_, parts, biases);
  }
  int8_.begin();
  return std::make_unique<CudaInt8Linear>(stager_, parts, biases);
}

Buffer CudaBackend::pack_vector(const WeightView& vector) {
  use_device();
  Buffer out = allocate_device(vector.cols * 4);
  stager_.copy(vector, {out.data(), DType::kF32, 1, vector.cols, vector.cols});
  return out;
}

void CudaBackend::copy_kv_block(const KvCache& cache, int32_t from, int32_t to, int64_t tokens) {
  use_device();
  cuda::copy_kv_block(cache, from, to, tokens, stream_);
}

char* CudaBackend::block_on_host(int64_t bytes) {
  if (block_on_host_.bytes() < bytes) block_on_host_ = allocate_pinned(bytes);
  return block_on_host_.as<char>();
}

void CudaBackend::export_kv_block(const KvCache& cache, int32_t block, int64_t tokens,
                                  std::span<std::byte> rows) {
  use_device();
  const KvLayout layout = KvLayout::of(cache.shape, cache.pool.data());
  char* host = block_on_host(layout.block_bytes);
  check_cuda(
      cudaMemcpyAsync(host, layout.key_tile(block, 0, 0), static_cast<size_t>(layout.block_bytes),
                      cudaMemcpyDeviceToHost, stream_),
      "copying a block to the host");
  wait();
  rows_of_block(cache.shape, host, tokens, rows);
}

void CudaBackend::import_kv_block(const KvCache& cache, int32_t block, int64_t tokens,
                                  std::span<const std::byte> rows) {
  use_device();
  const KvLayout layout = KvLayout::of(cache.shape, cache.pool.data());
  char* host = block_on_host(layout.block_bytes);
  block_of_rows(cache.shape, rows, tokens, host);
  check_cuda(
      cudaMemcpyAsync(layout.key_tile(block, 0, 0), host, static_cast<size_t>(layout.block_bytes),
                      cudaMemcpyHostToDevice, stream_),
      "copying a block to the device");
  wait();
}

std::unique_ptr<StepPlan> CudaBackend::make_step_plan(const StepLimits& limits,
                                                      const AttentionShape& shape) {
  use_device();
  return std::make_unique<CudaStepPlan>(limits, shape, facts_);
}

void CudaBackend::plan_step(StepPlan& plan, const StepInput& input, const KvCache& cache) {
  use_device();
  // A step's launches fit in the device's queue. More would block, and with them the question
  // whether the other ranks live.
  if (group_ != nullptr) wait();
  static_cast<CudaStepPlan&>(plan).plan(input, cache, stream_);
}

bool CudaBackend::run_whole(StepPlan& plan, const std::function<void()>& ops) {
  auto& p = static_cast<CudaStepPlan&>(plan);
  const std::optional<StepShape> shape = p.shape_below(kLongStepRows);
  if (!shape) return false;
  p.graphs().run(*shape, stream_, ops);
  return true;
}

void CudaBackend::embedding(const StepPlan& plan, const PackedLinear& table, int32_t first_token,
                            const MatrixView& out) {
  cuda::embedding(planned(plan).view().token_ids, drawn_.as<const int32_t>(), packed(table).view(),
                  first_token, out, stream_);
}

void CudaBackend::rms_norm(const MatrixView* delta, const MatrixView& residual,
                           const Buffer& weight, float eps, const MatrixView& out) {
  cuda::rms_norm(delta, residual, weight.as<const float>(), eps, out, stream_);
}

void CudaBackend::linear(const MatrixView& x, const PackedLinear& weight, const MatrixView& y) {
  if (weight.linear_dtype() == LinearDType::kInt8) {
    return int8_.linear(x, in_int8(weight), y, facts_.num_sms, stream_);
  }
  const CudaPackedLinear& w = packed(weight);
  const MatrixView padded = with_padding(x, w);
  if (x.rows <= kSkinnyRows) {
    const auto* bias = static_cast<const float*>(w.bias(DType::kF32));
    linear_skinny(padded, w.weight(), w.stride(), bias, y, stream_);
  } else {
    cublas_->linear(padded, w.weight(), w.stride(), w.bias(y.dtype), y, stream_);
  }
}

void CudaBackend::linear_silu_mul(const MatrixView& x, const PackedLinear& weight,
                                  const MatrixView& gate_up, const MatrixView& out) {
  if (x.rows > kSkinnyRows) return Backend::linear_silu_mul(x, weight, gate_up, out);
  if (weight.linear_dtype() == LinearDType::kInt8) {
    return int8_.linear_silu_mul(x, in_int8(weight), out, stream_);
  }
  const CudaPackedLinear& w = packed(weight);
  const auto* bias = static_cast<const float*>(w.bias(DType::kF32));
  linear_silu_mul_skinny(with_padding(x, w), w.weight(), w.stride(), bias, out, stream_);
}

void CudaBackend::rotate_append(const StepPlan& plan, int64_t layer, const MatrixView& qkv,
                                const QkNorm* norm, const KvCache& cache, const MatrixView& q_out) {
  RotateAppendArgs args;
  args.plan = planned(plan).view();
  args.kv = KvLayout::of(cache.shape, cache.pool.data());
  args.layer = layer;
  args.qkv = qkv;
  args.q_out = q_out.row<__nv_bfloat16>(0);
  args.q_stride = q_out.stride;
  args.num_heads = static_cast<int32_t>(planned(plan).shape().num_heads);
  if (norm != nullptr) {
    args.q_norm = norm->q.as<const float>();
    args.k_norm = norm->k.as<const float>();
    args.norm_eps = norm->eps;
  }
  args.q_factor = planned(plan).query_factor();
  cuda::rotate_append(args, stream_);
}

void CudaBackend::attention(const StepPlan& plan, int64_t layer, const MatrixView& q,
                            const KvCache& cache, const MatrixView& out,
                            const MatrixView* log_sum_exp) {
  const CudaStepPlan& p = planned(plan);
  AttentionArgs args;
  args.plan = p.view();
  args.kv = KvLayout::of(cache.shape, cache.pool.data());
  args.layer = layer;
  args.q = q.row<const __nv_bfloat16>(0);
  args.q_stride = q.stride;
  args.out = out.row<__nv_bfloat16>(0);
  args.out_stride = out.stride;
  if (log_sum_exp != nullptr) {
    args.log_sum_exp = log_sum_exp->row<float>(0);
    args.log_sum_exp_stride = log_sum_exp->stride;
  }
  args.num_heads = static_cast<int32_t>(p.shape().num_heads);
  if (p.has_decode()) {
    check_cuda(attention_decode(args, p.decode(), p.decode_launch(), stream_), "decode attention");
  }
  for (const PlannedPass& pass : p.prefills()) prefill(p, pass, args);
  if (p.has_unseeing_rows()) clear_unseeing_rows(args, stream_);
}

void CudaBackend::prefill(const CudaStepPlan& plan, const PlannedPass& planned,
                          AttentionArgs args) {
  const PrefillPass& pass = planned.pass;
  const PrefillWorkspace& workspace = plan.workspace();
  const auto run = [&] {
    if (plan.prefill_attention() != PrefillAttention::kNative) {
      const Int8Keys keys{workspace.int8_panels, workspace.int8_scales, workspace.key_means,
                          workspace.seqs, pass.num_panels};
      check_cuda(quantize_keys({args.plan, args.kv, args.layer, keys, planned.seqs, pass.num_seqs},
                               stream_),
                 "quantising keys");
      if (plan.prefill_attention() == PrefillAttention::kInt8) {
        check_cuda(attention_prefill_int8_sm90(args, keys, planned.sm90, stream_),
                   "prefill attention");
        return;
      }
      const Fp8Values values{workspace.fp8_panels, workspace.fp8_scales, workspace.seqs,
                             pass.num_panels};
      check_cuda(
          quantize_values({args.plan, args.kv, args.layer, values, planned.seqs, pass.num_seqs},
                          stream_),
          "quantising values");
      check_cuda(attention_prefill_int8_fp8_sm90(args, keys, values, planned.sm90, stream_),
                 "prefill attention");
    } else if (plan.uses_sm90()) {
      check_cuda(attention_prefill_sm90(args, planned.sm90, stream_), "prefill attention");
    } else {
      check_cuda(attention_prefill_mma(args, planned.tiles.data(),
                                       static_cast<int32_t>(planned.tiles.size()), stream_),
                 "prefill attention");
    }
  };

  // All KV heads at once or, by way of the workspace, a few.
  const bool quantised = args.kv.key.element != KvElement::kNative;
  const int32_t kv_heads = args.kv.num_kv_heads;
  const int32_t heads = args.num_heads / kv_heads * pass.num_kv_heads;
  DequantizeKvArgs dequantize;
  if (quantised) {
    dequantize.plan = args.plan;
    dequantize.from = args.kv;
    dequantize.layer = args.layer;
    dequantize.to =
        KvLayout::of({1, pass.num_kv_heads, args.kv.head_dim, kPanelTokens}, workspace.panels);
    dequantize.staged = workspace.seqs;
    dequantize.seqs = planned.seqs;
    dequantize.num_seqs = pass.num_seqs;
    dequantize.num_panels = pass.num_panels;
    args.kv = dequantize.to;
    args.layer = 0;
    args.plan.seqs = workspace.seqs;
    args.plan.block_tables = workspace.identity;
  } else {
    args.kv.num_kv_heads = pass.num_kv_heads;
  }
  args.num_heads = heads;
  for (int32_t h = 0; h < kv_heads; h += pass.num_kv_heads) {
    if (quantised) {
      dequantize.first_kv_head = h;
      check_cuda(dequantize_kv(dequantize, stream_), "reading the cache");
    }
    run();
    args.q += int64_t{heads} * args.kv.head_dim;
    args.out += int64_t{heads} * args.kv.head_dim;
    if (args.log_sum_exp != nullptr) args.log_sum_exp += heads;
    if (!quantised) args.kv.pool += pass.num_kv_heads * args.kv.head_bytes;
  }
}

void CudaBackend::weigh_partial_attention(const MatrixView& log_sum_exps, int64_t own,
                                          int64_t num_heads, const MatrixView& attention) {
  cuda::weigh_partial_attention(log_sum_exps, own, num_heads, attention, stream_);
}

void CudaBackend::silu_mul(const MatrixView& gate_up, const MatrixView& out) {
  cuda::silu_mul(gate_up, out, stream_);
}

void CudaBackend::end_layer(const StepPlan& plan) {
  if (planned(plan).num_tokens() < kLongStepRows) return;
  const cudaEvent_t event = layer_done_[layers_queued_++ % kLayersBehind];
  wait_for(event, "running a layer");  // that of kLayersBehind layers ago
  check_cuda(cudaEventRecord(event, stream_), "recording an event");
}

}  // namespace longspan::cuda
