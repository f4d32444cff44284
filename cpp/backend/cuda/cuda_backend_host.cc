#include <algorithm>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/cuda_check.h"
#include "backend/cuda/log_probabilities.h"
#include "backend/cuda/rows.h"
#include "backend/cuda/sample.h"
#include "backend/cuda/score.h"

// The ops that take something small from the host or bring it there.

namespace longspan::cuda {

template <class T>
void CudaBackend::fetch(std::span<T> out) {
  check_cuda(cudaMemcpyAsync(results_on_host_.data(), results_.data(), out.size_bytes(),
                             cudaMemcpyDeviceToHost, stream_),
             "copying to the host");
  wait();
  const auto* values = results_on_host_.as<const T>();
  std::copy(values, values + out.size(), out.begin());
}

LogitEdit* CudaBackend::upload_edits(std::span<const LogitEdit> edits) {
  if (edits.empty()) return nullptr;
  const auto bytes = static_cast<int64_t>(edits.size_bytes());
  // Grows with the texts that are penalised. Freeing the last one waits for the device: not for
  // ranks that may not come.
  if (!edits_ || edits_->slot_bytes() < bytes) {
    wait();
    edits_ = std::make_unique<UploadRing>(2 * bytes, 1);
  }
  std::copy(edits.begin(), edits.end(), reinterpret_cast<LogitEdit*>(edits_->begin()));
  return reinterpret_cast<LogitEdit*>(edits_->upload(bytes, stream_));
}

void CudaBackend::gather_rows(const MatrixView& in, std::span<const int64_t> rows,
                              const MatrixView& out) {
  constexpr size_t kMost = kSmallBytes / sizeof(int64_t);
  for (size_t begin = 0; begin < rows.size(); begin += kMost) {
    const auto part = rows.subspan(begin, std::min(kMost, rows.size() - begin));
    const int64_t* device = small_.push(part, stream_);
    cuda::gather_rows(in, device,
                      out.rows_from(static_cast<int64_t>(begin), static_cast<int64_t>(part.size())),
                      stream_);
  }
}

void CudaBackend::score(const MatrixView& hidden, const PackedLinear& head, int32_t first_token,
                        std::span<const int32_t> targets, const MatrixView& workspace,
                        std::span<PartialScore> scores) {
  constexpr int64_t kMost = kSmallBytes / static_cast<int64_t>(sizeof(PartialScore));
  for (int64_t begin = 0; begin < hidden.rows; begin += kMost) {
    const int64_t count = std::min(kMost, hidden.rows - begin);
    const int32_t* device = small_.push(
        targets.subspan(static_cast<size_t>(begin), static_cast<size_t>(count)), stream_);
    for (int64_t done = 0; done < count; done += workspace.rows) {
      const int64_t rows = std::min(workspace.rows, count - done);
      const MatrixView logits = workspace.rows_from(0, rows);
      linear(hidden.rows_from(begin + done, rows), head, logits);
      cuda::score(logits, first_token, device + done, results_.as<PartialScore>() + done, stream_);
    }
    fetch(scores.subspan(static_cast<size_t>(begin), static_cast<size_t>(count)));
  }
}

int64_t CudaBackend::start_sample(const MatrixView& logits, std::span<const SamplerRow> rows) {
  // The rows' edits go first, all in one, so that the rows can say where theirs are.
  std::vector<LogitEdit> edits;
  for (const SamplerRow& row : rows) edits.insert(edits.end(), row.edits.begin(), row.edits.end());
  LogitEdit* device_edits = upload_edits(edits);
  std::vector<SamplerRow> with_edits(rows.begin(), rows.end());
  for (SamplerRow& row : with_edits) {
    const size_t count = row.edits.size();
    row.edits = {device_edits, count};
    device_edits += count;
  }
  const SamplerRow* device = small_.push(std::span<const SamplerRow>(with_edits), stream_);
  const int64_t draw = num_draws_++;
  const int64_t slot = draw % kDrawsKept;
  cuda::sample(logits, device, drawn_.as<int32_t>(),
               drawn_on_host_.as<int32_t>() + slot * kMaxDrawn, stream_);
  check_cuda(cudaEventRecord(draw_done_[slot], stream_), "recording an event");
  return draw;
}

void CudaBackend::sampled(int64_t draw, std::span<int32_t> tokens) {
  const int64_t slot = draw % kDrawsKept;
  wait_for(draw_done_[slot], "running a step");
  const auto* drawn = drawn_on_host_.as<const int32_t>() + slot * kMaxDrawn;
  std::copy(drawn, drawn + tokens.size(), tokens.begin());
}

void CudaBackend::log_probabilities(const MatrixView& logits, std::span<const int32_t> tokens,
                                    int64_t top, std::span<TokenLogprob> out) {
  // As many rows at a time as there is room for results.
  const auto per_row = static_cast<size_t>(top) + 1;
  const size_t most = kSmallBytes / (per_row * sizeof(TokenLogprob));
  for (size_t begin = 0; begin < tokens.size(); begin += most) {
    const auto part = tokens.subspan(begin, std::min(most, tokens.size() - begin));
    const int32_t* device = small_.push(part, stream_);
    cuda::log_probabilities(
        logits.rows_from(static_cast<int64_t>(begin), static_cast<int64_t>(part.size())), device,
        static_cast<int32_t>(top), results_.as<TokenLogprob>(), stream_);
    fetch(out.subspan(begin * per_row, part.size() * per_row));
  }
}

void CudaBackend::download(const MatrixView& in, float* out) {
  wait();  // a copy to pageable memory would, without asking whether the other ranks live
  // As many rows at a time as there is room for in float32.
  const int64_t most = std::max<int64_t>(1, kSmallBytes / (in.cols * 4));
  const auto width = static_cast<size_t>(in.cols) * sizeof(float);
  for (int64_t begin = 0; begin < in.rows; begin += most) {
    MatrixView part = in.rows_from(begin, std::min(most, in.rows - begin));
    if (in.dtype != DType::kF32) {
      const MatrixView wide{results_.data(), DType::kF32, part.rows, part.cols, part.cols};
      convert(part, wide, stream_);
      part = wide;
    }
    check_cuda(cudaMemcpy2DAsync(out + begin * in.cols, width, part.data,
                                 static_cast<size_t>(part.stride) * sizeof(float), width,
                                 static_cast<size_t>(part.rows), cudaMemcpyDeviceToHost, stream_),
               "copying to the host");
  }
  wait();
}

void CudaBackend::upload(const float* in, const MatrixView& out) {
  const int64_t most = std::max<int64_t>(1, kSmallBytes / (out.cols * 4));
  for (int64_t begin = 0; begin < out.rows; begin += most) {
    const MatrixView part = out.rows_from(begin, std::min(most, out.rows - begin));
    const auto count = static_cast<size_t>(part.rows * part.cols);
    const float* device = small_.push(std::span(in + begin * out.cols, count), stream_);
    convert({const_cast<float*>(device), DType::kF32, part.rows, part.cols, part.cols}, part,
            stream_);
  }
  wait();
}

}  // namespace longspan::cuda
