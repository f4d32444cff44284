#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "core/check.h"
#include "parallel/communicator.h"
#include "parallel/launch.h"
#include "parallel/share.h"
#include "parallel/socket.h"

namespace longspan {
namespace {

using Clock = std::chrono::steady_clock;

/// What a rank says of itself when it calls.
struct Hello {
  int32_t rank = 0;
  int32_t size = 0;
};

/// Every rank has a connection to rank 0, through which all goes.
class TcpCommunicator final : public Communicator {
 public:
  TcpCommunicator(const Launch& launch, int timeout_ms)
      : rank_(launch.rank), peers_(static_cast<size_t>(launch.size)) {
    if (rank_ == 0) {
      try {
        welcome(launch, timeout_ms);
      } catch (const std::exception& error) {
        for_each_other([&](const Socket& came) { came.send_failure(error.what()); });
        throw;
      }
    } else {
      peers_[0] = Socket(connect_to(launch.address, launch.port, timeout_ms), "rank 0");
      const Hello hello = {launch.rank, launch.size};
      peers_[0].send(std::as_bytes(std::span(&hello, 1)));
    }
    if (launch.answer_ms > 0) {
      // Rank 0 is the first to give up, since it alone knows for whom all wait.
      const int limit = rank_ == 0 ? launch.answer_ms : 2 * launch.answer_ms;
      for (const Socket& peer : peers_) peer.give_up_after(limit);
    }
    std::vector<std::byte> all_here;
    broadcast(all_here);
  }

  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(peers_.size()); }

  void all_reduce(const MatrixView& matrix) override {
    guarded([&] {
      std::vector<float> sums = packed(matrix);
      add_up(sums);
      share(std::as_writable_bytes(std::span(sums)));
      unpack(sums, matrix);
    });
  }

  void reduce_scatter(const MatrixView& matrix) override {
    guarded([&] {
      std::vector<float> sums = packed(matrix);
      add_up(sums);
      deal_out(std::as_writable_bytes(std::span(sums)));
      unpack(sums, matrix);
    });
  }

  void all_gather(const MatrixView& matrix) override {
    guarded([&] {
      const auto row_bytes = static_cast<size_t>(matrix.cols * size_of(matrix.dtype));
      std::vector<std::byte> whole(static_cast<size_t>(matrix.rows) * row_bytes);
      const auto each_row = [&](Share rows, const auto& visit) {
        for (int64_t row = rows.begin; row < rows.end; ++row) {
          visit(matrix.row_bytes(row), whole.data() + static_cast<size_t>(row) * row_bytes);
        }
      };
      each_row(share_of(matrix.rows, rank_, size()),
               [&](const std::byte* from, std::byte* to) { std::memcpy(to, from, row_bytes); });
      collect(whole);
      share(whole);
      each_row({0, matrix.rows},
               [&](std::byte* to, const std::byte* from) { std::memcpy(to, from, row_bytes); });
    });
  }

  void all_gather(const MatrixView& mine, const MatrixView& all) override {
    guarded([&] {
      std::vector<float> whole(static_cast<size_t>(all.rows * all.cols));  // [size][rows][share]
      const auto piece = [&](int r) {
        const Share cols = share_of(all.cols, r, size());
        return std::span(whole).subspan(static_cast<size_t>(cols.begin * all.rows),
                                        static_cast<size_t>(cols.size() * all.rows));
      };
      std::ranges::copy(packed(mine), piece(rank_).begin());
      if (rank_ == 0) {
        for (int r = 1; r < size(); ++r) {
          peers_[static_cast<size_t>(r)].receive(std::as_writable_bytes(piece(r)));
        }
      } else {
        peers_[0].send(std::as_bytes(piece(rank_)));
      }
      share(std::as_writable_bytes(std::span(whole)));
      for (int r = 0; r < size(); ++r) {
        const Share cols = share_of(all.cols, r, size());
        const float* from = piece(r).data();
        for (int64_t row = 0; row < all.rows; ++row, from += cols.size()) {
          std::copy_n(from, cols.size(), all.row<float>(row) + cols.begin);
        }
      }
    });
  }

  void broadcast(std::vector<std::byte>& message) override {
    guarded([&] {
      if (rank_ == 0) {
        for_each_other([&](const Socket& peer) { peer.send(message); });
      } else {
        message = peers_[0].receive();
      }
    });
  }

  void all_gather(std::span<const std::byte> mine, std::span<std::byte> all) override {
    guarded([&] {
      std::ranges::copy(mine, part(all, rank_).begin());
      collect(all);
      share(all);
    });
  }

  void gather(std::span<const std::byte> mine, std::vector<std::vector<std::byte>>& all) override {
    guarded([&] {
      if (rank_ != 0) return peers_[0].send(mine);
      all.assign(1, {mine.begin(), mine.end()});
      for_each_other([&](const Socket& peer) { all.push_back(peer.receive()); });
    });
  }

