#include "engine/context_checkpoints.h"

#include <unistd.h>

#include <algorithm>

#include "core/check.h"
#include "engine/context_file.h"

namespace longspan {
namespace {

/// Whether a file can be gone on from with the same bits as if nothing had ended.
void check_beginning(const ContextIo& io, const Context& whole, const Context& saved,
                     const ContextFile& file, const std::string& path) {
  const auto expect = [&](bool same, const char* field, const char* what) {
    require<CheckpointError>(same, path, ": ", field, ": expected ", what,
                             ", to go on from there, got another; remove the file or name another");
  };
  const std::vector<int32_t>& ids = saved.token_ids;
  expect(ids.size() <= whole.token_ids.size() &&
             std::equal(ids.begin(), ids.end(), whole.token_ids.begin()),
         "token_ids", "a beginning of the context that is to be saved");
  const RopeProfile& a = saved.rope_profile;
  const RopeProfile& b = whole.rope_profile;
  expect(a.inv_freq == b.inv_freq && a.attention_factor == b.attention_factor &&
             a.logn_length == b.logn_length,
         "rope", "the RoPE profile of that context");
  const KvRows rows = file.rows(1);
  const KvFormat format = rows.shape().format;
  expect(format == io.rows.shape().format &&
             (format != KvFormat::kNative || rows.dtype() == io.rows.dtype()),
         "kv_cache_dtype", "the format of this engine's cache");
}

}  // namespace

void save_with_checkpoints(const ContextIo& io, Context& context, const std::string& path,
                           int64_t interval, const RopeMethod& rope, int64_t vocab_size,
                           const ComputePrefix& compute, const ContextCallback& on_progress) {
  const auto total = static_cast<int64_t>(context.token_ids.size());
  const auto report = [&](int64_t computed) {
    if (on_progress) on_progress({.computed = computed, .moved = 0, .total = total});
  };
  const auto compute_to = [&](int64_t end) {
    compute(end, [&](const Progress& progress) { report(progress.prefill_done); });
  };
  int64_t done = 0;
  if (interval > 0 && access(path.c_str(), F_OK) == 0) {
    const Context saved = load_context(
        io, path, rope, vocab_size,
        [&](const Context& found, const ContextFile& file) {
          check_beginning(io, context, found, file, path);
        },
        [&](const ContextProgress& progress) { report(progress.moved); });
    done = static_cast<int64_t>(saved.token_ids.size());
    context.file_bytes = saved.file_bytes;
    if (done == total) {
      if (on_progress) on_progress({.computed = total, .moved = total, .total = total});
      return;
    }
  }
  const auto after = [&](int64_t end) {
    return interval > 0 ? (end / interval + 1) * interval : total;
  };
  for (int64_t end = after(done); end < total; end = after(end)) {
    Context part = context;
    part.token_ids.resize(static_cast<size_t>(end));
    save_context(
        io, part, path, [&] { compute_to(end); }, [&](const ContextProgress&) { report(end); });
  }
  save_context(io, context, path, [&] { compute_to(total); }, on_progress);
}

}  // namespace longspan
