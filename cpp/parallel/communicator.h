#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/matrix.h"

namespace longspan {

/// How the ranks of a tensor-parallel group combine what each computed. All ranks call the same
/// ops in the same order with the same shapes. Model code calls it without asking how many ranks
/// there are; for one rank it is a null object. One thread per rank.
///
/// When a rank fails, the others' ops throw ParallelError, at once where they wait; so does every
/// op until all have called recover().
class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;  ///< in [0, size())
  virtual int size() const = 0;

  // ---- matrices of the rank's backend, in the order of its ops ----

  /// Replaces every element by its sum over the ranks, added in the same order every time.
  /// out or acc dtype.
  virtual void all_reduce(const MatrixView& matrix) = 0;

  /// Replaces the elements of rank r's rows, the r-th of size() equal parts, by their sums over the
  /// ranks, added in the same order every time; what the other rows hold then is undefined. rows: a
  /// multiple of size(). out or acc dtype.
  virtual void reduce_scatter(const MatrixView& matrix) = 0;

  /// Gives each rank's rows, dealt out as in reduce_scatter(), to all. Any dtype.
  virtual void all_gather(const MatrixView& matrix) = 0;

  /// Puts the ranks' columns side by side: rank r's `mine`, [R, share_of(all.cols, r, size())],
  /// become those columns of every rank's `all`. For one rank both are the same matrix. acc dtype.
  virtual void all_gather(const MatrixView& mine, const MatrixView& all) = 0;

  // ---- host memory; done when they return ----

  /// Rank 0's message, of any length, becomes everyone's.
  virtual void broadcast(std::vector<std::byte>& message) = 0;

  /// all: [size()][mine.size()].
  virtual void all_gather(std::span<const std::byte> mine, std::span<std::byte> all) = 0;

  /// Every rank's message, of any length, comes to rank 0, whose `all` becomes [size()]; that of
  /// the others stays as it is.
  virtual void gather(std::span<const std::byte> mine,
                      std::vector<std::vector<std::byte>>& all) = 0;

  // ---- failure ----

  /// Throws where the group has failed; never waits. For who waits for something else meanwhile.
  virtual void check() = 0;

  /// Tells the group that this rank could not go on, and why.
  virtual void fail(const std::string& why) = 0;

  /// Called by every rank after an op threw or it failed: waits for the others, then the group is
  /// as new. False where it cannot be used again.
  virtual bool recover() = 0;
};

/// The group of one.
std::unique_ptr<Communicator> make_single_communicator();

/// A group of `size` threads of this process over host memory, float32 matrices; one communicator
/// each, which may outlive the others.
std::vector<std::unique_ptr<Communicator>> make_local_communicators(int size);

struct Launch;

/// One rank of a group of processes, connected to rank 0 by TCP: host memory, float32 matrices.
/// A network where others can reach rank 0's port must be trusted. After a failure the group is
/// lost. Throws ParallelError when not all have come within timeout_ms.
std::unique_ptr<Communicator> make_tcp_communicator(const Launch& launch, int timeout_ms);

}  // namespace longspan
