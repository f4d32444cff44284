#pragma once

#include <memory>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "engine/rank_group.h"
#include "longspan/config.h"
#include "longspan/plan.h"
#include "parallel/launch.h"

namespace longspan {

/// Makes a group of this process's backends. Ranks without weights yet.
std::vector<Rank> connect_ranks(std::vector<std::unique_ptr<Backend>> backends);

/// The same for this process's only rank, of the group that a launcher started.
std::vector<Rank> connect_launched(const Launch& launch, const EngineConfig& config);

/// Bytes that each rank may plan with: what the devices of all have free, shared where
/// ranks share memory.
int64_t bytes_per_rank(const std::vector<Rank>& ranks);

/// Gives each rank its share of the weights and of the cache, all at once.
/// config: resolved; plan: of one rank. Throws what the first rank that failed threw, and
/// ParallelError where that is of another process.
void load_ranks(const ModelConfig& model, const EngineConfig& config, const MemoryPlan& plan,
                const Checkpoint& checkpoint, const WeightProgress& progress,
                std::vector<Rank>& ranks);

}  // namespace longspan
