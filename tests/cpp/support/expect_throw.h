#pragma once

#include <gtest/gtest.h>

#include <exception>
#include <functional>
#include <string>

namespace longspan::test {

/// Expects an E, with `part` in its message.
template <class E>
void expect_throw(const std::function<void()>& action, const std::string& part) {
  try {
    action();
    ADD_FAILURE() << "nothing thrown; expected: " << part;
  } catch (const E& error) {
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos)
        << "expected: " << part << "\ngot: " << error.what();
  } catch (const std::exception& error) {
    ADD_FAILURE() << "another type thrown; expected: " << part << "\ngot: " << error.what();
  }
}

}  // namespace longspan::test
