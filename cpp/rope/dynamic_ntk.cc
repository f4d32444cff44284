#include <cmath>

#include "core/check.h"
#include "rope/methods.h"
#include "rope/parameters.h"

namespace longspan::rope {
namespace {

/// Dynamic NTK: past the native length L, a sequence of n tokens turns with the base
///   theta * (factor * n / L - (factor - 1))^(D / (D - 2)),
/// and within it as trained (rope_type "dynamic" of HF transformers; the exponent is from
/// "NTK-aware scaled RoPE", r/LocalLLaMA 2023, cited in Peng et al. 2023, arXiv:2309.00071). A
/// factor of 1 scales too: the base then grows with n / L.
class DynamicNtk final : public RopeMethod {
 public:
  explicit DynamicNtk(const RopeParameters& parameters)
      : parameters_(parameters), factor_(scaling_factor(parameters)) {
    require<InvalidArgument>(parameters.rotary_dim >= 4,
                             "rope_type dynamic: rotary dimension: expected at least 4, got ",
                             parameters.rotary_dim);
  }

  RopeProfile profile(int64_t length) const override {
    RopeProfile profile = unscaled_profile(parameters_, length);
    if (length <= parameters_.native_length) return profile;
    const double dim = static_cast<double>(parameters_.rotary_dim);
    const double stretch =
        factor_ * static_cast<double>(length) / static_cast<double>(parameters_.native_length) -
        (factor_ - 1.0);
    profile.base = parameters_.theta * std::pow(stretch, dim / (dim - 2.0));
    profile.inv_freq = inverse_frequencies(profile.base, parameters_.rotary_dim);
    profile.factor = factor_;
    return profile;
  }
  bool depends_on_length() const override { return true; }
  std::string describe() const override {
    return message("factor ", factor_, " past ", parameters_.native_length, " tokens");
  }

 private:
  const RopeParameters parameters_;
  const double factor_;
};

}  // namespace

MethodEntry dynamic_ntk_method() {
  return {"dynamic", {"factor"}, [](const RopeParameters& p) -> std::unique_ptr<RopeMethod> {
            return std::make_unique<DynamicNtk>(p);
          }};
}

}  // namespace longspan::rope
