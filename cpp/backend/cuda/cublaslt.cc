#include "backend/cuda/cublaslt.h"

#include <vector>

#include "backend/cuda/cublaslt_api.h"
#include "backend/cuda/cuda_check.h"
#include "backend/cuda/device_memory.h"
#include "backend/cuda/open_library.h"

namespace longspan::cuda {
namespace {

constexpr int64_t kWorkspaceBytes = 64 << 20;  // what cuBLAS asks for on Hopper, twice
constexpr const char* kNames[] = {"libcublasLt.so.13", "libcublasLt.so.12"};

void* open_cublaslt() {
  void* handle = open_library(kNames);
  require<BackendUnavailable>(
      handle != nullptr,
      "cuda: expected cuBLASLt (libcublasLt.so.13 or .12), found none; install it with: pip "
      "install nvidia-cublas, or name its directory in LONGSPAN_CUDA_LIB_PATH");
  return handle;
}

void check(lt::Status status, const char* what) {
  if (status != 0) {
    throw BackendUnavailable(message("cuda: cuBLASLt: ", what, ": status ", status));
  }
}

}  // namespace

struct CublasLt::Api {
  lt::Create create;
  lt::Destroy destroy;
  lt::GetVersion version;
  lt::DescCreate desc_create;
  lt::Destroy desc_destroy;
  lt::DescSet desc_set;
  lt::LayoutCreate layout_create;
  lt::Destroy layout_destroy;
  lt::PreferenceCreate preference_create;
  lt::Destroy preference_destroy;
  lt::PreferenceSet preference_set;
  lt::AlgoHeuristic heuristic;
  lt::Matmul matmul;

  Api() {
    void* library = open_cublaslt();
    const auto find = [&](auto& function, const char* name) {
      find_function(library, "cuBLASLt", name, function);
    };
    find(create, "cublasLtCreate");
    find(destroy, "cublasLtDestroy");
    find(version, "cublasLtGetVersion");
    find(desc_create, "cublasLtMatmulDescCreate");
    find(desc_destroy, "cublasLtMatmulDescDestroy");
    find(desc_set, "cublasLtMatmulDescSetAttribute");
    find(layout_create, "cublasLtMatrixLayoutCreate");
    find(layout_destroy, "cublasLtMatrixLayoutDestroy");
    find(preference_create, "cublasLtMatmulPreferenceCreate");
    find(preference_destroy, "cublasLtMatmulPreferenceDestroy");
    find(preference_set, "cublasLtMatmulPreferenceSetAttribute");
    find(heuristic, "cublasLtMatmulAlgoGetHeuristic");
    find(matmul, "cublasLtMatmul");
  }
};

/// One shape: its descriptors and the algorithm chosen for it. cuBLAS counts matrices by columns,
/// so that y^T [N, M] = weight [N, K] x^T [K, M] is what it is asked for.
struct CublasLt::Product {
  explicit Product(const Api& functions) : api(functions) {}
  ~Product() {
    if (desc != nullptr) api.desc_destroy(desc);
    for (const lt::Layout layout : {weight, x, y}) {
      if (layout != nullptr) api.layout_destroy(layout);
    }
  }
  Product(const Product&) = delete;
  Product& operator=(const Product&) = delete;

  const Api& api;
  lt::Desc desc = nullptr;
  lt::Layout weight = nullptr;
  lt::Layout x = nullptr;
  lt::Layout y = nullptr;
  lt::Algo algo = {};
};

CublasLt::CublasLt() : api_(std::make_unique<Api>()) {
  check(api_->create(&handle_), "creating a handle");
  workspace_ = allocate_device(kWorkspaceBytes);
}

CublasLt::~CublasLt() {
  products_.clear();
  if (handle_ != nullptr) api_->destroy(handle_);
}

std::string CublasLt::version() const {
  const size_t v = api_->version();  // 130100 is 13.1.0
  return message(v / 10000, ".", v / 100 % 100);
}

CublasLt::Product& CublasLt::product(const Key& key) {
  std::unique_ptr<Product>& entry = products_[key];
  if (entry) return *entry;
  const auto [m, n, k, x_stride, weight_stride, y_stride, y_f32, has_bias] = key;
  auto p = std::make_unique<Product>(*api_);
  const cudaDataType_t y_type = y_f32 ? CUDA_R_32F : CUDA_R_16BF;
  check(api_->desc_create(&p->desc, lt::kCompute32F, CUDA_R_32F), "describing a product");
  const auto set = [&](int attribute, const auto& value) {
    check(api_->desc_set(p->desc, attribute, static_cast<const void*>(&value), sizeof(value)),
          "describing a product");
  };
  set(lt::kDescTransA, lt::kOpTranspose);
  if (has_bias) {
    set(lt::kDescEpilogue, lt::kEpilogueBias);
    set(lt::kDescBiasType, static_cast<int32_t>(y_type));
    const void* aligned = workspace_.data();  // the heuristic looks at the pointer's alignment
    set(lt::kDescBiasPointer, aligned);
  }
  const auto u = [](int64_t size) { return static_cast<uint64_t>(size); };
  check(api_->layout_create(&p->weight, CUDA_R_16BF, u(k), u(n), weight_stride), "laying out");
  check(api_->layout_create(&p->x, CUDA_R_16BF, u(k), u(m), x_stride), "laying out");
  check(api_->layout_create(&p->y, y_type, u(n), u(m), y_stride), "laying out");

  lt::Preference preference = nullptr;
  check(api_->preference_create(&preference), "asking for an algorithm");
  const auto bytes = static_cast<size_t>(kWorkspaceBytes);
  api_->preference_set(preference, lt::kPreferenceMaxWorkspace, &bytes, sizeof(bytes));
  lt::Heuristic found = {};
  int count = 0;
  const lt::Status status =
      api_->heuristic(handle_, p->desc, p->weight, p->x, p->y, p->y, preference, 1, &found, &count);
  api_->preference_destroy(preference);
  check(status, "asking for an algorithm");
  require<BackendUnavailable>(count > 0, "cuda: cuBLASLt has no algorithm for ", m, " x ", n, " x ",
                              k);
  p->algo = found.algo;
  entry = std::move(p);
  return *entry;
}

void CublasLt::linear(const MatrixView& x, const void* weight, int64_t weight_stride,
                      const void* bias, const MatrixView& y, cudaStream_t stream) {
  Product& p = product({x.rows, y.cols, x.cols, x.stride, weight_stride, y.stride,
                        y.dtype == DType::kF32, bias != nullptr});
  if (bias != nullptr) {
    check(
        api_->desc_set(p.desc, lt::kDescBiasPointer, static_cast<const void*>(&bias), sizeof(bias)),
        "setting a bias");
  }
  const float one = 1.0f;
  const float zero = 0.0f;
  check(api_->matmul(handle_, p.desc, &one, weight, p.weight, x.data, p.x, &zero, y.data, p.y,
                     y.data, p.y, &p.algo, workspace_.data(),
                     static_cast<size_t>(workspace_.bytes()), stream),
        "multiplying");
}

}  // namespace longspan::cuda
