#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "engine/context_blocks.h"
#include "engine/context_file.h"
#include "longspan/context.h"
#include "rope/rope_method.h"

namespace longspan {

/// Has the engine's thread do something between two steps, and waits for it; throws what it threw,
/// or EngineClosed.
using OnEngine = std::function<void(const std::function<void()>& work)>;

/// What saving and loading contexts need of an engine, whose thread goes on with requests between
/// the few blocks that are moved at a time. Files are read and written in the caller's thread.
struct ContextIo {
  OnEngine on_engine;
  ContextBlocks& blocks;  ///< on_engine alone
  std::string model;      ///< fingerprint()
  KvRows rows;            ///< of a token: RankGroup::kv_rows(1)
  int64_t block_len = 0;  ///< tokens of a sequence in a block, of all ranks
};

/// Writes a context whose keys and values compute() brings into the prefix cache; it is called when
/// it is known that the file can be written. Sets file_bytes. Throws CheckpointError, CapacityError
/// and NumericalError.
void save_context(const ContextIo& io, Context& context, const std::string& path,
                  const std::function<void()>& compute, const ContextCallback& on_progress);

/// Called with what a file holds before any work; may throw.
using ContextCheck = std::function<void(const Context& context, const ContextFile& file)>;

/// Reads a context into the prefix cache.
/// Throws CheckpointError and CapacityError.
Context load_context(const ContextIo& io, const std::string& path, const RopeMethod& rope,
                     int64_t vocab_size, const ContextCheck& check,
                     const ContextCallback& on_progress);

}  // namespace longspan
