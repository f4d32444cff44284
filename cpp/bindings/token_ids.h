#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace longspan::bindings {

/// Token ids from a list, a numpy array of any integer dtype or anything with __array__ or a
/// buffer (a torch tensor): one dimension, values in [0, 2^31). `what` names the argument.
/// Throws InvalidArgument.
std::vector<int32_t> to_token_ids(const pybind11::handle& values, const char* what);

/// The same for positions: values in [0, 2^63).
std::vector<int64_t> to_positions(const pybind11::handle& values, const char* what);

}  // namespace longspan::bindings
