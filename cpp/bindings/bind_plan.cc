#include <string>

#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "longspan/backends.h"
#include "longspan/cost.h"
#include "longspan/plan.h"

namespace longspan::bindings {

void bind_plan(py::module_& m) {
  ResultClass<PlanRemedy>(m, "PlanRemedy", "A change of options under which a session would fit.")
      .field("change", &PlanRemedy::change)
      .field("total_bytes", &PlanRemedy::total_bytes)
      .field("max_session_len", &PlanRemedy::max_session_len);
  ResultClass<MemoryPlan>(m, "MemoryPlan", "Bytes per component of an engine; lengths in tokens.")
      .field("weight_bytes", &MemoryPlan::weight_bytes)
      .field("kv_bytes", &MemoryPlan::kv_bytes)
      .field("activation_bytes", &MemoryPlan::activation_bytes)
      .field("workspace_bytes", &MemoryPlan::workspace_bytes)
      .field("overhead_bytes", &MemoryPlan::overhead_bytes)
      .field("device_bytes", &MemoryPlan::device_bytes)
      .field("num_blocks", &MemoryPlan::num_blocks)
      .field("block_bytes", &MemoryPlan::block_bytes)
      .field("session_kv_bytes", &MemoryPlan::session_kv_bytes)
      .field("kv_capacity", &MemoryPlan::kv_capacity)
      .field("session_len", &MemoryPlan::session_len)
      .field("max_session_len", &MemoryPlan::max_session_len)
      .field("fits", &MemoryPlan::fits)
      .field("remedies", &MemoryPlan::remedies)
      .property("total_bytes", &MemoryPlan::total_bytes)
      .property("headroom_bytes", &MemoryPlan::headroom_bytes);
  m.def("plan_memory", &plan_memory, py::arg("model_dir"), py::arg("config"),
        py::arg("device_bytes") = 0, py::call_guard<py::gil_scoped_release>(),
        "The plan of a model directory, without loading weights; config.device may also name a GPU "
        "that is not there. device_bytes: free bytes to plan for; 0: what the device has free now, "
        "one by name in all.");

  ResultClass<CostTerm>(m, "CostTerm", "A figure that costs are computed from, and its source.")
      .field("name", &CostTerm::name)
      .field("value", &CostTerm::value)
      .field("unit", &CostTerm::unit)
      .field("source", &CostTerm::source);
  ResultClass<CostParts>(m, "CostParts", "Seconds of a step, by what they go to.")
      .field("products", &CostParts::products)
      .field("attention", &CostParts::attention)
      .field("rows", &CostParts::rows)
      .field("ranks", &CostParts::ranks)
      .property("total", &CostParts::total)
      .property("limit", &CostParts::limit);
  ResultClass<CostPrediction>(m, "CostPrediction", "What a model would take on GPUs not there.")
      .field("memory", &CostPrediction::memory)
      .field("prefill", &CostPrediction::prefill)
      .field("decode", &CostPrediction::decode)
      .field("terms", &CostPrediction::terms);
  m.def(
      "predict_cost",
      [](const std::string& model_dir, const EngineConfig& config, int gpus_per_host,
         double link_gbps, int64_t sequences) {
        return predict_cost(model_dir, config, {gpus_per_host, link_gbps}, sequences);
      },
      py::arg("model_dir"), py::arg("config"), py::arg("gpus_per_host") = Cluster{}.gpus_per_host,
      py::arg("link_gbps") = Cluster{}.link_gbps, py::arg("sequences") = 1,
      py::call_guard<py::gil_scoped_release>(),
      "Seconds of a prefill of session_len tokens and of a decode step after it, and memory, on "
      "config.tp GPUs of a kind that was measured: config.device h100 or h200. link_gbps: of each "
      "GPU to other hosts, Gbit/s each way. sequences: that decode together.");

  ResultClass<BackendInfo>(m, "BackendInfo", "One backend as seen from here.")
      .field("name", &BackendInfo::name)
      .field("available", &BackendInfo::available)
      .field("detail", &BackendInfo::detail);
  m.def("backends", &backends, "Every backend this build knows, available or not.");
  m.def("version", &version);
}

}  // namespace longspan::bindings
