#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "longspan/export.h"

namespace longspan {

/// Base of every error the library throws. Messages read "expected ..., got ..." and are the same
/// in C++ and Python. The host process is never aborted.
class LONGSPAN_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// An option or argument is out of range or of the wrong form. Python: also a ValueError.
class LONGSPAN_API InvalidArgument : public Error {
 public:
  using Error::Error;
};

/// The option, architecture or format is known but this build does not do it. Python: also a
/// NotImplementedError.
class LONGSPAN_API Unsupported : public Error {
 public:
  using Error::Error;
};

/// A model file is missing, malformed, truncated or hostile; the message names file and field.
class LONGSPAN_API CheckpointError : public Error {
 public:
  using Error::Error;
};

/// The prompt does not fit the session. Raised before any work. Python: also a ValueError.
class LONGSPAN_API ContextTooLong : public Error {
 public:
  /// All lengths in tokens. kv_capacity is what the whole block pool can hold.
  ContextTooLong(int64_t prompt_tokens, int64_t session_len, int64_t kv_capacity);

  int64_t prompt_tokens() const { return prompt_tokens_; }
  int64_t session_len() const { return session_len_; }
  int64_t kv_capacity() const { return kv_capacity_; }

 private:
  int64_t prompt_tokens_;
  int64_t session_len_;
  int64_t kv_capacity_;
};

/// The engine or a request can never fit the memory there is; the message names the largest size
/// that would. Python: also a MemoryError.
class LONGSPAN_API CapacityError : public Error {
 public:
  using Error::Error;
};

/// The device or its library is absent; the message says what to install.
class LONGSPAN_API BackendUnavailable : public Error {
 public:
  using Error::Error;
};

/// A request produced NaN or infinite logits. Only that request ends.
class LONGSPAN_API NumericalError : public Error {
 public:
  using Error::Error;
};

/// Another rank of a group failed or was lost; the message names the rank and what
/// happened to it. Only the requests of the step end.
class LONGSPAN_API ParallelError : public Error {
 public:
  using Error::Error;
};

/// The engine was closed while the request was waiting or running, or before it was submitted.
class LONGSPAN_API EngineClosed : public Error {
 public:
  using Error::Error;
};

}  // namespace longspan
