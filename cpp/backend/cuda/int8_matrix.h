#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "core/matrix.h"

namespace longspan::cuda {

/// Columns that follow each other for every row.
inline constexpr int64_t kInt8Slice = 128;
/// The most columns that are turned together. Runs of 32 let SmolLM2's perplexity rise by 0.9 %, of
/// 64 by 0.3 %; longer ones cost little.
inline constexpr int64_t kMaxInt8Run = 512;

/// Rows in signed bytes, each with a scale: element (r, c) of the turned matrix ~ scales[r]
/// code(r, c). After zeros up to a multiple of kInt8Slice, columns are turned in runs by an
/// orthonormal Hadamard matrix: products of two such rows are those of what they were made of,
/// while a column that stands out is shared by its run and no longer sets everyone's step. Runs
/// begin with a rank's own first column, so no split of columns cuts one.
struct Int8Matrix {
  /// [cols / kInt8Slice][rows][kInt8Slice] in the 128-byte swizzle: the eight 16-byte chunks of
  /// row r stand at chunk ^ (r % 8). At a multiple of 16 bytes in device memory.
  int8_t* codes = nullptr;
  float* scales = nullptr;  ///< [rows], max |x| / 127
  int64_t rows = 0;
  int64_t cols = 0;  ///< a multiple of kInt8Slice

  static constexpr int64_t padded(int64_t cols) {
    return (cols + kInt8Slice - 1) / kInt8Slice * kInt8Slice;
  }
  /// Columns that are turned together: the largest power of two up to kMaxInt8Run that divides all.
  int64_t run() const { return std::min(kMaxInt8Run, cols & -cols); }
};

/// Turns and quantises rows of bfloat16, in device memory or page-locked host memory, into rows
/// first_row and up of `out`. in.cols: out.cols less the padding. A code is x (1 / scale), each
/// step rounded to float32, to the nearest integer, ties to even, where x and scale are yet to be
/// divided by the root of a run; that scale is kLeastScale at least, and a row with an infinity or
/// a NaN gets a NaN as scale and codes 0. A row's result depends on that row alone.
void quantize_rows(const MatrixView& in, const Int8Matrix& out, int64_t first_row,
                   cudaStream_t stream);

}  // namespace longspan::cuda
