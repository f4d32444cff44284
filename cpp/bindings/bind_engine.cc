#include <pybind11/functional.h>

#include <iterator>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

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

std::vector<HandleView> submit(Engine& engine, std::vector<Request> requests,
                               SignalPointer signal) {
  std::vector<HandleView> views;
  std::vector<std::pair<int64_t, int64_t>> wanted;
  for (const Request& request : requests) {
    wanted.emplace_back(std::ssize(request.logit_positions),
                        1 + request.generation.logprobs.value_or(0));
  }
  const std::vector<RequestHandle> handles =
      engine.submit_all(std::move(requests), std::move(signal));
  for (size_t i = 0; i < handles.size(); ++i) {
    views.push_back({handles[i], wanted[i].first, wanted[i].second});
  }
  return views;
}

HandleView submit_one(Engine& engine, Request request) {
  py::gil_scoped_release release;
  std::vector<Request> requests;
  requests.push_back(std::move(request));
  return submit(engine, std::move(requests), nullptr).front();
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

Request logits_request(const py::object& input_ids, const py::object& positions) {
  Request request;
  request.kind = RequestKind::kLogits;
  request.input_ids = to_token_ids(input_ids, "input_ids");
  request.logit_positions = to_positions(positions, "positions");
  return request;
}

/// submit() of what `make` returns for the same arguments.
template <class... Args>
auto submit_made_by(Request (*make)(Args...)) {
  return [make](Engine& self, Args... args) { return submit_one(self, make(args...)); };
}

void bind_requests(py::module_& m) {
  py::class_<Request>(m, "Request", "What an engine is asked for, see Engine.submit().")
      .def_static(
          "generate", &generate_request, py::arg("input_ids"),
          py::arg("config") = GenerationConfig(), py::arg("rope_length") = py::none(),
          py::arg("token_nll") = false,
          "Continues input_ids. rope_length: instead of the engine's; token_nll: also score "
          "the prompt.")
      .def_static("score", &score_request, py::arg("input_ids"), py::arg("token_nll") = false,
                  "The negative log-likelihood of input_ids; token_nll: of each too.")
      .def_static("logits", &logits_request, py::arg("input_ids"), py::arg("positions"),
                  "The logits at ascending positions of input_ids.");
}

/// A callback that also lets Ctrl-C through.
ContextCallback interruptible(ContextCallback callback) {
  return [callback = std::move(callback)](const ContextProgress& progress) {
    {
      const py::gil_scoped_acquire locked;
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
    if (callback) callback(progress);
  };
}

Context save_context(Engine& self, const py::object& input_ids, const std::string& path,
                     const OptionalRopeLength& rope_length, int64_t checkpoint_tokens,
                     const ContextCallback& progress) {
  std::vector<int32_t> ids = to_token_ids(input_ids, "input_ids");
  std::optional<RopeLength> length;
  if (rope_length) length = rope_length_from_python(*rope_length, "rope_length");
  const ContextCallback callback = interruptible(progress);
  py::gil_scoped_release release;
  return self.save_context(std::move(ids), path, length, checkpoint_tokens, callback);
}

Context load_context(Engine& self, const std::string& path, const ContextCallback& progress) {
  const ContextCallback callback = interruptible(progress);
  py::gil_scoped_release release;
  return self.load_context(path, callback);
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
  bind_requests(m);
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
      .def("submit", &submit, py::arg("requests"), py::arg("signal") = py::none(), Unlocked(),
           "Queues requests that enter together, so that where nothing else runs each meets the "
           "same company every time; all, or none where one is refused. signal: notified whenever "
           "one of them moves on.")
      .def("check", &Engine::check, py::arg("request"), Unlocked(),
           "Raises what submit() would, without queuing anything.")
      .def("generate", submit_made_by(&generate_request), py::arg("input_ids"),
           py::arg("config") = GenerationConfig(), py::arg("rope_length") = py::none(),
           py::arg("token_nll") = false, "submit() of one Request.generate().")
      .def("score", submit_made_by(&score_request), py::arg("input_ids"),
           py::arg("token_nll") = false, "submit() of one Request.score().")
      .def("logits", submit_made_by(&logits_request), py::arg("input_ids"), py::arg("positions"),
           "submit() of one Request.logits().")
      .def("save_context", &save_context, py::arg("input_ids"), py::arg("path"),
           py::arg("rope_length") = py::none(), py::arg("checkpoint_tokens") = 0,
           py::arg("progress") = py::none(),
           "Computes the keys and values of input_ids, as far as they are not cached, and writes "
           "them to a file, which it goes on from and writes after each checkpoint_tokens tokens "
           "too; what progress(ContextProgress) raises ends it and leaves no half file.")
      .def("load_context", &load_context, py::arg("path"), py::arg("progress") = py::none(),
           "Reads such a file into the prefix cache: prompts that begin with its token_ids, under "
           "a profile of the same values, compute only what follows.")
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
