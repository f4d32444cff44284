#include "backend/cuda/nccl_communicator.h"

#include <algorithm>
#include <cstring>
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

struct Api {
  nccl::GetUniqueId unique_id;
  nccl::GetVersion version;
  nccl::CommInitRank init;
  nccl::CommAbort abort;
  nccl::CommDestroy destroy;
  nccl::CommGetAsyncError async_error;
  nccl::GetErrorString error_string;
  nccl::AllReduce all_reduce;
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

void check_nccl(nccl::Status status, const char* what) {
  require<ParallelError>(status == 0, "NCCL: ", what, ": ", api().error_string(status),
                         " (NCCL_DEBUG=INFO tells more)");
}

int nccl_type(DType dtype) { return dtype == DType::kF32 ? nccl::kFloat32 : nccl::kBfloat16; }

class NcclCommunicator final : public Communicator {
 public:
  NcclCommunicator(std::unique_ptr<Communicator> host, cudaStream_t stream)
      : host_(std::move(host)), stream_(stream), staging_(allocate_device(kStagingBytes)) {
    connect();
  }
  ~NcclCommunicator() override {
    cudaStreamSynchronize(stream_);
    if (comm_ != nullptr) destroy_(comm_);
  }

  int rank() const override { return host_->rank(); }
  int size() const override { return host_->size(); }

  void all_reduce(const MatrixView& matrix) override {
    // The gaps between rows are zeros, and stay so.
    const auto count = static_cast<size_t>(matrix.rows * matrix.stride);
    check_nccl(api().all_reduce(matrix.data, matrix.data, count, nccl_type(matrix.dtype),
                                nccl::kSum, living(), stream_),
               "all-reduce");
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
      const MatrixView own = piece(rank());
      copy(mine.rows_from(begin, rows), own);
      check_nccl(api().all_gather(own.data, staging_.data(), static_cast<size_t>(rows * widest),
                                  nccl::kFloat32, living(), stream_),
                 "all-gather");
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

  void check() override {
    try {
      host_->check();
      nccl::Status status = 0;
      if (comm_ != nullptr) check_nccl(api().async_error(comm_, &status), "asking for errors");
      if (status != nccl::kInProgress) check_nccl(status, "running a step");
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
  nccl::Comm living() const {
    require<ParallelError>(comm_ != nullptr, "NCCL: expected a living group, got an aborted one");
    return comm_;
  }

  /// Ends what NCCL has on the stream, where another rank will not come.
  void abort() {
    if (comm_ != nullptr) api().abort(std::exchange(comm_, nullptr));
  }

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
    std::vector<std::byte> message(sizeof(nccl::UniqueId));
    nccl::UniqueId id = {};
    if (rank() == 0) {
      check_nccl(api().unique_id(&id), "making an id");
      std::memcpy(message.data(), &id, sizeof(id));
    }
    host_->broadcast(message);
    require<ParallelError>(message.size() == sizeof(id), "NCCL: expected an id of ", sizeof(id),
                           " bytes, got ", message.size());
    std::memcpy(&id, message.data(), sizeof(id));
    destroy_ = api().destroy;
    check_nccl(api().init(&comm_, size(), id, rank()), "connecting the ranks");
    // What NCCL allocates at its first use is so there before memory is planned.
    all_reduce({staging_.data(), DType::kF32, 1, 1024, 1024});
    all_gather({staging_.data(), DType::kF32, 1, 1, 1},
               {staging_.as<float>() + 4096, DType::kF32, 1, size(), size()});
    check_cuda(cudaStreamSynchronize(stream_), "connecting the ranks");
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
  const Buffer staging_;
  nccl::Comm comm_ = nullptr;
  nccl::CommDestroy destroy_ = nullptr;  // api().destroy, which a destructor may call
};

}  // namespace

std::unique_ptr<Communicator> make_nccl_communicator(std::unique_ptr<Communicator> host,
                                                     cudaStream_t stream) {
  return std::make_unique<NcclCommunicator>(std::move(host), stream);
}

}  // namespace longspan::cuda
