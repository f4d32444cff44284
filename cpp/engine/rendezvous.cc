#include "longspan/rendezvous.h"

#include <unistd.h>

#include <array>
#include <chrono>
#include <exception>
#include <map>
#include <memory>
#include <span>
#include <utility>

#include "backend/registry.h"
#include "core/check.h"
#include "parallel/communicator.h"
#include "parallel/launch.h"

namespace longspan {
namespace {

constexpr int64_t kRows = 64;
constexpr int64_t kCols = 1024;

using Clock = std::chrono::steady_clock;
using Begins = std::function<void(int, const std::string&)>;

/// A rank's number in a column: small integers, which float32 adds up exactly.
float number(int rank, int64_t col) { return static_cast<float>((rank + 1) * (col % 5 + 1)); }

std::string listed(const std::vector<int>& ranks) {
  std::string list;
  for (const int rank : ranks) list += message(list.empty() ? "" : ", ", rank);
  return list;
}

class Meeting {
 public:
  Meeting(Launch launch, std::string device, const Begins& begins)
      : launch_(std::move(launch)),
        device_(std::move(device)),
        begins_(begins),
        result_{.rank = launch_.rank, .size = launch_.size, .steps = {}} {}

  Rendezvous run() {
    const bool all = step("meeting", [this] { return meet(); }) &&
                     step("machines", [this] { return tell_machines(); }) &&
                     step("sum in host memory", [this] { return sum_in_host_memory(); }) &&
                     step("device", [this] { return take_device(); }) &&
                     step("connecting devices", [this] { return connect_devices(); }) &&
                     step("sum on devices", [this] { return sum_on_devices(); });
    if (all) step("leaving", [this] { return leave(); });
    return std::move(result_);
  }

 private:
  template <class Work>
  bool step(const std::string& name, const Work& work) {
    if (begins_) begins_(launch_.rank, name);
    const auto begin = Clock::now();
    RendezvousStep done;
    done.name = name;
    try {
      done.found = work();
      done.ok = true;
    } catch (const std::exception& error) {
      done.found = error.what();
      if (group_) group_->fail(message(name, ": ", error.what()));
    }
    done.seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    result_.steps.push_back(std::move(done));
    return result_.ok();
  }

  std::string meet() {
    group_ = make_tcp_communicator(launch_, launch_.answer_ms);
    return message(launch_.size, " ranks at ", launch_.address, ":", launch_.port);
  }

  std::string tell_machines() {
    std::array<char, 256> mine{};
    gethostname(mine.data(), mine.size() - 1);
    std::vector<char> all(mine.size() * static_cast<size_t>(launch_.size));
    group_->all_gather(std::as_bytes(std::span(mine)), std::as_writable_bytes(std::span(all)));
    std::map<std::string, std::vector<int>> ranks_of;
    for (int rank = 0; rank < launch_.size; ++rank) {
      ranks_of[all.data() + mine.size() * static_cast<size_t>(rank)].push_back(rank);
    }
    std::string text;
    for (const auto& [host, ranks] : ranks_of) {
      text += message(text.empty() ? "" : "; ", host, ": ", listed(ranks));
    }
    return text;
  }

  std::string sum_in_host_memory() {
    std::vector<float> values(static_cast<size_t>(kRows * kCols));
    fill(values);
    group_->all_reduce({values.data(), DType::kF32, kRows, kCols, kCols});
    return checked(values);
  }

  std::string take_device() {
    backend_ = make_launched_backend(device_, "auto", 1, launch_.local_rank);
    // A rank that could not is known before anyone waits for its device.
    std::vector<std::byte> here(static_cast<size_t>(launch_.size));
    group_->all_gather(std::array<std::byte, 1>{}, here);
    return backend_->describe();
  }

  std::string connect_devices() {
    group_ = backend_->make_communicator(std::move(group_));
    return message("of ", launch_.size, " ranks");
  }

  std::string sum_on_devices() {
    std::vector<float> values(static_cast<size_t>(kRows * kCols));
    fill(values);
    const Buffer memory = backend_->allocate(kRows * kCols * size_of(DType::kF32));
    const MatrixView matrix = {memory.data(), DType::kF32, kRows, kCols, kCols};
    backend_->upload(values.data(), matrix);
    group_->all_reduce(matrix);
    backend_->download(matrix, values.data());
    return checked(values);
  }

  /// Nobody leaves while another may still find its end of a connection closed.
  std::string leave() {
    std::vector<std::byte> here(static_cast<size_t>(launch_.size));
    group_->all_gather(std::array<std::byte, 1>{}, here);
    return "all ranks came this far";
  }

  void fill(std::vector<float>& values) const {
    for (int64_t i = 0; i < kRows * kCols; ++i) {
      values[static_cast<size_t>(i)] = number(launch_.rank, i % kCols);
    }
  }

  std::string checked(const std::vector<float>& sums) const {
    for (int64_t i = 0; i < kRows * kCols; ++i) {
      float expected = 0;
      for (int rank = 0; rank < launch_.size; ++rank) expected += number(rank, i % kCols);
      const float got = sums[static_cast<size_t>(i)];
      require<ParallelError>(got == expected, "expected ", expected, " at element ", i, ", got ",
                             got);
    }
    return message("right, of ", kRows * kCols, " numbers");
  }

  const Launch launch_;
  const std::string device_;
  const Begins& begins_;
  std::unique_ptr<Backend> backend_;  // outlives what works on it
  std::unique_ptr<Communicator> group_;
  Rendezvous result_;
};

}  // namespace

Rendezvous check_rendezvous(const std::string& device, int timeout_s, const Begins& begins) {
  require<InvalidArgument>(timeout_s >= 1 && timeout_s <= 3600,
                           "timeout_s: expected an integer in [1, 3600], got ", timeout_s);
  Launch launch = read_launch();
  if (launch.size == 1) return {};
  launch.answer_ms = timeout_s * 1000;
  return Meeting(launch, device, begins).run();
}

}  // namespace longspan
