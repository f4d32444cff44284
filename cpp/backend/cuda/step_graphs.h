#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <list>

namespace longspan::cuda {

/// What the launches of a step depend on, besides what is the same for every step of a plan. The
/// work of a step that has a shape is in device memory at places that its shape says.
struct StepShape {
  int32_t num_rows = 0;  ///< one for each sequence
  int32_t rotary_pairs = 0;
  bool has_query_factor = false;
  const void* cache = nullptr;

  bool operator==(const StepShape&) const = default;
};

/// Steps as CUDA graphs: the launches of a shape are recorded once and then go out as one. Edges
/// between kernels that overlap (overlap.cuh) are recorded as such.
class StepGraphs {
 public:
  StepGraphs() = default;
  ~StepGraphs();
  StepGraphs(const StepGraphs&) = delete;
  StepGraphs& operator=(const StepGraphs&) = delete;

  /// Does what ops(), which only launches, would. It is called for the first step of a shape, whose
  /// code is loaded with it, and for the second, which is recorded; where the driver cannot record
  /// it, each time.
  void run(const StepShape& shape, cudaStream_t stream, const std::function<void()>& ops);

 private:
  struct Graph {
    StepShape shape;
    bool seen = false;               // a step of it has been
    cudaGraphExec_t exec = nullptr;  // null: not recorded yet
  };

  /// The shape's graph, moved to the front; the last one makes room for a new one.
  Graph& find(const StepShape& shape);
  /// Null where it cannot be.
  static cudaGraphExec_t record(cudaStream_t stream, const std::function<void()>& ops);

  std::list<Graph> graphs_;  // the most recently used first
  bool can_record_ = true;
};

}  // namespace longspan::cuda
