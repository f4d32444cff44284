#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "backend/step.h"

namespace longspan {

/// What rank 0 tells the others to do with it; as bytes, it goes to other processes as well.
struct RankCommand {
  enum class Kind : uint8_t {
    kForward,
    kLogits,
    kScore,
    kCopyBlock,
    kExportBlock,
    kImportBlock,
    kStop
  };

  Kind kind = Kind::kStop;
  StepInput step = {};                ///< kForward
  bool cache_only = false;            ///< kForward
  std::vector<int64_t> rows = {};     ///< kLogits, kScore: of the last forward
  std::vector<int32_t> targets = {};  ///< kScore: [rows.size()]
  int32_t from = 0;                   ///< kCopyBlock, kExportBlock: see Backend
  int32_t to = 0;                     ///< kCopyBlock, kImportBlock
  int64_t tokens = 0;                 ///< of the block

  std::vector<std::byte> to_bytes() const;
  /// Throws ParallelError for bytes that are no command.
  static RankCommand from_bytes(std::span<const std::byte> bytes);
};

}  // namespace longspan
