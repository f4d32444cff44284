#include "reference/reference.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

namespace longspan::reference {

uint16_t bf16_bits(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const uint32_t lower = bits & 0xffff;
  uint32_t upper = bits >> 16;
  if (lower > 0x8000 || (lower == 0x8000 && upper % 2 == 1)) ++upper;
  return static_cast<uint16_t>(upper);
}

double bf16_value(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

Matrix read(const MatrixView& view) {
  Matrix result(view.rows, view.cols);
  for (int64_t r = 0; r < view.rows; ++r) {
    for (int64_t c = 0; c < view.cols; ++c) {
      result.at(r, c) =
          view.dtype == DType::kF32 ? view.row<float>(r)[c] : bf16_value(view.row<uint16_t>(r)[c]);
    }
  }
  return result;
}

void write(const Matrix& values, const MatrixView& view) {
  for (int64_t r = 0; r < view.rows; ++r) {
    for (int64_t c = 0; c < view.cols; ++c) {
      const auto value = static_cast<float>(values.at(r, c));
      if (view.dtype == DType::kF32) {
        view.row<float>(r)[c] = value;
      } else {
        view.row<uint16_t>(r)[c] = bf16_bits(value);
      }
    }
  }
}

Matrix random_matrix(int64_t rows, int64_t cols, double scale, uint64_t seed) {
  std::mt19937_64 bits(seed);  // its values, unlike a distribution's, are fixed by the standard
  Matrix result(rows, cols);
  for (double& value : result.values) {
    const double unit = static_cast<double>(bits() >> 11) * 0x1p-53;
    value = static_cast<float>((2 * unit - 1) * scale);
  }
  return result;
}

Matrix linear(const Matrix& x, const Matrix& weight, std::span<const double> bias) {
  Matrix y(x.rows, weight.rows);
  for (int64_t m = 0; m < x.rows; ++m) {
    for (int64_t n = 0; n < weight.rows; ++n) {
      double sum = bias.empty() ? 0.0 : bias[static_cast<size_t>(n)];
      for (int64_t k = 0; k < x.cols; ++k) sum += x.at(m, k) * weight.at(n, k);
      y.at(m, n) = sum;
    }
  }
  return y;
}

Matrix rms_norm(const Matrix& x, std::span<const double> weight, double eps) {
  Matrix y(x.rows, x.cols);
  for (int64_t r = 0; r < x.rows; ++r) {
    double squares = 0;
    for (const double value : x.row(r)) squares += value * value;
    const double scale = 1 / std::sqrt(squares / static_cast<double>(x.cols) + eps);
    for (int64_t c = 0; c < x.cols; ++c) {
      y.at(r, c) = x.at(r, c) * scale * weight[static_cast<size_t>(c)];
    }
  }
  return y;
}

Matrix rotate(const Matrix& x, int64_t head_dim, std::span<const int64_t> positions,
              std::span<const double> inv_freq) {
  const auto pairs = static_cast<int64_t>(inv_freq.size());
  Matrix y = x;
  for (int64_t t = 0; t < x.rows; ++t) {
    for (int64_t head = 0; head < x.cols; head += head_dim) {
      for (int64_t i = 0; i < pairs; ++i) {
        const double angle = static_cast<double>(positions[static_cast<size_t>(t)]) *
                             inv_freq[static_cast<size_t>(i)];
        const double a = x.at(t, head + i);
        const double b = x.at(t, head + pairs + i);
        y.at(t, head + i) = a * std::cos(angle) - b * std::sin(angle);
        y.at(t, head + pairs + i) = b * std::cos(angle) + a * std::sin(angle);
      }
    }
  }
  return y;
}

Matrix scale_queries(Matrix q, std::span<const int64_t> positions, int64_t logn_length) {
  if (logn_length == 0) return q;
  for (int64_t t = 0; t < q.rows; ++t) {
    const auto count = static_cast<double>(positions[static_cast<size_t>(t)] + 1);
    const double scale = std::log(count) / std::log(static_cast<double>(logn_length));
    for (int64_t c = 0; c < q.cols; ++c) q.at(t, c) *= std::max(1.0, scale);
  }
  return q;
}

Matrix attention(const Matrix& q, const Matrix& k, const Matrix& v, int64_t num_heads,
                 int64_t num_kv_heads, int64_t first_position, double scale) {
  const int64_t head_dim = q.cols / num_heads;
  const int64_t group = num_heads / num_kv_heads;
  Matrix out(q.rows, q.cols);
  for (int64_t t = 0; t < q.rows; ++t) {
    for (int64_t head = 0; head < num_heads; ++head) {
      const int64_t q_col = head * head_dim;
      const int64_t kv_col = head / group * head_dim;
      std::vector<double> scores;
      for (int64_t key = 0; key <= first_position + t; ++key) {
        double dot = 0;
        for (int64_t d = 0; d < head_dim; ++d) dot += q.at(t, q_col + d) * k.at(key, kv_col + d);
        scores.push_back(dot * scale);
      }
      const std::vector<double> weights = softmax(scores);
      for (int64_t d = 0; d < head_dim; ++d) {
        double sum = 0;
        for (size_t key = 0; key < weights.size(); ++key) {
          sum += weights[key] * v.at(static_cast<int64_t>(key), kv_col + d);
        }
        out.at(t, q_col + d) = sum;
      }
    }
  }
  return out;
}

Matrix silu_mul(const Matrix& gate_up) {
  const int64_t cols = gate_up.cols / 2;
  Matrix y(gate_up.rows, cols);
  for (int64_t r = 0; r < y.rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      const double gate = gate_up.at(r, c);
      y.at(r, c) = gate / (1 + std::exp(-gate)) * gate_up.at(r, cols + c);
    }
  }
  return y;
}

double log_sum_exp(std::span<const double> logits) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const double logit : logits) sum += std::exp(logit - largest);
  return largest + std::log(sum);
}

std::vector<double> softmax(std::span<const double> logits) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  std::vector<double> result;
  for (const double logit : logits) result.push_back(std::exp(logit - largest));
  const double sum = std::accumulate(result.begin(), result.end(), 0.0);
  for (double& probability : result) probability /= sum;
  return result;
}

std::vector<double> sampler_probabilities(std::span<const double> logits,
                                          const SamplerSettings& settings) {
  std::vector<double> edited(logits.begin(), logits.end());
  for (const Edit& edit : settings.edits) {
    double& x = edited[edit.token];
    x = (x > 0 ? x / edit.penalty : x * edit.penalty) + edit.add;
  }
  std::vector<size_t> order(edited.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return edited[a] > edited[b]; });
  if (settings.top_k > 0) {
    order.resize(std::min(order.size(), static_cast<size_t>(settings.top_k)));
  }

  std::vector<double> scaled;
  for (const size_t token : order) scaled.push_back(edited[token] / settings.temperature);
  const std::vector<double> likeliest_first = softmax(scaled);
  size_t kept = 0;
  double cumulative = 0;
  do {
    cumulative += likeliest_first[kept++];
  } while (kept < order.size() && cumulative < settings.top_p);

  std::vector<double> result(edited.size());
  double total = 0;
  for (size_t i = 0; i < kept; ++i) {
    if (likeliest_first[i] < settings.min_p * likeliest_first[0]) break;
    total += result[order[i]] = likeliest_first[i];
  }
  for (double& probability : result) probability /= total;
  return result;
}

}  // namespace longspan::reference
