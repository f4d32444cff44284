#include "backend/cuda/step_graphs.h"

#include <algorithm>
#include <exception>

#include "backend/cuda/cuda_check.h"

namespace longspan::cuda {
namespace {

/// As many as a batch that comes and goes has sizes for a while; each takes a few hundred KiB.
constexpr size_t kMostGraphs = 64;

void destroy(cudaGraphExec_t exec) {
  if (exec != nullptr) cudaGraphExecDestroy(exec);
}

}  // namespace

StepGraphs::~StepGraphs() {
  for (const Graph& graph : graphs_) destroy(graph.exec);
}

StepGraphs::Graph& StepGraphs::find(const StepShape& shape) {
  const auto found = std::find_if(graphs_.begin(), graphs_.end(),
                                  [&](const Graph& graph) { return graph.shape == shape; });
  if (found != graphs_.end()) {
    graphs_.splice(graphs_.begin(), graphs_, found);
    return graphs_.front();
  }
  if (graphs_.size() == kMostGraphs) {
    destroy(graphs_.back().exec);  // when it has ended, if it still runs
    graphs_.pop_back();
  }
  return graphs_.emplace_front(Graph{.shape = shape});
}

cudaGraphExec_t StepGraphs::record(cudaStream_t stream, const std::function<void()>& ops) {
  if (cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed) != cudaSuccess) return nullptr;
  std::exception_ptr refused;
  try {
    ops();
  } catch (...) {  // what is refused while recording may work without
    refused = std::current_exception();
  }
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  const bool recorded = cudaStreamEndCapture(stream, &graph) == cudaSuccess && !refused &&
                        cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess;
  if (graph != nullptr) cudaGraphDestroy(graph);
  return recorded ? exec : nullptr;
}

void StepGraphs::run(const StepShape& shape, cudaStream_t stream,
                     const std::function<void()>& ops) {
  if (!can_record_) return ops();
  Graph& graph = find(shape);
  if (graph.exec == nullptr && graph.seen) {
    graph.exec = record(stream, ops);
    can_record_ = graph.exec != nullptr;
    cudaGetLastError();  // of what was refused
  }
  graph.seen = true;
  if (graph.exec == nullptr) return ops();
  check_cuda(cudaGraphLaunch(graph.exec, stream), "launching a step");
}

}  // namespace longspan::cuda
