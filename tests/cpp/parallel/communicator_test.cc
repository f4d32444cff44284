#include "parallel/communicator.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "longspan/error.h"
#include "parallel/launch.h"
#include "parallel/share.h"

namespace longspan {
namespace {

/// A float32 matrix with a gap between its rows.
struct Matrix {
  Matrix(int64_t rows, int64_t cols)
      : values(static_cast<size_t>(rows * (cols + 3)), -7.0f),
        view{values.data(), DType::kF32, rows, cols, cols + 3} {}
  float& at(int64_t row, int64_t col) { return view.row<float>(row)[col]; }
  std::vector<float> values;
  MatrixView view;
};

/// A value of rank r, of very different sizes so that the order of a sum shows.
float value_of(int rank, int64_t row, int64_t col) {
  std::mt19937 random(static_cast<uint32_t>(rank * 1000003 + row * 1009 + col));
  const auto exponent = static_cast<int>(random() % 40) - 20;
  return std::ldexp(static_cast<float>(random() % 2000) - 1000.0f, exponent);
}

/// How the ranks of a group are connected, and whether it survives a failure.
struct Kind {
  int size;
  bool tcp = false;
};

void PrintTo(const Kind& kind, std::ostream* out) {
  *out << (kind.tcp ? "tcp" : "local") << kind.size;
}

class Group : public testing::TestWithParam<Kind> {
 protected:
  /// Runs `work` on every rank, a thread each; what one throws past it is a failure of the test.
  static void run(const std::function<void(Communicator&)>& work) {
    const auto [size, tcp] = GetParam();
    std::vector<std::unique_ptr<Communicator>> ranks(static_cast<size_t>(size));
    if (size == 1) {
      ranks[0] = make_single_communicator();
    } else if (!tcp) {
      ranks = make_local_communicators(size);
    }
    // Tests run beside each other, of process numbers next to each other: 32 ports for each, below
    // those that the system gives to clients.
    static int port = 20000 + getpid() % 390 * 32;
    ++port;
    std::vector<std::thread> threads;
    threads.reserve(ranks.size());
    for (int r = 0; r < size; ++r) {
      threads.emplace_back([&, r, size = size, tcp = tcp] {
        std::unique_ptr<Communicator>& rank = ranks[static_cast<size_t>(r)];
        EXPECT_NO_THROW({
          if (tcp) rank = make_tcp_communicator({.rank = r, .size = size, .port = port}, 20000);
          work(*rank);
        });
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
};

INSTANTIATE_TEST_SUITE_P(Kinds, Group,
                         testing::Values(Kind{1}, Kind{2}, Kind{3}, Kind{4}, Kind{7}, Kind{2, true},
                                         Kind{4, true}));

TEST_P(Group, AllReduceAddsInOrderOfRank) {
  constexpr int64_t kRows = 5;
  const int size = GetParam().size;
  for (const int64_t cols : {1, 6, 200}) {
    run([&](Communicator& ranks) {
      for (int round = 0; round < 6; ++round) {
        Matrix m(kRows, cols);
        for (int64_t i = 0; i < kRows * cols; ++i) {
          m.at(i / cols, i % cols) = value_of(ranks.rank() + round, i / cols, i % cols);
        }
        if (ranks.rank() == round % size) std::this_thread::yield();
        ranks.all_reduce(m.view);
        for (int64_t i = 0; i < kRows * cols; ++i) {
          float sum = 0.0f;
          for (int r = 0; r < size; ++r) sum += value_of(r + round, i / cols, i % cols);
          ASSERT_EQ(m.at(i / cols, i % cols), sum) << size << " " << i;
        }
        for (int64_t row = 0; row < kRows; ++row) ASSERT_EQ(m.view.row<float>(row)[cols], -7.0f);
      }
    });
  }
}

TEST_P(Group, ReduceScatterAddsEachRanksRowsInOrderOfRank) {
  const int size = GetParam().size;
  const int64_t rows = 3 * size;
  for (const int64_t cols : {1, 6, 200}) {
    run([&](Communicator& ranks) {
      for (int round = 0; round < 6; ++round) {
        Matrix m(rows, cols);
        for (int64_t i = 0; i < rows * cols; ++i) {
          m.at(i / cols, i % cols) = value_of(ranks.rank() + round, i / cols, i % cols);
        }
        ranks.reduce_scatter(m.view);
        for (int64_t row = 3 * ranks.rank(); row < 3 * ranks.rank() + 3; ++row) {
          for (int64_t col = 0; col < cols; ++col) {
            float sum = 0.0f;
            for (int r = 0; r < size; ++r) sum += value_of(r + round, row, col);
            ASSERT_EQ(m.at(row, col), sum) << size << " " << row << " " << col;
          }
        }
        for (int64_t row = 0; row < rows; ++row) ASSERT_EQ(m.view.row<float>(row)[cols], -7.0f);
      }
    });
  }
}

TEST_P(Group, AllGatherGivesEachRanksRowsToAll) {
  const int size = GetParam().size;
  const int64_t rows = 3 * size;
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    run([&](Communicator& ranks) {
      constexpr int64_t kCols = 5;
      constexpr int64_t kStride = 8;
      const auto code = [](int64_t row, int64_t byte) {
        return static_cast<std::byte>(row * 31 + byte);
      };
      std::vector<std::byte> bytes(static_cast<size_t>(rows * kStride * size_of(dtype)));
      const MatrixView m = {bytes.data(), dtype, rows, kCols, kStride};
      const int64_t row_bytes = kCols * size_of(dtype);
      for (int64_t row = 3 * ranks.rank(); row < 3 * ranks.rank() + 3; ++row) {
        for (int64_t i = 0; i < row_bytes; ++i) m.row_bytes(row)[i] = code(row, i);
      }
      ranks.all_gather(m);
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = 0; i < row_bytes; ++i) {
          ASSERT_EQ(m.row_bytes(row)[i], code(row, i)) << size << " " << row;
        }
      }
    });
  }
}

TEST_P(Group, AllGatherPutsColumnsSideBySide) {
  const int size = GetParam().size;
  for (const int64_t cols : {7, 97, 128}) {
    run([&](Communicator& ranks) {
      const Share share = share_of(cols, ranks.rank(), size);
      for (int round = 0; round < 6; ++round) {
        Matrix all(3, cols);
        Matrix part(3, share.size());
        Matrix& mine = size == 1 ? all : part;  // one rank has them all in place
        for (int64_t row = 0; row < 3; ++row) {
          for (int64_t i = 0; i < share.size(); ++i) {
            mine.at(row, i) = static_cast<float>(1000 * (row + round) + share.begin + i);
          }
        }
        ranks.all_gather(mine.view, all.view);
        for (int64_t row = 0; row < 3; ++row) {
          for (int64_t i = 0; i < cols; ++i) {
            ASSERT_EQ(all.at(row, i), static_cast<float>(1000 * (row + round) + i));
          }
        }
      }
    });
  }
}

TEST_P(Group, HostMessagesReachAll) {
  const int size = GetParam().size;
  run([&](Communicator& ranks) {
    for (int round = 0; round < 50; ++round) {
      const auto length = static_cast<size_t>(round * 37 % 50);
      std::vector<std::byte> message(ranks.rank() == 0 ? length : 3, std::byte{9});
      if (ranks.rank() == 0) message.assign(length, static_cast<std::byte>(round));
      ranks.broadcast(message);
      ASSERT_EQ(message, std::vector<std::byte>(length, static_cast<std::byte>(round)));
      const int mine[2] = {ranks.rank(), round};
      std::vector<int> all(static_cast<size_t>(2 * size));
      ranks.all_gather(std::as_bytes(std::span(mine)), std::as_writable_bytes(std::span(all)));
      for (int r = 0; r < size; ++r) {
        ASSERT_EQ(all[static_cast<size_t>(2 * r)], r);
        ASSERT_EQ(all[static_cast<size_t>(2 * r + 1)], round);
      }
      const auto length_of = [round](int rank) { return static_cast<size_t>(rank * round % 5); };
      const std::vector<std::byte> own(length_of(ranks.rank()), std::byte{7});
      std::vector<std::vector<std::byte>> of_all(2);
      ranks.gather(own, of_all);
      if (ranks.rank() != 0) continue;
      ASSERT_EQ(std::ssize(of_all), size);
      for (int r = 0; r < size; ++r) {
        ASSERT_EQ(of_all[static_cast<size_t>(r)],
                  std::vector<std::byte>(length_of(r), std::byte{7}));
      }
    }
  });
}

TEST_P(Group, AFailedRankEndsTheOthersAndAllRecover) {
  const int size = GetParam().size;
  if (size == 1) return;
  const bool survives = !GetParam().tcp;
  for (int failing = 0; failing < size; ++failing) {
    std::atomic<int> woken = 0;
    run([&](Communicator& ranks) {
      std::mt19937 random(static_cast<uint32_t>(failing));  // the same on all ranks
      for (int round = 0; round < 8; ++round) {
        const int last = static_cast<int>(random() % 12);  // ops before the failure
        Matrix m(2, 10);
        std::vector<std::byte> message(5);
        try {
          for (int op = 0; op < 20; ++op) {
            if (ranks.rank() == failing && op == last) throw std::runtime_error("injected");
            op % 2 == 0 ? ranks.all_reduce(m.view) : ranks.broadcast(message);
          }
          ADD_FAILURE() << "rank " << ranks.rank() << " ended";
        } catch (const ParallelError& error) {
          const std::string expected =
              "rank " + std::to_string(failing) + " of " + std::to_string(size) + ": injected";
          EXPECT_EQ(error.what(), expected);
          ++woken;
          EXPECT_THROW(ranks.check(), ParallelError);
          EXPECT_THROW(ranks.all_reduce(m.view), ParallelError);
        } catch (const std::runtime_error& error) {
          ranks.fail(error.what());
        }
        EXPECT_EQ(ranks.recover(), survives);
        if (!survives) break;
        EXPECT_NO_THROW(ranks.check());
        m.at(0, 0) = 1.0f;
        ranks.all_reduce(m.view);
        EXPECT_EQ(m.at(0, 0), static_cast<float>(size));
      }
    });
    EXPECT_EQ(woken, (survives ? 8 : 1) * (size - 1));
  }
}

}  // namespace
}  // namespace longspan
