#pragma once

#include <cuda_runtime_api.h>

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "backend/cuda/int8_matrix.h"
#include "core/matrix.h"
#include "core/memory.h"

namespace longspan::cuda {

/// Brings weights from a mapped file to the device through page-locked memory: while one half of a
/// lane's memory is on its way, the other is filled. Thread-safe; each caller has a lane for
/// itself, and more callers than lanes wait.
class WeightStager {
 public:
  explicit WeightStager(int device);
  ~WeightStager();
  WeightStager(const WeightStager&) = delete;
  WeightStager& operator=(const WeightStager&) = delete;

  /// Converts to `out`'s dtype (bfloat16 or float32) and copies; out is device memory of the same
  /// rows and cols. Done when it returns.
  void copy(const WeightView& in, const MatrixView& out);

  /// Rounds to bfloat16, then turns and quantises into rows first_row and up of `out`
  /// (int8_matrix.h). The device reads the page-locked memory itself, so that no bfloat16 weights
  /// are ever there. Done when it returns.
  void quantize(const WeightView& in, const Int8Matrix& out, int64_t first_row);

 private:
  struct Lane;
  /// Fills halves of a lane with rows of `in` as a dtype and has each sent on, in order, by
  /// send(host, first row, rows, stream); done when it returns. A row fits in a half.
  template <class Send>
  void stage(const WeightView& in, DType dtype, const Send& send);
  Lane* acquire();
  void release(Lane* lane);

  const int device_;
  std::mutex mutex_;
  std::condition_variable freed_;
  std::vector<std::unique_ptr<Lane>> lanes_;  // guarded by mutex_
  std::vector<Lane*> free_;                   // guarded by mutex_
};

}  // namespace longspan::cuda
