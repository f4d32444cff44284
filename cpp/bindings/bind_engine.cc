#include <pybind11/functional.h>

#include <memory>
#include <optional>

#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "bindings/request_view.h"
#include "bindings/rope_length.h"
#include "bindings/token_ids.h"
#include "longspan/engine.h"

namespace longspan::bindings {
namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;

/// Ends the engine without the GIL: its thread may take a moment to stop.
struct EngineDeleter {
  void operator()(Engine* engine) const {
    py::gil_scoped_release release;
    delete engine;
  }
};
using EnginePointer = std::unique_ptr<Engine, EngineDeleter>;

EnginePointer load(const std::string& model_dir, const EngineConfig& config,
                   const LoadProgress& progress) {
  py::gil_scoped_release release;
  return EnginePointer(Engine::load(model_dir, config, progress).release());
}

bool follow(const std::string& model_dir, const EngineConfig& config,
            const LoadProgress& progress) {
  py::gil_scoped_release release;
  return Engine::follow(model_dir, config, progress);
}

using OptionalRopeLength = std::optional<RopeLengthValue>;
using SignalPointer = std::shared_ptr<Signal>;

HandleView submit(Engine& engine, Request request, SignalPointer signal = nullptr) {
  py::gil_scoped_release release;
  const auto logit_rows = static_cast<int64_t>(request.logit_positions.size());
  const int64_t logprobs_each = 1 + request.generation.logprobs.value_or(0);
  return {engine.submit(std::move(request), std::move(signal)), logit_rows, logprobs_each};
}

void check(const Engine& engine, const Request& request) {
  py::gil_scoped_release release;
  engine.check(request);
}

Request generate_request(const py::object& input_ids, const GenerationConfig& config,
                         const OptionalRopeLength& rope_length, bool token_nll) {
  Request request;
  request.kind = RequestKind::kGenerate;
  request.input_ids = to_token_ids(input_ids, "input_ids");
  request.generation = config;
  request.token_nll = token_nll;
  if (rope_length) request.rope_length = rope_length_from_python(*rope_length, "rope_length");
  return request;
}

Request score_request(const py::object& input_ids, bool token_nll) {
  Request request;
  request.kind = RequestKind::kScore;
  request.input_ids = to_token_ids(input_ids, "input_ids");
  request.token_nll = token_nll;
  return request;
}

HandleView generate(Engine& self, const py::object& input_ids, const GenerationConfig& config,
                    const OptionalRopeLength& rope_length, bool token_nll, SignalPointer signal) {
  return submit(self, generate_request(input_ids, config, rope_length, token_nll),
                std::move(signal));
}

void check_generate(const Engine& self, const py::object& input_ids, const GenerationConfig& config,
                    const OptionalRopeLength& rope_length) {
  check(self, generate_request(input_ids, config, rope_length, false));
}

HandleView score(Engine& self, const py::object& input_ids, bool token_nll) {
  return submit(self, score_request(input_ids, token_nll));
}

void check_score(const Engine& self, const py::object& input_ids) {
  check(self, score_request(input_ids, false));
}

HandleView logits(Engine& self, const py::object& input_ids, const py::object& positions) {
  Request request;
  request.kind = RequestKind::kLogits;
  request.input_ids = to_token_ids(input_ids, "input_ids");
  request.logit_positions = to_positions(positions, "positions");
  return submit(self, std::move(request));
}

void bind_facts(py::module_& m) {
  ResultClass<EngineMetrics>(m, "EngineMetrics", "A snapshot of what the engine is doing.")
      .field("waiting", &EngineMetrics::waiting)
      .field("running", &EngineMetrics::running)
      .field("free_blocks", &EngineMetrics::free_blocks)
      .field("total_blocks", &EngineMetrics::total_blocks)
      .field("steps", &EngineMetrics::steps)
      .field("prefilled_tokens", &EngineMetrics::prefilled_tokens)
      .field("generated_tokens", &EngineMetrics::generated_tokens)
      .field("cached_blocks", &EngineMetrics::cached_blocks)
      .field("prefix_hit_tokens", &EngineMetrics::prefix_hit_tokens)
      .field("prefix_miss_tokens", &EngineMetrics::prefix_miss_tokens)
      .field("prefix_evictions", &EngineMetrics::prefix_evictions);

  ResultClass<ModelInfo>(m, "ModelInfo", "Facts about the loaded model.")
      .field("architecture", &ModelInfo::architecture)
      .field("vocab_size", &ModelInfo::vocab_size)
      .field("num_layers", &ModelInfo::num_layers)
      .field("hidden_size", &ModelInfo::hidden_size)
      .field("num_heads", &ModelInfo::num_heads)
      .field("num_kv_heads", &ModelInfo::num_kv_heads)
      .field("head_dim", &ModelInfo::head_dim)
      .field("num_parameters", &ModelInfo::num_parameters)
      .field("native_length", &ModelInfo::native_length)
      .field("eos_token_ids", &ModelInfo::eos_token_ids)
      .field("dtype", &ModelInfo::dtype)
      .field("backend", &ModelInfo::backend)
      .field("rope", &ModelInfo::rope);
}

}  // namespace

