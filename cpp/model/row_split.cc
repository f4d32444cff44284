#include "model/row_split.h"

#include <algorithm>

namespace longspan {

RowSplit::RowSplit(Communicator& communicator, int64_t rows)
    : communicator_(communicator),
      split_(splits(rows, communicator.size())),
      rows_(split_ ? capacity(rows, communicator.size()) : rows),
      own_{0, rows} {
  if (!split_) return;
  const Share share = share_of(rows_, communicator.rank(), communicator.size());
  own_ = {std::min(share.begin, rows), std::min(share.end, rows)};
}

void RowSplit::sum(const MatrixView& m) const {
  const MatrixView of_step = m.rows_from(0, rows_);
  split_ ? communicator_.reduce_scatter(of_step) : communicator_.all_reduce(of_step);
}

void RowSplit::gather(const MatrixView& m) const {
  if (split_) communicator_.all_gather(m.rows_from(0, rows_));
}

}  // namespace longspan
