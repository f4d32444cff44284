#include <pybind11/numpy.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>

#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "bindings/request_view.h"
#include "longspan/signal.h"

namespace longspan::bindings {
namespace {

/// A result that lives in the request's state, which the handle keeps alive: nothing is copied.
struct OutputView {
  HandleView source;
  const RequestOutput* output;
};

const char* finish_reason_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone:
      return "none";
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kContextFull:
      return "context_full";
    case FinishReason::kCancelled:
      return "cancelled";
  }
  return "unknown";
}

/// Calls wait(slice), which waits, without the GIL until it returns true or the time is over; wakes
/// ten times a second for signals, so that Ctrl-C works. False when the time is over.
template <class Wait>
bool wait_in_slices(double timeout_s, Wait wait) {
  using Clock = std::chrono::steady_clock;
  constexpr double kSignalPeriodS = 0.1;
  constexpr double kForeverS = 1e9;
  if (std::isnan(timeout_s)) throw InvalidArgument("timeout_s: expected seconds, got nan");
  const auto end =
      Clock::now() + std::chrono::duration_cast<Clock::duration>(
                         std::chrono::duration<double>(std::clamp(timeout_s, 0.0, kForeverS)));
  while (true) {
    const double left_s = std::chrono::duration<double>(end - Clock::now()).count();
    const auto slice = std::chrono::milliseconds(
        static_cast<int64_t>(std::ceil(1000 * std::clamp(left_s, 0.0, kSignalPeriodS))));
    {
      py::gil_scoped_release release;
      if (wait(slice)) return true;
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (left_s <= kSignalPeriodS) return false;
  }
}

bool wait_for(const HandleView& self, double timeout_s) {
  return wait_in_slices(timeout_s, [&](auto slice) { return self.handle.wait_for(slice); });
}

bool wait_for_tokens(const HandleView& self, int64_t count, double timeout_s) {
  return wait_in_slices(timeout_s,
                        [&](auto slice) { return self.handle.wait_for_tokens(count, slice); });
}

/// [tokens][1 + n] as lists of (token, log probability).
std::vector<std::vector<std::pair<int32_t, float>>> split_logprobs(
    const std::vector<TokenLogprob>& flat, int64_t each) {
  std::vector<std::vector<std::pair<int32_t, float>>> result;
  for (size_t i = 0; i < flat.size(); ++i) {
    if (i % static_cast<size_t>(each) == 0) result.emplace_back();
    result.back().emplace_back(flat[i].token, flat[i].logprob);
  }
  return result;
}

OutputView wait(const HandleView& self) {
  while (!wait_for(self, 3600.0)) {
  }
  return {self, &self.handle.wait()};
}

py::array_t<float> logits_array(const py::object& self) {
  const auto& view = self.cast<const OutputView&>();
  const auto& logits = view.output->logits;
  const auto rows = static_cast<py::ssize_t>(view.source.logit_rows);
  const py::ssize_t columns = rows > 0 ? static_cast<py::ssize_t>(logits.size()) / rows : 0;
  return py::array_t<float>({rows, columns}, logits.data(), self);
}

py::array_t<double> token_nll_array(const py::object& self) {
  const auto& nll = self.cast<const OutputView&>().output->token_nll;
  return py::array_t<double>({static_cast<py::ssize_t>(nll.size())}, nll.data(), self);
}

template <typename Value>
auto output_field(Value RequestOutput::* member) {
  return [member](const OutputView& self) { return self.output->*member; };
}

void bind_output(py::module_& m) {
  ResultClass<OutputView>(m, "RequestOutput", "The result of a request.")
      .property("token_ids", output_field(&RequestOutput::token_ids))
      .property("logprobs",
                [](const OutputView& self) {
                  return split_logprobs(self.output->logprobs, self.source.logprobs_each);
                })
      .property(
          "finish_reason",
          [](const OutputView& self) { return finish_reason_name(self.output->finish_reason); })
      .property("stop_token_id", output_field(&RequestOutput::stop_token_id))
      .property("input_token_len", output_field(&RequestOutput::input_token_len))
      .property("cached_tokens", output_field(&RequestOutput::cached_tokens))
      .property("rope_profile", output_field(&RequestOutput::rope_profile))
      .property("seed", output_field(&RequestOutput::seed))
      .property("nll_sum", output_field(&RequestOutput::nll_sum))
      .property("nll_count", output_field(&RequestOutput::nll_count))
      .property("token_nll", &token_nll_array)
      .property("logits", &logits_array)
      .property("queue_s", output_field(&RequestOutput::queue_s))
      .property("prefill_s", output_field(&RequestOutput::prefill_s))
      .property("decode_s", output_field(&RequestOutput::decode_s));
}

}  // namespace

void bind_request(py::module_& m) {
  ResultClass<Progress>(m, "Progress", "Where a request stands: tokens and seconds.")
      .field("prefill_done", &Progress::prefill_done)
      .field("prefill_total", &Progress::prefill_total)
      .field("generated", &Progress::generated)
      .field("elapsed_s", &Progress::elapsed_s)
      .field("tokens_per_s", &Progress::tokens_per_s)
      .field("flops_per_s", &Progress::flops_per_s)
      .field("eta_s", &Progress::eta_s);

  bind_output(m);

  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<Signal, std::shared_ptr<Signal>>(
      m, "Signal",
      "Wakes one waiting thread whenever one of the requests it was given to moves on.")
      .def(py::init())
      .def(
          "wait_for",
          [](Signal& self, double timeout_s) {
            return wait_in_slices(timeout_s, [&](auto slice) { return self.wait_for(slice); });
          },
          py::arg("timeout_s"),
          "True as soon as something has moved since the last call; False when the time is over.")
      .def("notify", &Signal::notify, Unlocked(), "Something has moved.");

  py::class_<HandleView>(m, "RequestHandle", "Follows one request; outlives its engine.")
      .def("wait_for", &wait_for, py::arg("timeout_s"),
           "Waits until the request has finished or the time is over; True when it has finished.")
      .def("wait_for_tokens", &wait_for_tokens, py::arg("count"), py::arg("timeout_s"),
           "Waits for more than count tokens, the end or the time to be over; False when it is "
           "over.")
      .def("wait", &wait, "Waits for the end and returns the result, or raises what ended it.")
      .def(
          "tokens_from",
          [](const HandleView& self, int64_t start) { return self.handle.tokens_from(start); },
          py::arg("start"), Unlocked(), "Generated tokens from index start on; returns at once.")
      .def(
          "logprobs_from",
          [](const HandleView& self, int64_t start) {
            return split_logprobs(self.handle.logprobs_from(start), self.logprobs_each);
          },
          py::arg("start"),
          "Their log probabilities as lists of (token, log probability), the generated token "
          "first.")
      .def(
          "progress", [](const HandleView& self) { return self.handle.progress(); }, Unlocked())
      .def(
          "cancel", [](const HandleView& self) { self.handle.cancel(); }, Unlocked(),
          "Asks the engine to stop the request.");
}

}  // namespace longspan::bindings
