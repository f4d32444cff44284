#include "model/row_split.h"

#include <gtest/gtest.h>

#include <vector>

namespace longspan {
namespace {

/// One rank of a group, which says what was asked of it.
class FakeRank final : public Communicator {
 public:
  FakeRank(int rank, int size) : rank_(rank), size_(size) {}
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  void all_reduce(const MatrixView& m) override { ops.emplace_back("reduce"), rows = m.rows; }
  void reduce_scatter(const MatrixView& m) override { ops.emplace_back("scatter"), rows = m.rows; }
  void all_gather(const MatrixView& m) override { ops.emplace_back("gather"), rows = m.rows; }
  void all_gather(const MatrixView&, const MatrixView&) override {}
  void broadcast(std::vector<std::byte>&) override {}
  void all_gather(std::span<const std::byte>, std::span<std::byte>) override {}
  void gather(std::span<const std::byte>, std::vector<std::vector<std::byte>>&) override {}
  void check() override {}
  void fail(const std::string&) override {}
  bool recover() override { return true; }

  std::vector<std::string> ops;
  int64_t rows = 0;  ///< of the last op

 private:
  int rank_;
  int size_;
};

/// A matrix for steps of up to `rows`, whose rows hold nothing.
struct Whole {
  Whole(int64_t rows, int64_t ranks)
      : values(static_cast<size_t>(RowSplit::capacity(rows, ranks))),
        view{values.data(), DType::kF32, std::ssize(values), 1, 1} {}
  std::vector<float> values;
  MatrixView view;
};

TEST(RowSplit, EveryRowOfALongStepIsWithOneRank) {
  for (const int size : {2, 3, 7, 300}) {
    for (const int64_t rows : {256, 257, 300, 1000}) {
      const Whole m(rows, size);
      int64_t next = 0;
      for (int rank = 0; rank < size; ++rank) {
        FakeRank communicator(rank, size);
        const RowSplit split(communicator, rows);
        const MatrixView own = split.own(m.view);
        EXPECT_EQ(own.row<float>(0), m.view.row<float>(next));
        next += own.rows;
        split.sum(m.view);
        split.gather(m.view);
        EXPECT_EQ(communicator.ops, (std::vector<std::string>{"scatter", "gather"}));
        EXPECT_EQ(communicator.rows, m.view.rows);
        EXPECT_EQ(communicator.rows % size, 0);
      }
      EXPECT_EQ(next, rows) << size;
    }
  }
}

TEST(RowSplit, RowsOfAShortStepAndOfOneRankAreWithAll) {
  const std::pair<int, int64_t> cases[] = {{4, 255}, {4, 1}, {1, 1000}};
  for (const auto& [size, rows] : cases) {
    const Whole m(1000, size);
    FakeRank communicator(size - 1, size);
    const RowSplit split(communicator, rows);
    EXPECT_EQ(split.own(m.view).data, m.view.data);
    EXPECT_EQ(split.own(m.view).rows, rows);
    split.sum(m.view);
    split.gather(m.view);
    EXPECT_EQ(communicator.ops, std::vector<std::string>{"reduce"});
    EXPECT_EQ(communicator.rows, rows);
  }
}

}  // namespace
}  // namespace longspan