void bind_engine(py::module_& m) {
  bind_facts(m);
  py::class_<Engine, EnginePointer>(
      m, "Engine", "Token ids in, token ids out. All waiting happens without the GIL.")
      .def_static("load", &load, py::arg("model_dir"), py::arg("config") = EngineConfig(),
                  py::arg("progress") = py::none(),
                  "Loads a Hugging Face model directory. progress(done_bytes, total_bytes) is "
                  "called while weights load; what it raises ends the loading.")
      .def_static(
          "follow", &follow, py::arg("model_dir"), py::arg("config") = EngineConfig(),
          py::arg("progress") = py::none(),
          "In a process that a launcher started as another rank than 0: does what rank 0 says "
          "until that closes its engine, and returns True. Elsewhere False at once.")
      .def("generate", &generate, py::arg("input_ids"), py::arg("config") = GenerationConfig(),
           py::arg("rope_length") = py::none(), py::arg("token_nll") = false,
           py::arg("signal") = py::none(),
           "Queues a request that continues input_ids. rope_length: instead of the engine's; "
           "token_nll: also score the prompt; signal: notified whenever the request moves on.")
      .def("check_generate", &check_generate, py::arg("input_ids"),
           py::arg("config") = GenerationConfig(), py::arg("rope_length") = py::none(),
           "Raises what generate() would, without queuing anything.")
      .def("score", &score, py::arg("input_ids"), py::arg("token_nll") = false,
           "Queues a request for the negative log-likelihood of input_ids; token_nll: of each too.")
      .def("check_score", &check_score, py::arg("input_ids"),
           "Raises what score() would, without queuing anything.")
      .def("logits", &logits, py::arg("input_ids"), py::arg("positions"),
           "Queues a request for the logits at ascending positions of input_ids.")
      .def("rope_profile", &Engine::rope_profile, py::arg("prompt_tokens"),
           py::arg("max_new_tokens") = 0, Unlocked(), "The profile that such a request would get.")
      .def("metrics", &Engine::metrics, Unlocked())
      .def_property_readonly("model", [](const Engine& self) { return self.model(); })
      .def_property_readonly("config", [](const Engine& self) { return self.config(); })
      .def_property_readonly("plan", [](const Engine& self) { return self.plan(); })
      .def("close", &Engine::close, Unlocked(),
           "Ends every request with EngineClosed and frees all memory. Idempotent.")
      .def("__enter__", [](const py::object& self) { return self; })
      .def("__exit__", [](Engine& self, const py::args&) { self.close(); }, Unlocked());
}

}  // namespace longspan::bindings
