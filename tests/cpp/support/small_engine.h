#pragma once

#include <cstdint>

#include "longspan/config.h"
#include "longspan/request.h"

namespace longspan::test {

/// An engine for a TinyLlama: four sequences of at most 512 tokens.
inline EngineConfig small_config() {
  EngineConfig config;
  config.device = "cpu";  // bit for bit is the CPU's promise
  config.dtype = "float32";
  config.num_threads = 2;
  config.session_len = 512;
  config.max_batch_size = 4;
  return config;
}

/// A generation from `tokens` ids in [0, 97), of a sequence of their own for each offset.
inline Request prompt_of(int64_t tokens, int64_t max_new_tokens, int32_t offset = 0) {
  Request request;
  for (int64_t i = 0; i < tokens; ++i) {
    request.input_ids.push_back(static_cast<int32_t>((i * i * 7 + i * 3 + offset) % 97));
  }
  request.generation.max_new_tokens = max_new_tokens;
  return request;
}

}  // namespace longspan::test
