#pragma once

#include <memory>

#include "core/matrix.h"

namespace longspan {

/// How the ranks of a tensor-parallel group combine what each computed. Model code calls it without
/// asking how many ranks there are; for one rank it is a null object.
class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  /// Replaces every element by its sum over the ranks. acc dtype, all ranks the same shape.
  virtual void all_reduce(const MatrixView& matrix) = 0;
};

/// The group of one.
std::unique_ptr<Communicator> make_single_communicator();

}  // namespace longspan
