#pragma once

#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "checkpoint/model_config.h"
#include "model/shard.h"

namespace longspan {

/// The sizes of the matrices a forward pass writes on one rank.
struct ActivationShape {
  int64_t tokens = 0;      ///< rows of all but the last
  int64_t logit_rows = 0;  ///< rows of logits
  int64_t hidden = 0;
  int64_t q = 0;               ///< query heads * head_dim
  int64_t qkv = 0;             ///< (query + 2 KV heads) * head_dim
  int64_t inner = 0;           ///< of intermediate_size
  int64_t vocab = 0;           ///< all of it
  int64_t tokens_of_head = 0;  ///< of the vocabulary
  int64_t shared_heads = 0;    ///< query heads whose keys ranks share; 0 where none are shared
  int64_t ranks = 1;

  ActivationShape(const ModelConfig& config, const Shard& shard, int64_t tokens,
                  int64_t logit_rows);
};

/// The matrices themselves. Each has a buffer of its own width, its stride a multiple of 32
/// elements, so that the padding a backend's kernels read beyond cols is always zero.
class Activations {
 public:
  Activations(const ActivationShape& shape, Backend& backend);
  /// Bytes the constructor allocates.
  static int64_t bytes(const ActivationShape& shape, const BackendSizes& backend);

  // "act" enters linears, "out" leaves them within a layer, "acc" is summed in.
  // Up to a multiple of the ranks:
  MatrixView residual;  ///< acc [T, hidden]: the stream every block adds to
  MatrixView delta;     ///< out [T, hidden]: a block's output, not yet added
  MatrixView normed;    ///< act [T, hidden]

  MatrixView qkv;        ///< out [T, qkv]
  MatrixView q;          ///< act [T, q], rotated
  MatrixView attention;  ///< act [T, q]
  // Where ranks share the keys of a sequence:
  MatrixView log_sum_exp;   ///< acc [T, heads]
  MatrixView log_sum_exps;  ///< acc [T, ranks heads], of every rank
  MatrixView gate_up;       ///< out [T, 2 inner]
  MatrixView inner;         ///< act [T, inner]
  MatrixView head_input;    ///< act [T, hidden]: the rows whose next token is asked for
  MatrixView logits;        ///< acc [logit_rows, vocab]
  MatrixView own_logits;    ///< acc [logit_rows, tokens_of_head]; logits itself where that is all

 private:
  std::vector<Buffer> buffers_;
};

}  // namespace longspan
