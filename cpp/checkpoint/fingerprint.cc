#include "checkpoint/fingerprint.h"

#include <algorithm>
#include <iomanip>
#include <sstream>
#include <string_view>

namespace longspan {
namespace {

/// Of a tensor: this many pieces, evenly spaced, the first and the last byte included.
constexpr int64_t kPieces = 4;
constexpr int64_t kPieceBytes = 1024;

/// FNV-1a, 64 bits (http://www.isthe.com/chongo/tech/comp/fnv).
class Hash {
 public:
  void add(std::string_view bytes) {
    for (const char c : bytes) {
      state_ = (state_ ^ static_cast<unsigned char>(c)) * 0x100000001b3U;
    }
  }
  uint64_t state() const { return state_; }

 private:
  uint64_t state_ = 0xcbf29ce484222325U;
};

/// What enters keys and values of the config.
std::string describe(const ModelConfig& config) {
  // Every field is named, so that a new one does not compile until it is decided here.
  const auto& [architecture, vocab_size, hidden_size, intermediate_size, num_layers, num_heads,
               num_kv_heads, head_dim, rms_norm_eps, tie_word_embeddings, qkv_bias, o_bias,
               mlp_bias, qk_norm, sliding_window, max_position_embeddings, rope, eos_token_ids] =
      config;
  std::ostringstream out;
  out << std::hexfloat << architecture;
  for (const int64_t value : {vocab_size, hidden_size, intermediate_size, num_layers, num_heads,
                              num_kv_heads, head_dim, sliding_window}) {
    out << ' ' << value;
  }
  for (const bool value : {tie_word_embeddings, qkv_bias, o_bias, mlp_bias, qk_norm}) {
    out << ' ' << value;
  }
  out << ' ' << rms_norm_eps;
  return out.str();
}

}  // namespace

std::string fingerprint(const ModelConfig& config, const Checkpoint& checkpoint) {
  Hash hash;
  hash.add(describe(config));
  for (const std::string& name : checkpoint.names()) {
    const RawTensor tensor = checkpoint.raw(name);
    std::ostringstream out;
    out << '\n' << name << ' ' << tensor.dtype;
    for (const int64_t size : tensor.shape) out << ' ' << size;
    hash.add(out.str());
    const std::string_view bytes(reinterpret_cast<const char*>(tensor.bytes.data()),
                                 tensor.bytes.size());
    const int64_t last = std::max<int64_t>(std::ssize(bytes) - kPieceBytes, 0);
    for (int64_t i = 0; i < kPieces; ++i) {
      hash.add(bytes.substr(static_cast<size_t>(last * i / (kPieces - 1)), kPieceBytes));
    }
  }
  std::ostringstream out;
  out << std::hex << std::setfill('0') << std::setw(16) << hash.state();
  return out.str();
}

}  // namespace longspan
