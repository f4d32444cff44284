#include <algorithm>
#include <cmath>
#include <numbers>
#include <optional>

#include "core/check.h"
#include "rope/methods.h"
#include "rope/parameters.h"

namespace longspan::rope {
namespace {

constexpr double kBetaFast = 32.0;  // turns within the original length; the paper's for Llama
constexpr double kBetaSlow = 1.0;

/// The temperature of Peng et al. 2023 (arXiv:2309.00071), equation 22: 0.1 weight ln(factor) + 1.
double temperature(double factor, double weight) {
  return factor <= 1.0 ? 1.0 : 0.1 * weight * std::log(factor) + 1.0;
}

/// YaRN (Peng et al. 2023, arXiv:2309.00071; rope_type "yarn" of HF transformers): pairs that turn
/// often within the original length keep their frequency, those that turn less than about once are
/// slowed by the factor, those between are mixed along a ramp over the pair's index; and queries
/// and keys are scaled by an attention factor.
/// A factor of "auto" is length / original length, chosen for each request: within the original
/// length the model is left as trained, and the attention factor follows (Dynamic YaRN of the
/// paper's section 3.3).
class Yarn final : public RopeMethod {
 public:
  explicit Yarn(const RopeParameters& parameters)
      : parameters_(parameters),
        factor_(scaling_factor_or_auto(parameters)),
        attention_factor_(optional_number(parameters, "attention_factor", 1 / kMaxFactor, 1e3)),
        original_(original_length(parameters)) {
    require<InvalidArgument>(parameters.extra.contains("factor"),
                             "rope_type yarn: factor: expected \"auto\" or a number in [1, 1e6], "
                             "got nothing");
    require<InvalidArgument>(parameters.theta > 1.0,
                             "rope_type yarn: rope_theta: expected a number > 1, got ",
                             parameters.theta);
    // To transformers a zero is absent in these four.
    const auto or_default = [&](const char* key, double fallback) {
      const double value = number_or(parameters, key, 0.0, 0.0, kMaxFactor);
      return value == 0.0 ? fallback : value;
    };
    mscale_ = or_default("mscale", 0.0);
    mscale_all_dim_ = or_default("mscale_all_dim", 0.0);
    const double beta_fast = or_default("beta_fast", kBetaFast);
    const double beta_slow = or_default("beta_slow", kBetaSlow);
    require<InvalidArgument>(beta_fast >= beta_slow,
                             "rope_type yarn: beta_fast: expected at least beta_slow (", beta_slow,
                             "), got ", beta_fast);
    set_ramp(beta_fast, beta_slow, boolean_or(parameters, "truncate", true));
    if (!factor_) parameters_.native_length = original_;
  }

  RopeProfile profile(int64_t length) const override {
    RopeProfile profile = unscaled_profile(parameters_, length);
    if (!factor_ && length <= original_) return profile;
    profile.factor =
        factor_ ? *factor_ : static_cast<double>(length) / static_cast<double>(original_);
    profile.attention_factor = attention_factor(profile.factor);
    for (size_t i = 0; i < profile.inv_freq.size(); ++i) {
      const double ramp =
          std::clamp((static_cast<double>(i) - ramp_low_) / (ramp_high_ - ramp_low_), 0.0, 1.0);
      const double frequency = profile.inv_freq[i];
      profile.inv_freq[i] = frequency / profile.factor * ramp + frequency * (1.0 - ramp);
    }
    return profile;
  }
  bool depends_on_length() const override { return !factor_; }
  std::string describe() const override {
    if (!factor_)
      return message("factor auto: length / ", original_, " past ", original_, " tokens");
    return message("factor ", *factor_, ", attention factor ", attention_factor(*factor_),
                   ", original length ", original_, " tokens");
  }

 private:
  double attention_factor(double factor) const {
    if (attention_factor_) return *attention_factor_;
    if (mscale_ == 0.0 || mscale_all_dim_ == 0.0) return temperature(factor, 1.0);
    return temperature(factor, mscale_) / temperature(factor, mscale_all_dim_);
  }

  /// From which pair to which the frequencies are mixed: those that turn beta_fast and beta_slow
  /// times within the original length, outward to whole pairs where truncated.
  void set_ramp(double beta_fast, double beta_slow, bool truncate) {
    const auto dim = static_cast<double>(parameters_.rotary_dim);
    const auto pair_turning = [&](double turns) {
      return dim * std::log(static_cast<double>(original_) / (turns * 2 * std::numbers::pi)) /
             (2 * std::log(parameters_.theta));
    };
    const double low = pair_turning(beta_fast);
    const double high = pair_turning(beta_slow);
    ramp_low_ = std::max(truncate ? std::floor(low) : low, 0.0);
    ramp_high_ = std::min(truncate ? std::ceil(high) : high, dim - 1.0);
    if (ramp_low_ == ramp_high_) ramp_high_ += 0.001;  // as transformers does
  }

  RopeParameters parameters_;
  const std::optional<double> factor_;  // none: auto
  const std::optional<double> attention_factor_;
  const int64_t original_;
  double mscale_ = 0.0;  // 0: absent
  double mscale_all_dim_ = 0.0;
  double ramp_low_ = 0.0;
  double ramp_high_ = 0.0;
};

}  // namespace

MethodEntry yarn_method() {
  return {"yarn",
          {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
           "original_max_position_embeddings", "truncate"},
          [](const RopeParameters& p) -> std::unique_ptr<RopeMethod> {
            return std::make_unique<Yarn>(p);
          }};
}

}  // namespace longspan::rope
