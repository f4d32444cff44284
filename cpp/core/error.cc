#include "longspan/error.h"

#include "core/check.h"

namespace longspan {

ContextTooLong::ContextTooLong(int64_t prompt_tokens, int64_t session_len, int64_t kv_capacity)
    : Error(message("expected a prompt of at most ",
                    session_len < kv_capacity ? session_len : kv_capacity, " tokens (session_len ",
                    session_len, ", KV capacity ", kv_capacity, "), got ", prompt_tokens)),
      prompt_tokens_(prompt_tokens),
      session_len_(session_len),
      kv_capacity_(kv_capacity) {}

}  // namespace longspan
