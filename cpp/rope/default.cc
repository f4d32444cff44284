#include "rope/methods.h"

namespace longspan::rope {
namespace {

/// The rotary embedding as trained, at every length (Su et al. 2021, RoFormer).
class Default final : public RopeMethod {
 public:
  explicit Default(const RopeParameters& parameters) : parameters_(parameters) {}

  RopeProfile profile(int64_t length) const override {
    return unscaled_profile(parameters_, length);
  }
  bool depends_on_length() const override { return false; }
  std::string describe() const override { return "unscaled"; }

 private:
  const RopeParameters parameters_;
};

}  // namespace

MethodEntry default_method() {
  return {"default", {}, [](const RopeParameters& parameters) -> std::unique_ptr<RopeMethod> {
            return std::make_unique<Default>(parameters);
          }};
}

}  // namespace longspan::rope
