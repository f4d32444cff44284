#include "core/check.h"
#include "rope/methods.h"
#include "rope/parameters.h"

namespace longspan::rope {
namespace {

/// Partial rotation by frequency (rope_type "proportional" of HF transformers): the pairs are those
/// of a head that rotates whole, the first rotary_dim / 2 of them turn, divided by the factor, and
/// the rest stand still.
class Proportional final : public RopeMethod {
 public:
  explicit Proportional(const RopeParameters& parameters)
      : parameters_(parameters), factor_(number_or(parameters, "factor", 1.0, 1.0, kMaxFactor)) {}

  RopeProfile profile(int64_t length) const override {
    RopeProfile profile = unscaled_profile(parameters_, length);
    profile.inv_freq = inverse_frequencies(parameters_.theta, parameters_.head_dim);
    for (size_t i = 0; i < profile.inv_freq.size(); ++i) {
      const bool turns = static_cast<int64_t>(i) < parameters_.rotary_dim / 2;
      profile.inv_freq[i] = turns ? profile.inv_freq[i] / factor_ : 0.0;
    }
    profile.factor = factor_;
    return profile;
  }
  bool depends_on_length() const override { return false; }
  std::string describe() const override { return message("factor ", factor_); }

 private:
  const RopeParameters parameters_;
  const double factor_;
};

}  // namespace

MethodEntry proportional_method() {
  return {"proportional", {"factor"}, [](const RopeParameters& p) -> std::unique_ptr<RopeMethod> {
            return std::make_unique<Proportional>(p);
          }};
}

}  // namespace longspan::rope
