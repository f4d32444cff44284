#include <algorithm>
#include <cstring>

#include "core/check.h"
#include "parallel/communicator.h"
#include "parallel/group_barrier.h"
#include "parallel/share.h"

namespace longspan {
namespace {

/// What the threads of a group show each other between two barriers.
struct LocalGroup {
  explicit LocalGroup(int size) : barrier(size), slots(static_cast<size_t>(size)) {}

  struct Slot {
    MatrixView matrix;
    std::span<const std::byte> bytes;
  };
  GroupBarrier barrier;
  std::vector<Slot> slots;  // [size], each written by its rank
};

class LocalCommunicator final : public Communicator {
 public:
  LocalCommunicator(std::shared_ptr<LocalGroup> group, int rank)
      : group_(std::move(group)), rank_(rank) {}

  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(group_->slots.size()); }

  void all_reduce(const MatrixView& matrix) override {
    own().matrix = matrix;
    group_->barrier.wait();
    // Each rank adds up a share of the columns and hands the sums to all.
    const Share cols = share_of(matrix.cols, rank_, size());
    for (int64_t row = 0; row < matrix.rows; ++row) add_up(row, cols, group_->slots);
    group_->barrier.wait();
  }

  void reduce_scatter(const MatrixView& matrix) override {
    own().matrix = matrix;
    group_->barrier.wait();
    const Share rows = share_of(matrix.rows, rank_, size());
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      add_up(row, {0, matrix.cols}, {&own(), 1});
    }
    group_->barrier.wait();
  }

  void all_gather(const MatrixView& matrix) override {
    own().matrix = matrix;
    group_->barrier.wait();
    const auto row_bytes = static_cast<size_t>(matrix.cols * size_of(matrix.dtype));
    for (int r = 0; r < size(); ++r) {
      if (r == rank_) continue;
      const MatrixView& from = group_->slots[static_cast<size_t>(r)].matrix;
      const Share rows = share_of(matrix.rows, r, size());
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        std::memcpy(matrix.row_bytes(row), from.row_bytes(row), row_bytes);
      }
    }
    group_->barrier.wait();
  }

  void all_gather(const MatrixView& mine, const MatrixView& all) override {
    own().matrix = mine;
    group_->barrier.wait();
    for (int r = 0; r < size(); ++r) {
      const MatrixView& from = group_->slots[static_cast<size_t>(r)].matrix;
      const Share cols = share_of(all.cols, r, size());
      for (int64_t row = 0; row < all.rows; ++row) {
        std::copy_n(from.row<const float>(row), cols.size(), all.row<float>(row) + cols.begin);
      }
    }
    group_->barrier.wait();
  }

  void broadcast(std::vector<std::byte>& message) override {
    if (rank_ == 0) own().bytes = message;
    group_->barrier.wait();
    const std::span<const std::byte> sent = group_->slots.front().bytes;
    if (rank_ != 0) message.assign(sent.begin(), sent.end());
    group_->barrier.wait();
  }

  void all_gather(std::span<const std::byte> mine, std::span<std::byte> all) override {
    own().bytes = mine;
    group_->barrier.wait();
    auto to = all.begin();
    for (const LocalGroup::Slot& slot : group_->slots) {
      to = std::copy(slot.bytes.begin(), slot.bytes.end(), to);
    }
    group_->barrier.wait();
  }

  void gather(std::span<const std::byte> mine, std::vector<std::vector<std::byte>>& all) override {
    own().bytes = mine;
    group_->barrier.wait();
    if (rank_ == 0) {
      all.clear();
      for (const LocalGroup::Slot& slot : group_->slots) {
        all.emplace_back(slot.bytes.begin(), slot.bytes.end());
      }
    }
    group_->barrier.wait();
  }

  void check() override { group_->barrier.check(); }

  void fail(const std::string& why) override {
    group_->barrier.fail(message("rank ", rank_, " of ", size(), ": ", why));
  }

  bool recover() override {
    group_->barrier.recover();
    return true;
  }

 private:
  LocalGroup::Slot& own() { return group_->slots[static_cast<size_t>(rank_)]; }

  /// Gives the sums over the ranks of these columns of a row to those of `to`.
  void add_up(int64_t row, Share cols, std::span<const LocalGroup::Slot> to) {
    // Columns of a row at a time, so that the sums stay in registers.
    constexpr int64_t kCols = 64;
    for (int64_t col = cols.begin; col < cols.end; col += kCols) {
      const int64_t count = std::min(kCols, cols.end - col);
      float sums[kCols] = {};
      for (const LocalGroup::Slot& slot : group_->slots) {
        const float* from = slot.matrix.row<const float>(row) + col;
        for (int64_t i = 0; i < count; ++i) sums[i] += from[i];
      }
      for (const LocalGroup::Slot& slot : to) {
        std::copy_n(sums, count, slot.matrix.row<float>(row) + col);
      }
    }
  }

  const std::shared_ptr<LocalGroup> group_;
  const int rank_;
};

}  // namespace

std::vector<std::unique_ptr<Communicator>> make_local_communicators(int size) {
  const auto group = std::make_shared<LocalGroup>(size);
  std::vector<std::unique_ptr<Communicator>> ranks;
  ranks.reserve(static_cast<size_t>(size));
  for (int rank = 0; rank < size; ++rank) {
    ranks.push_back(std::make_unique<LocalCommunicator>(group, rank));
  }
  return ranks;
}

}  // namespace longspan
