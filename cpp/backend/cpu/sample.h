#pragma once

#include <cstdint>
#include <span>

#include "backend/backend.h"
#include "core/thread_pool.h"

namespace longspan::cpu {

/// Backend::sample: a token per row of logits (float32 [R, V]), rows in parallel.
/// The row's edits come first and are undone last. Greedy takes the largest logit. Otherwise:
/// logits / temperature, the top_k largest, softmax, the smallest set of the likeliest whose
/// probability reaches top_p (at least one token), of those the ones at least min_p times as likely
/// as the likeliest, and a draw by uniform_at(seed, position) over that set in order of token id.
/// Among equal logits the lower id comes first. -inf is a token of probability 0; tokens[r] = -1
/// where a row holds NaN or +inf or nothing finite.
void sample(ThreadPool& pool, const MatrixView& logits, std::span<const SamplerRow> rows,
            std::span<int32_t> tokens);

}  // namespace longspan::cpu
