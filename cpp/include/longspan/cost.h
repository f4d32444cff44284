#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "longspan/config.h"
#include "longspan/export.h"
#include "longspan/plan.h"

namespace longspan {

/// A figure that costs are computed from, and where it is from.
struct CostTerm {
  std::string name;
  double value = 0;
  std::string unit;    ///< "FLOP/s", "B/s", "s" or "share"
  std::string source;  ///< the record or page it was read from; "assumed: ..." where none was
};

/// The machines that ranks are dealt to, the first gpus_per_host of them to the first.
struct Cluster {
  int gpus_per_host = 8;   ///< >= 1, which reach each other through NVLink
  double link_gbps = 400;  ///< > 0: of each GPU to other hosts, Gbit/s in each direction
};

/// Seconds of a prefill or of a decode step, by what they go to.
struct LONGSPAN_API CostParts {
  double products = 0;   ///< linear layers; in decode, reading their weights
  double attention = 0;  ///< in decode, reading keys and values
  double rows = 0;       ///< norms, rotation, SiLU and what else the small kernels of a layer take
  double ranks = 0;      ///< sums and gathers between ranks

  double total() const { return products + attention + rows + ranks; }
  /// The name of the largest part.
  std::string limit() const;
};

/// What a model would take on GPUs that need not be there.
struct CostPrediction {
  MemoryPlan memory;  ///< of the rank that has the most
  CostParts prefill;  ///< of one prompt of memory.session_len tokens, alone
  CostParts decode;   ///< of a token of each sequence, each after memory.session_len tokens
  std::vector<CostTerm> terms;  ///< every figure the prediction stands on
};

/// Predicts from measurements of one GPU and of links, without loading weights. config.device: a
/// GPU that was measured, "h100" or "h200"; config.tp: how many of them. sequences, >= 1: that
/// decode together. Throws as plan_memory, and Unsupported for another device.
LONGSPAN_API CostPrediction predict_cost(const std::string& model_dir, const EngineConfig& config,
                                         const Cluster& cluster = {}, int64_t sequences = 1);

}  // namespace longspan
