#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/matrix.h"

/// Every op of the backend as its definition reads, in double precision and without any thought of
/// speed: what the kernels are tested against.
namespace longspan::reference {

/// rows x cols, row-major, no gaps.
struct Matrix {
  int64_t rows = 0;
  int64_t cols = 0;
  std::vector<double> values;

  Matrix(int64_t rows_, int64_t cols_)
      : rows(rows_), cols(cols_), values(static_cast<size_t>(rows_ * cols_)) {}
  double& at(int64_t r, int64_t c) { return values[static_cast<size_t>(r * cols + c)]; }
  double at(int64_t r, int64_t c) const { return values[static_cast<size_t>(r * cols + c)]; }
  std::span<const double> row(int64_t r) const {
    return std::span(values).subspan(static_cast<size_t>(r * cols), static_cast<size_t>(cols));
  }
};

/// The nearest bfloat16, ties to even, as its bits and as a value. x is finite.
uint16_t bf16_bits(float x);
double bf16_value(uint16_t bits);

/// The elements of a float32 or bfloat16 view.
Matrix read(const MatrixView& view);

/// Writes values as the view's dtype (float32 or bfloat16, both rounded to nearest even).
void write(const Matrix& values, const MatrixView& view);

/// Deterministic values, uniform in [-scale, scale), exact in float32.
Matrix random_matrix(int64_t rows, int64_t cols, double scale, uint64_t seed);

/// y = x W^T + bias: x [M, K], weight [N, K], bias [N] or empty; returns [M, N].
Matrix linear(const Matrix& x, const Matrix& weight, std::span<const double> bias = {});

/// x / sqrt(mean(x^2) + eps) * weight, by row.
Matrix rms_norm(const Matrix& x, std::span<const double> weight, double eps);

/// Rotates pair (i, i + P) of every head by position * inv_freq[i], dims from 2 P on as they are:
/// x [T, heads head_dim], positions [T], inv_freq [P]. (Su et al. 2021, in the half-split order of
/// HF Llama, partial as in HF Phi-3.)
Matrix rotate(const Matrix& x, int64_t head_dim, std::span<const int64_t> positions,
              std::span<const double> inv_freq);

/// Rows, those of positions, times max(1, ln(position + 1) / ln(logn_length)); 0: as they are.
/// (Qwen-1's logn attention.)
Matrix scale_queries(Matrix q, std::span<const int64_t> positions, int64_t logn_length);

/// Causal softmax attention of one sequence with grouped KV heads. q [T, num_heads D] stands at
/// positions first_position + t; k, v [first_position + T, num_kv_heads D]; query head h reads KV
/// head h / (num_heads / num_kv_heads). Returns [T, num_heads D].
Matrix attention(const Matrix& q, const Matrix& k, const Matrix& v, int64_t num_heads,
                 int64_t num_kv_heads, int64_t first_position, double scale);

/// silu(gate) * up, silu(x) = x / (1 + exp(-x)): gate_up [T, 2 I]; returns [T, I].
Matrix silu_mul(const Matrix& gate_up);

double log_sum_exp(std::span<const double> logits);
std::vector<double> softmax(std::span<const double> logits);

/// What changes one logit before a draw; see LogitEdit of backend/sampler.h.
struct Edit {
  size_t token;
  double penalty;
  double add;
};

struct SamplerSettings {
  double temperature = 1;
  int64_t top_k = 0;
  double top_p = 1;
  double min_p = 0;
  std::vector<Edit> edits;
};

/// What the sampler draws from: edited logits / temperature, the top_k largest (0: all; the lower
/// index first among equals), softmax, then the smallest set of the likeliest whose probability
/// reaches top_p, of those the ones at least min_p times as likely as the likeliest, renormalised.
std::vector<double> sampler_probabilities(std::span<const double> logits,
                                          const SamplerSettings& settings);

}  // namespace longspan::reference