  void check() override {
    guarded([&] {
      if (rank_ == 0) {
        for_each_other([](const Socket& peer) { peer.check(); });
      } else {
        peers_[0].check();
      }
    });
  }

  void fail(const std::string& why) override {
    if (!failure_.empty()) return;
    failure_ = message("rank ", rank_, " of ", size(), ": ", why);
    for (const Socket& peer : peers_) peer.send_failure(failure_);
  }

  bool recover() override {
    for (Socket& peer : peers_) peer.close();
    return false;
  }

 private:
  void welcome(const Launch& launch, int timeout_ms) {
    const Listener listener(launch.address, launch.port);
    const auto end = Clock::now() + std::chrono::milliseconds(timeout_ms);
    for (int missing = size() - 1; missing > 0;) {
      const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now());
      const int fd = listener.accept(std::max(0, static_cast<int>(left.count())));
      require<ParallelError>(fd >= 0, "rank 0: expected ", size(), " ranks at ", launch.address,
                             ":", launch.port, " within ", timeout_ms / 1000, " s, without ",
                             absent());
      Socket caller(fd, "a caller");
      Hello hello;
      caller.receive(std::as_writable_bytes(std::span(&hello, 1)));
      require<ParallelError>(hello.size == size() && hello.rank > 0 && hello.rank < size(),
                             "rank 0: expected ranks of a group of ", size(), ", got rank ",
                             hello.rank, " of ", hello.size);
      caller.rename(message("rank ", hello.rank));
      peers_[static_cast<size_t>(hello.rank)] = std::move(caller);
      --missing;
    }
  }

  /// Ranks that have not called yet.
  std::string absent() const {
    std::string ranks;
    for (int r = 1; r < size(); ++r) {
      const bool here = peers_[static_cast<size_t>(r)].is_open();
      if (!here) ranks += message(ranks.empty() ? "rank " : ", ", r);
    }
    return ranks;
  }

  /// Does an op; its failure, of which rank 0 tells the others, is that of every op to come.
  template <class Op>
  void guarded(const Op& op) {
    if (!failure_.empty()) throw ParallelError(failure_);
    try {
      op();
    } catch (const ParallelError& error) {
      failure_ = error.what();
      if (rank_ == 0) for_each_other([&](const Socket& peer) { peer.send_failure(failure_); });
      throw;
    }
  }

  template <class Visit>
  void for_each_other(const Visit& visit) const {
    for (size_t r = 1; r < peers_.size(); ++r) visit(peers_[r]);
  }

  /// Rank r's part of what has one of the same size for every rank.
  std::span<std::byte> part(std::span<std::byte> all, int r) const {
    const size_t each = all.size() / peers_.size();
    return all.subspan(static_cast<size_t>(r) * each, each);
  }

  /// Brings every rank's part to rank 0.
  void collect(std::span<std::byte> all) const {
    if (rank_ != 0) return peers_[0].send(part(all, rank_));
    for (int r = 1; r < size(); ++r) peers_[static_cast<size_t>(r)].receive(part(all, r));
  }

  /// Gives every rank its part of what rank 0 has.
  void deal_out(std::span<std::byte> all) const {
    if (rank_ != 0) return peers_[0].receive(part(all, rank_));
    for (int r = 1; r < size(); ++r) peers_[static_cast<size_t>(r)].send(part(all, r));
  }

  /// Adds up on rank 0 what all have.
  void add_up(std::vector<float>& values) const {
    if (rank_ != 0) return peers_[0].send(std::as_bytes(std::span(values)));
    std::vector<float> theirs(values.size());
    for_each_other([&](const Socket& peer) {
      peer.receive(std::as_writable_bytes(std::span(theirs)));
      for (size_t i = 0; i < values.size(); ++i) values[i] += theirs[i];
    });
  }

  /// Gives what rank 0 has to the others.
  void share(std::span<std::byte> bytes) const {
    if (rank_ == 0) {
      for_each_other([&](const Socket& peer) { peer.send(bytes); });
    } else {
      peers_[0].receive(bytes);
    }
  }

  static std::vector<float> packed(const MatrixView& m) {
    std::vector<float> values(static_cast<size_t>(m.rows * m.cols));
    for (int64_t row = 0; row < m.rows; ++row) {
      std::copy_n(m.row<const float>(row), m.cols, values.begin() + row * m.cols);
    }
    return values;
  }
  static void unpack(const std::vector<float>& values, const MatrixView& m) {
    for (int64_t row = 0; row < m.rows; ++row) {
      std::copy_n(values.begin() + row * m.cols, m.cols, m.row<float>(row));
    }
  }

  const int rank_;
  std::string failure_;        // why the group is lost; empty: it is not
  std::vector<Socket> peers_;  // [size]; of rank 0 all but itself, of the others only rank 0
};

}  // namespace

std::unique_ptr<Communicator> make_tcp_communicator(const Launch& launch, int timeout_ms) {
  return std::make_unique<TcpCommunicator>(launch, timeout_ms);
}

}  // namespace longspan
