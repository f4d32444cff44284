#include "longspan/error.h"

#include <gtest/gtest.h>

namespace longspan {
namespace {

TEST(ContextTooLong, NamesTheLargestPromptThatFits) {
  const ContextTooLong by_session(9000, 8192, 20000);
  EXPECT_STREQ(
      by_session.what(),
      "expected a prompt of at most 8192 tokens (session_len 8192, KV capacity 20000), got 9000");
  EXPECT_EQ(by_session.prompt_tokens(), 9000);
  EXPECT_EQ(by_session.session_len(), 8192);
  EXPECT_EQ(by_session.kv_capacity(), 20000);

  const ContextTooLong by_capacity(9000, 16384, 4096);
  EXPECT_STREQ(
      by_capacity.what(),
      "expected a prompt of at most 4096 tokens (session_len 16384, KV capacity 4096), got 9000");
}

}  // namespace
}  // namespace longspan
