#include <algorithm>
#include <cmath>
#include <optional>

#include "core/check.h"
#include "rope/methods.h"
#include "rope/parameters.h"

namespace longspan::rope {
namespace {

/// LongRoPE (Ding et al. 2024, arXiv:2402.13753; rope_type "longrope" of HF transformers): each
/// pair has a divisor of its own, from one list up to the original length and from another beyond
/// it, and queries and keys are scaled by sqrt(1 + ln(factor) / ln(original length)) at every
/// length.
/// A factor of "auto" is max(1, length / original length), chosen for each request, so that up to
/// the original length there is no such scale.
class LongRope final : public RopeMethod {
 public:
  explicit LongRope(const RopeParameters& parameters)
      : parameters_(parameters),
        short_(divisors(parameters, "short_factor")),
        long_(divisors(parameters, "long_factor")),
        factor_(scaling_factor_or_auto(parameters)),
        attention_factor_(optional_number(parameters, "attention_factor", 1 / kMaxFactor, 1e3)),
        original_(original_length(parameters)) {
    require<InvalidArgument>(original_ >= 2,
                             "rope_type longrope: original_max_position_embeddings: expected an "
                             "integer >= 2, got ",
                             original_);
    parameters_.native_length = original_;
  }

  RopeProfile profile(int64_t length) const override {
    RopeProfile profile = unscaled_profile(parameters_, length);
    const bool beyond = length > original_;
    const std::vector<double>& list = beyond ? long_ : short_;
    for (size_t i = 0; i < list.size(); ++i) profile.inv_freq[i] /= list[i];
    if (!factor_ && !beyond) return profile;
    profile.factor =
        factor_ ? *factor_ : static_cast<double>(length) / static_cast<double>(original_);
    profile.attention_factor = attention_factor_.value_or(
        std::sqrt(1.0 + std::log(profile.factor) / std::log(static_cast<double>(original_))));
    return profile;
  }
  bool depends_on_length() const override { return true; }
  std::string describe() const override {
    const std::string factor =
        factor_ ? message("factor ", *factor_) : message("factor auto: length / ", original_);
    return message(factor, ", long list past ", original_, " tokens");
  }

 private:
  RopeParameters parameters_;
  const std::vector<double> short_;     // [rotary_dim / 2]
  const std::vector<double> long_;      // [rotary_dim / 2]
  const std::optional<double> factor_;  // none: auto
  const std::optional<double> attention_factor_;
  const int64_t original_;
};

}  // namespace

MethodEntry longrope_method() {
  return {"longrope",
          {"short_factor", "long_factor", "factor", "attention_factor",
           "original_max_position_embeddings"},
          [](const RopeParameters& p) -> std::unique_ptr<RopeMethod> {
            return std::make_unique<LongRope>(p);
          }};
}

}  // namespace longspan::rope
