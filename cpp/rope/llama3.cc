#include <numbers>

#include "core/check.h"
#include "rope/methods.h"
#include "rope/parameters.h"

namespace longspan::rope {
namespace {

/// Llama 3.1's scaling (rope_type "llama3" of HF transformers), the same at every length: pairs
/// that turn fewer than low_freq_factor times within the original length are slowed by the factor,
/// those that turn more than high_freq_factor times are left, and those between are mixed linearly
/// in the number of turns.
class Llama3 final : public RopeMethod {
 public:
  explicit Llama3(const RopeParameters& parameters)
      : parameters_(parameters),
        factor_(scaling_factor(parameters)),
        low_(number(parameters, "low_freq_factor", 1 / kMaxFactor, kMaxFactor)),
        high_(number(parameters, "high_freq_factor", 1 / kMaxFactor, kMaxFactor)),
        original_(original_length(parameters)) {
    require<InvalidArgument>(
        high_ > low_, "rope_type llama3: high_freq_factor: expected more than low_freq_factor (",
        low_, "), got ", high_);
  }

  RopeProfile profile(int64_t length) const override {
    RopeProfile profile = unscaled_profile(parameters_, length);
    for (double& frequency : profile.inv_freq) {
      const double turns = static_cast<double>(original_) * frequency / (2 * std::numbers::pi);
      if (turns > high_) continue;
      const double kept = turns < low_ ? 0.0 : (turns - low_) / (high_ - low_);
      frequency = (1.0 - kept) * frequency / factor_ + kept * frequency;
    }
    profile.factor = factor_;
    return profile;
  }
  bool depends_on_length() const override { return false; }
  std::string describe() const override {
    return message("factor ", factor_, ", original length ", original_, " tokens");
  }

 private:
  const RopeParameters parameters_;
  const double factor_;
  const double low_;
  const double high_;
  const int64_t original_;
};

}  // namespace

MethodEntry llama3_method() {
  return {"llama3",
          {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
          [](const RopeParameters& p) -> std::unique_ptr<RopeMethod> {
            return std::make_unique<Llama3>(p);
          }};
}

}  // namespace longspan::rope
