#include "core/check.h"
#include "rope/methods.h"
#include "rope/parameters.h"

namespace longspan::rope {
namespace {

/// Position interpolation: positions, so frequencies, divided by the factor at every length
/// (Chen et al. 2023, arXiv:2306.15595; rope_type "linear" of HF transformers).
class Linear final : public RopeMethod {
 public:
  explicit Linear(const RopeParameters& parameters)
      : parameters_(parameters), factor_(scaling_factor(parameters)) {}

  RopeProfile profile(int64_t length) const override {
    RopeProfile profile = unscaled_profile(parameters_, length);
    for (double& frequency : profile.inv_freq) frequency /= factor_;
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

MethodEntry linear_method() {
  return {"linear", {"factor"}, [](const RopeParameters& p) -> std::unique_ptr<RopeMethod> {
            return std::make_unique<Linear>(p);
          }};
}

}  // namespace longspan::rope
