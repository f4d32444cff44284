#include "engine/rank_command.h"

#include <algorithm>
#include <type_traits>

#include "core/check.h"

namespace longspan {
namespace {

/// Appends values as they lie in memory; the ranks run the same build.
class Writer {
 public:
  template <class T>
  void operator()(const T& value) {
    static_assert(std::is_trivially_copyable_v<T>);
    append(std::as_bytes(std::span(&value, 1)));
  }
  template <class T>
  void operator()(const std::vector<T>& values) {
    (*this)(values.size());
    if constexpr (std::is_trivially_copyable_v<T>) {
      append(std::as_bytes(std::span(values)));
    } else {
      for (const T& value : values) (*this)(value);
    }
  }
  void operator()(const std::shared_ptr<const RopeProfile>& profile) {
    // Of a profile a step reads no more than these.
    (*this)(profile->inv_freq);
    (*this)(profile->attention_factor);
    (*this)(profile->logn_length);
  }
  std::vector<std::byte> take() { return std::move(bytes_); }

 private:
  void append(std::span<const std::byte> bytes) {
    bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
  }
  std::vector<std::byte> bytes_;
};

/// Reads them back.
class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) : rest_(bytes) {}
  template <class T>
  void operator()(T& value) {
    static_assert(std::is_trivially_copyable_v<T>);
    copy(std::as_writable_bytes(std::span(&value, 1)));
  }
  template <class T>
  void operator()(std::vector<T>& values) {
    size_t count = 0;
    (*this)(count);
    require<ParallelError>(count <= rest_.size(), "message of rank 0: expected ", count,
                           " more values, got ", rest_.size(), " bytes");
    values.resize(count);
    if constexpr (std::is_trivially_copyable_v<T>) {
      copy(std::as_writable_bytes(std::span(values)));
    } else {
      for (T& value : values) (*this)(value);
    }
  }
  void operator()(std::shared_ptr<const RopeProfile>& profile) {
    auto read = std::make_shared<RopeProfile>();
    (*this)(read->inv_freq);
    (*this)(read->attention_factor);
    (*this)(read->logn_length);
    profile = std::move(read);
  }

 private:
  void copy(std::span<std::byte> out) {
    require<ParallelError>(out.size() <= rest_.size(), "message of rank 0: expected ", out.size(),
                           " more bytes, got ", rest_.size());
    std::copy_n(rest_.begin(), out.size(), out.begin());
    rest_ = rest_.subspan(out.size());
  }
  std::span<const std::byte> rest_;
};

/// The one list of what a command holds.
template <class Command, class Visit>
void for_each_field(Command& command, Visit& visit) {
  visit(command.kind);
  visit(command.step.token_ids);
  visit(command.step.cu_seqlens);
  visit(command.step.first_position);
  visit(command.step.block_tables);
  visit(command.step.profiles);
  visit(command.cache_only);
  visit(command.rows);
  visit(command.targets);
  visit(command.from);
  visit(command.to);
  visit(command.tokens);
}

}  // namespace

std::vector<std::byte> RankCommand::to_bytes() const {
  Writer writer;
  for_each_field(*this, writer);
  return writer.take();
}

RankCommand RankCommand::from_bytes(std::span<const std::byte> bytes) {
  RankCommand command;
  Reader reader(bytes);
  for_each_field(command, reader);
  return command;
}

}  // namespace longspan
