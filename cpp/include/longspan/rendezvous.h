#pragma once

#include <functional>
#include <string>
#include <vector>

#include "longspan/export.h"

namespace longspan {

/// One step of the way on which ranks come together, as this one saw it.
struct RendezvousStep {
  std::string name;
  bool ok = false;
  std::string found;  ///< what it came to; where it failed, the rank that did and why
  double seconds = 0;
};

struct Rendezvous {
  int rank = 0;
  int size = 1;  ///< 1: no launcher started this process beside others, and nothing was done
  std::vector<RendezvousStep> steps;  ///< up to the first that failed, or all

  bool ok() const { return steps.empty() || steps.back().ok; }
};

/// What the processes of a launcher do before they are the ranks of an engine, without a model:
/// all meet at rank 0, say where they run, take their devices, connect these and add up numbers,
/// first in host memory, then in the devices'. Every process calls it; each learns which rank
/// failed. device: as EngineConfig's. timeout_s, in [1, 3600]: how long ranks may take to come, and
/// rank 0 waits for each in a step; of what devices do among themselves it knows no end.
/// begins: called with this rank and the name of each step before it.
/// Throws InvalidArgument for a launcher's variable that is out of range.
LONGSPAN_API Rendezvous
check_rendezvous(const std::string& device = "auto", int timeout_s = 60,
                 const std::function<void(int rank, const std::string& step)>& begins = {});

}  // namespace longspan
