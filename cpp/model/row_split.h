#pragma once

#include <cstdint>

#include "core/matrix.h"
#include "parallel/communicator.h"
#include "parallel/share.h"

namespace longspan {

/// Who works on which rows of a step between the linears of its layers. Of many rows each rank has
/// a share of the residual stream and norms it, between the reduce-scatter that sums a row-parallel
/// linear's outputs and the all-gather of the next one's inputs (sequence parallelism, Korthikanti
/// et al. 2022, https://arxiv.org/abs/2205.05198, section 4.2.2). Both together move what an
/// all-reduce moves, in two ops instead of one, so of few rows every rank has all.
/// Matrices are whole, with capacity(T, ranks) rows, of which those beyond the step hold anything.
class RowSplit {
 public:
  /// Of a step of so many rows.
  RowSplit(Communicator& communicator, int64_t rows);

  /// The rows of m that are this rank's; none where there are fewer rows than parts.
  MatrixView own(const MatrixView& m) const { return m.rows_from(own_.begin, own_.size()); }
  /// Sums up the ranks' m, into own(m). out or acc dtype.
  void sum(const MatrixView& m) const;
  /// Gives every rank's own(m) to all. act dtype.
  void gather(const MatrixView& m) const;

  /// Whether a step of so many rows is split.
  static bool splits(int64_t rows, int64_t ranks) { return ranks > 1 && rows >= kLeastRows; }
  /// Rows that a matrix needs for steps of up to so many.
  static int64_t capacity(int64_t rows, int64_t ranks) {
    return (rows + ranks - 1) / ranks * ranks;
  }

 private:
  /// Where what is saved at the norms begins to outweigh the second op.
  static constexpr int64_t kLeastRows = 256;

  Communicator& communicator_;
  const bool split_;
  const int64_t rows_;  // of the step, and where it is split up to a multiple of the ranks
  Share own_;
};

}  // namespace longspan
