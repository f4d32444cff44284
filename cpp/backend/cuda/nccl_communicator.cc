#include "backend/cuda/nccl_communicator.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <utility>

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/device_memory.h"
#include "backend/cuda/nccl_api.h"
#include "backend/cuda/open_library.h"
#include "parallel/share.h"

namespace longspan::cuda {
namespace {

constexpr const char* kNames[] = {"libnccl.so.2"};
constexpr int64_t kStagingBytes = int64_t{16} << 20;  // columns on their way, for some rows at once
constexpr std::chrono::seconds kConnect{60};
constexpr int kTellMs =
    1000;  // for the host to say which rank is gone, where NCCL says that one is

struct Api {
  nccl::GetUniqueId unique_id;
  nccl::GetVersion version;
  nccl::CommInitRank init;
  nccl::CommAbort abort;
  nccl::CommDestroy destroy;
  nccl::CommGetAsyncError async_error;
  nccl::GetErrorString error_string;
  nccl::AllReduce all_reduce;
  nccl::ReduceScatter reduce_scatter;
  nccl::AllGather all_gather;

  /// Throws BackendUnavailable where NCCL is not there or lacks one of them.
  Api() {
    void* library = open_library(kNames);
    require<BackendUnavailable>(library != nullptr, "cuda: expected ", kNames[0], ", found none");
    const auto find = [&](auto& function, const char* name) {
      find_function(library, "NCCL", name, function);
    };
    find(unique_id, "ncclGetUniqueId");
    find(version, "ncclGetVersion");
    find(init, "ncclCommInitRank");
    find(abort, "ncclCommAbort");
    find(destroy, "ncclCommDestroy");
    find(async_error, "ncclCommGetAsyncError");
    find(error_string, "ncclGetErrorString");
    find(all_reduce, "ncclAllReduce");
    find(reduce_scatter, "ncclReduceScatter");
    find(all_gather, "ncclAllGather");
  }
};

const Api& api() {
  static const Api loaded;
  return loaded;
}

bool has_nccl() {
  try {
    api();
    return true;
  } catch (const BackendUnavailable&) {
    return false;
  }
}

int nccl_type(DType dtype) { return dtype == DType::kF32 ? nccl::kFloat32 : nccl::kBfloat16; }

/// What the thread that connects a rank works on, which may outlive who waits for it.
struct Connecting {
  nccl::Comm comm = nullptr;
  std::atomic<nccl::Status> status = nccl::kInProgress;
};

class NcclCommunicator final : public Communicator {
 public:
  NcclCommunicator(std::unique_ptr<Communicator> host, cudaStream_t stream)
      : host_(std::move(host)), stream_(stream) {}
  ~NcclCommunicator() override {
    try {
      // Where the others have gone, nobody ends what this rank waits in but itself.
      do check();
      while (cudaStreamQuery(stream_) == cudaErrorNotReady);
    } catch (...) {  // on purpose: check() has aborted
    }
    if (comm_ != nullptr) api_->destroy(comm_);
  }

  /// Of all ranks at once. Where it throws, the group is to be told.
  void connect() {
    // All find out together whether one cannot.
    const auto able = static_cast<std::byte>(has_nccl());
    std::vector<std::byte> all(static_cast<size_t>(size()));
    host_->all_gather({&able, 1}, all);
    for (size_t r = 0; r < all.size(); ++r) {
      require<BackendUnavailable>(
          all[r] != std::byte{0}, "tp: expected NCCL (libnccl.so.2) on every rank, rank ", r,
          " found none; install it with: pip install nvidia-nccl-cu13, or name its directory in "
          "LONGSPAN_CUDA_LIB_PATH");
    }
    api_ = &api();
    staging_ = allocate_device(kStagingBytes);
    std::vector<std::byte> bytes(sizeof(nccl::UniqueId));
    nccl::UniqueId id = {};
    if (rank() == 0) {
      expect_success(api_->unique_id(&id), "making an id");
      std::memcpy(bytes.data(), &id, sizeof(id));
    }
    host_->broadcast(bytes);
    require<ParallelError>(bytes.size() == sizeof(id), "NCCL: expected an id of ", sizeof(id),
                           " bytes, got ", bytes.size());
    std::memcpy(&id, bytes.data(), sizeof(id));
    comm_ = connected(id);
    warm_up();
  }

  int rank() const override { return host_->rank(); }
  int size() const override { return host_->size(); }

  void all_reduce(const MatrixView& matrix) override {
    expect_success(api_->all_reduce(matrix.data, matrix.data, elements(matrix),
                                    nccl_type(matrix.dtype), nccl::kSum, living(), stream_),
                   "all-reduce");
  }

  void reduce_scatter(const MatrixView& matrix) override {
    const MatrixView own = own_rows(matrix);
    expect_success(api_->reduce_scatter(matrix.data, own.data, elements(own),
                                        nccl_type(matrix.dtype), nccl::kSum, living(), stream_),
                   "reduce-scatter");
  }

  void all_gather(const MatrixView& matrix) override {
    const MatrixView own = own_rows(matrix);
    expect_success(api_->all_gather(own.data, matrix.data, elements(own), nccl_type(matrix.dtype),
                                    living(), stream_),
                   "all-gather");
  }

