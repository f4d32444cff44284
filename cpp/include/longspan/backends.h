#pragma once

#include <string>
#include <vector>

#include "longspan/export.h"

namespace longspan {

/// One backend as seen from here.
struct BackendInfo {
  std::string name;  ///< "cpu", "cuda"
  bool available = false;
  std::string detail;  ///< available: instruction sets or device; else why not
};

/// Every backend this build knows, available or not.
LONGSPAN_API std::vector<BackendInfo> backends();

/// "0.1.0"
LONGSPAN_API const char* version();

}  // namespace longspan
