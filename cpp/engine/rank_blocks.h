#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "backend/kv_rows.h"

namespace longspan {

struct Rank;

// Keys and values of a block between the ranks that have its heads and rank 0, which has them all
// for the moment.

/// Rows of all heads of the model, as a rank's backend holds them.
KvRows whole_rows(const Rank& rank, int64_t tokens);

/// Rank 0: what every rank has of a block. rows: whole_rows().
void collect_block(Rank& rank, int32_t block, int64_t tokens, std::span<std::byte> rows);
/// The others' part in it.
void send_block(Rank& rank, int32_t block, int64_t tokens);

/// Rank 0: gives every rank, itself among them, what is its own of a block. rows: whole_rows().
void hand_out_block(Rank& rank, int32_t block, int64_t tokens, std::vector<std::byte>& rows);
/// The others' part in it.
void receive_block(Rank& rank, int32_t block, int64_t tokens);

}  // namespace longspan
