#include "engine/context_io.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "core/check.h"

namespace longspan {
namespace {

/// What is moved while the engine waits: some milliseconds' worth.
constexpr int64_t kBytesAtOnce = int64_t{32} << 20;

using Rows = std::vector<std::byte>;

/// Blocks of a context that are open, until this goes.
class OpenContext {
 public:
  OpenContext(const ContextIo& io, int64_t id) : io_(io), id_(id) {}
  ~OpenContext() {
    try {
      io_.on_engine([this] { io_.blocks.release(id_); });
    } catch (const EngineClosed&) {  // on purpose: with the engine went the blocks
    }
  }
  OpenContext(const OpenContext&) = delete;
  OpenContext& operator=(const OpenContext&) = delete;
  int64_t id() const { return id_; }

 private:
  const ContextIo& io_;
  const int64_t id_;
};

/// A part of a context: a whole block or the last one.
struct Piece {
  int64_t index = 0;  ///< of the block
  int64_t first = 0;  ///< token
  int64_t tokens = 0;
};

/// Calls move(pieces) for the blocks from first_block on, a few at a time, and reports.
template <class Move>
void for_each_few(const ContextIo& io, int64_t first_block, ContextProgress progress,
                  const ContextCallback& on_progress, const Move& move) {
  const int64_t few =
      std::max<int64_t>(1, kBytesAtOnce / std::max<int64_t>(1, io.rows.bytes() * io.block_len));
  const int64_t blocks = blocks_for(progress.total, io.block_len);
  for (int64_t begin = first_block; begin < blocks; begin += few) {
    std::vector<Piece> pieces;
    for (int64_t index = begin; index < std::min(begin + few, blocks); ++index) {
      const int64_t first = index * io.block_len;
      pieces.push_back({index, first, std::min(io.block_len, progress.total - first)});
    }
    move(pieces);
    progress.moved = pieces.back().first + pieces.back().tokens;
    if (on_progress) on_progress(progress);
  }
}

KvRows rows_of(const KvRows& like, int64_t tokens) { return {like.shape(), like.dtype(), tokens}; }

/// Frequencies and factors that a libm or a compiler rounds otherwise are the same: 1e-12 of an
/// angle of a million radians is a microradian.
bool is_near(double a, double b) { return std::abs(a - b) <= 1e-12 * std::abs(b); }

/// The model's profile of the length that the file says; throws where it is another one.
RopeProfile profile_of(const RopeMethod& rope, const RopeProfile& saved, const std::string& path) {
  RopeProfile own = rope.profile(saved.length);
  const auto expect = [&](bool same, const char* field, const auto& want, const auto& got) {
    require<CheckpointError>(same, path, ": rope.", field, ": expected ", want,
                             ", as the model has for ", saved.length, " tokens, got ", got);
  };
  expect(saved.inv_freq.size() == own.inv_freq.size(), "inv_freq", own.inv_freq.size(),
         saved.inv_freq.size());
  for (size_t i = 0; i < own.inv_freq.size(); ++i) {
    expect(is_near(saved.inv_freq[i], own.inv_freq[i]), "inv_freq", own.inv_freq[i],
           saved.inv_freq[i]);
  }
  expect(is_near(saved.attention_factor, own.attention_factor), "attention_factor",
         own.attention_factor, saved.attention_factor);
  expect(saved.logn_length == own.logn_length, "logn_length", own.logn_length, saved.logn_length);
  return own;
}

void check_ids(const std::vector<int32_t>& ids, int64_t vocab_size, const std::string& path) {
  for (size_t i = 0; i < ids.size(); ++i) {
    require<CheckpointError>(ids[i] >= 0 && ids[i] < vocab_size, path, ": token_ids[", i,
                             "]: expected a token id in [0, ", vocab_size, "), got ", ids[i]);
  }
}

}  // namespace

void save_context(const ContextIo& io, Context& context, const std::string& path,
                  const std::function<void()>& compute, const ContextCallback& on_progress) {
  const int64_t tokens = std::ssize(context.token_ids);
  ContextWriter writer(path, {io.model, context.token_ids, context.rope_profile},
                       rows_of(io.rows, tokens));
  compute();
  int64_t id = 0;
  io.on_engine([&] { id = io.blocks.hold(context); });
  const OpenContext open(io, id);
  const ContextProgress begin = {.computed = tokens, .moved = 0, .total = tokens};
  std::vector<Rows> buffers;
  for_each_few(io, 0, begin, on_progress, [&](const std::vector<Piece>& pieces) {
    buffers.resize(pieces.size());
    for (size_t i = 0; i < pieces.size(); ++i) {
      buffers[i].resize(static_cast<size_t>(rows_of(io.rows, pieces[i].tokens).bytes()));
    }
    io.on_engine([&] {
      for (size_t i = 0; i < pieces.size(); ++i) {
        io.blocks.read(id, pieces[i].index, pieces[i].tokens, buffers[i]);
      }
    });
    for (size_t i = 0; i < pieces.size(); ++i) {
      const KvRows rows = rows_of(io.rows, pieces[i].tokens);
      require<NumericalError>(is_finite(rows, buffers[i]),
                              "save_context: expected finite keys and ",
                              "values, got NaN or infinity among tokens ", pieces[i].first, " to ",
                              pieces[i].first + pieces[i].tokens - 1);
      writer.write(pieces[i].first, rows, buffers[i]);
    }
  });
  writer.finish();
  context.file_bytes = writer.bytes();
}

Context load_context(const ContextIo& io, const std::string& path, const RopeMethod& rope,
                     int64_t vocab_size, const ContextCheck& check,
                     const ContextCallback& on_progress) {
  const ContextFile file(path, io.rows.shape());
  const ContextFacts& facts = file.facts();
  require<CheckpointError>(facts.model == io.model, path, ": model: expected \"", io.model,
                           "\", the fingerprint of the model that is loaded, got \"", facts.model,
                           "\"");
  check_ids(facts.token_ids, vocab_size, path);
  const Context context = {facts.token_ids, profile_of(rope, facts.profile, path), file.bytes()};
  const int64_t tokens = std::ssize(context.token_ids);
  check(context, file);

  ContextBlocks::Room room;
  io.on_engine([&] { room = io.blocks.take(context); });
  const OpenContext open(io, room.id);
  Rows saved;
  std::vector<Rows> buffers;
  const ContextProgress begin = {.computed = 0, .moved = 0, .total = tokens};
  for_each_few(io, room.known_blocks, begin, on_progress, [&](const std::vector<Piece>& pieces) {
    buffers.resize(pieces.size());
    for (size_t i = 0; i < pieces.size(); ++i) {
      const KvRows from = file.rows(pieces[i].tokens);
      const KvRows to = rows_of(io.rows, pieces[i].tokens);
      saved.resize(static_cast<size_t>(from.bytes()));
      buffers[i].resize(static_cast<size_t>(to.bytes()));
      file.read(pieces[i].first, from, saved);
      convert_kv_rows(from, saved, to, buffers[i]);
    }
    io.on_engine([&] {
      for (size_t i = 0; i < pieces.size(); ++i) {
        io.blocks.write(room.id, pieces[i].index, pieces[i].tokens, buffers[i]);
      }
    });
  });
  io.on_engine([&] { io.blocks.publish(room.id); });
  return context;
}

}  // namespace longspan
