#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/matrix.h"

namespace longspan {

/// A tensor as it is in its file.
struct RawTensor {
  std::string dtype;  ///< "F32", "BF16", ...
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;
};

/// The tensors of a model directory: model.safetensors, or the shards model.safetensors.index.json
/// names. Files are mapped, never copied; nothing in them is trusted: every size and offset is
/// checked when the file is opened. Const methods are thread-safe.
class Checkpoint {
 public:
  /// Throws CheckpointError naming the file and what is wrong with it.
  static std::unique_ptr<Checkpoint> open(const std::string& model_dir);
  virtual ~Checkpoint() = default;

  virtual bool contains(const std::string& name) const = 0;
  virtual std::vector<std::string> names() const = 0;  ///< sorted

  /// A tensor of shape [rows, cols]; rows == 1 also takes shape [cols]. Throws CheckpointError when
  /// it is absent, its shape differs, or its dtype is not F32, F16 or BF16.
  virtual WeightView tensor(const std::string& name, int64_t rows, int64_t cols) const = 0;

  /// Throws CheckpointError when it is absent.
  virtual RawTensor raw(const std::string& name) const = 0;

  /// Tells the system that the tensor's pages will not be read again.
  virtual void release(const WeightView& tensor) const = 0;
};

/// Throws CheckpointError naming the tensor and the first bad element when a value is not finite.
void check_finite(const WeightView& tensor);

}  // namespace longspan