  void all_gather(const MatrixView& mine, const MatrixView& all) override {
    // Staged as [size][rows][widest], since NCCL gathers equal and unbroken pieces.
    const int64_t widest = largest_share(all.cols, size());
    const int64_t most = kStagingBytes / (size() * widest * 4);  // rows
    require<ParallelError>(most > 0, "NCCL: all-gather: expected at most ", kStagingBytes / 4,
                           " columns, got ", all.cols);
    for (int64_t begin = 0; begin < all.rows; begin += most) {
      const int64_t rows = std::min(most, all.rows - begin);
      const auto piece = [&](int r) {
        const int64_t cols = share_of(all.cols, r, size()).size();
        return MatrixView{staging_.as<float>() + r * rows * widest, DType::kF32, rows, cols,
                          widest};
      };
      copy(mine.rows_from(begin, rows), piece(rank()));
      gather_staged(rows * widest);
      for (int r = 0; r < size(); ++r) {
        MatrixView to = all.rows_from(begin, rows);
        to.data = to.row<float>(0) + share_of(all.cols, r, size()).begin;
        copy(piece(r), to);
      }
    }
  }

  void broadcast(std::vector<std::byte>& message) override { host_->broadcast(message); }
  void all_gather(std::span<const std::byte> mine, std::span<std::byte> all) override {
    host_->all_gather(mine, all);
  }
  void gather(std::span<const std::byte> mine, std::vector<std::vector<std::byte>>& all) override {
    host_->gather(mine, all);
  }

  void check() override {
    try {
      host_->check();
      nccl::Status status = 0;
      if (comm_ != nullptr) expect_success(api_->async_error(comm_, &status), "asking for errors");
      if (status != nccl::kInProgress) expect_success(status, "running a step");
    } catch (...) {
      abort();
      throw;
    }
  }
  void fail(const std::string& why) override {
    host_->fail(why);
    abort();
  }
  bool recover() override {
    abort();
    host_->recover();
    return false;
  }

 private:
  /// With the gaps between rows, which are zeros, and stay so.
  static size_t elements(const MatrixView& m) { return static_cast<size_t>(m.rows * m.stride); }

  MatrixView own_rows(const MatrixView& m) const {
    const Share rows = share_of(m.rows, rank(), size());
    return m.rows_from(rows.begin, rows.size());
  }

  nccl::Comm living() const {
    require<ParallelError>(comm_ != nullptr, "NCCL: expected a living group, got an aborted one");
    return comm_;
  }

  void expect_success(nccl::Status status, const char* what) {
    if (status == 0) return;
    for (int ms = 0; ms < kTellMs; ms += 10) {
      host_->check();
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    throw ParallelError(
        message("NCCL: ", what, ": ", api_->error_string(status), " (NCCL_DEBUG=INFO tells more)"));
  }

  /// Ends what NCCL has on the stream, where another rank will not come.
  void abort() {
    if (comm_ != nullptr) api_->abort(std::exchange(comm_, nullptr));
  }

  /// NCCL waits without end for a rank that does not come, and cannot be called off: a thread of
  /// its own does it, and is left there where the group fails meanwhile.
  nccl::Comm connected(const nccl::UniqueId& id) {
    int device = 0;
    check_cuda(cudaGetDevice(&device), "connecting the ranks");
    const auto connecting = std::make_shared<Connecting>();
    std::thread([connecting, id, device, init = api_->init, size = size(), rank = rank()] {
      cudaSetDevice(device);
      connecting->status = init(&connecting->comm, size, id, rank);
    }).detach();
    const auto end = std::chrono::steady_clock::now() + kConnect;
    while (connecting->status == nccl::kInProgress) {
      host_->check();
      require<ParallelError>(std::chrono::steady_clock::now() < end,
                             "NCCL: expected all ranks to connect within ", kConnect.count(),
                             " s (NCCL_DEBUG=INFO tells more, NCCL_SOCKET_IFNAME names the "
                             "network to use)");
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    expect_success(connecting->status, "connecting the ranks");
    return connecting->comm;
  }

  /// Each algorithm connects and allocates when a size first asks for it: now, before memory is
  /// planned.
  void warm_up() {
    for (int64_t bytes = 1024; bytes <= kStagingBytes; bytes *= 4) {
      const int64_t cols = bytes / 4 / size();
      const MatrixView staged = {staging_.data(), DType::kF32, size(), cols, cols};
      all_reduce(staged);
      reduce_scatter(staged);
      all_gather(staged);
    }
    cudaError_t status = cudaSuccess;
    while ((status = cudaStreamQuery(stream_)) == cudaErrorNotReady) check();
    check_cuda(status, "connecting the ranks");
  }

  /// staging_: [size][count], of which each rank has its own.
  void gather_staged(int64_t count) {
    expect_success(api_->all_gather(staging_.as<float>() + rank() * count, staging_.data(),
                                    static_cast<size_t>(count), nccl::kFloat32, living(), stream_),
                   "all-gather");
  }

  void copy(const MatrixView& from, const MatrixView& to) const {
    const auto pitch = [](const MatrixView& m) { return static_cast<size_t>(m.stride) * 4; };
    check_cuda(cudaMemcpy2DAsync(to.data, pitch(to), from.data, pitch(from),
                                 static_cast<size_t>(from.cols) * 4, static_cast<size_t>(from.rows),
                                 cudaMemcpyDeviceToDevice, stream_),
               "gathering columns");
  }

  const std::unique_ptr<Communicator> host_;
  const cudaStream_t stream_;
  const Api* api_ = nullptr;  // set by connect()
  Buffer staging_;
  nccl::Comm comm_ = nullptr;
};

}  // namespace

std::unique_ptr<Communicator> make_nccl_communicator(std::unique_ptr<Communicator> host,
                                                     cudaStream_t stream) {
  auto group = std::make_unique<NcclCommunicator>(std::move(host), stream);
  try {
    group->connect();
  } catch (const std::exception& error) {
    group->fail(error.what());  // or the others would wait
    throw;
  }
  return group;
}

}  // namespace longspan::cuda
