#include "model/shard.h"

#include <gtest/gtest.h>

#include <fstream>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>

#include "backend/registry.h"
#include "longspan/error.h"
#include "model/weights.h"
#include "support/expect_throw.h"
#include "support/tiny_llama.h"

namespace longspan {
namespace {

/// Sets elements of a tensor of a tiny model to NaN: all but rows x cols.
void poison_all_but(const std::string& file, const std::string& tensor, Share rows, Share cols) {
  std::fstream io(file, std::ios::in | std::ios::out | std::ios::binary);
  uint64_t size = 0;
  io.read(reinterpret_cast<char*>(&size), sizeof(size));
  std::string header(size, ' ');
  io.read(header.data(), static_cast<std::streamsize>(size));
  const auto json = nlohmann::json::parse(header).at(tensor);
  const int64_t width = json["shape"][1];
  const int64_t height = json["shape"][0];
  const int64_t begin = 8 + static_cast<int64_t>(size) + json["data_offsets"][0].get<int64_t>();
  const float bad = std::numeric_limits<float>::quiet_NaN();
  for (int64_t r = 0; r < height; ++r) {
    for (int64_t c = 0; c < width; ++c) {
      if (r >= rows.begin && r < rows.end && c >= cols.begin && c < cols.end) continue;
      io.seekp(begin + (r * width + c) * 4);
      io.write(reinterpret_cast<const char*>(&bad), sizeof(bad));
    }
  }
}

/// Of four ranks, cp of which share a context.
void expect_slices_alone_are_read(int cp) {
  constexpr int kSize = 4;
  const test::TinyLlama shape = {.intermediate_size = 96, .num_heads = 8, .num_kv_heads = 2};
  for (int rank = 0; rank < kSize; ++rank) {
    const test::ModelDir dir(shape);
    const ModelConfig model = read_model_config(dir.path(), "", 0.0, config_dialect);
    const Shard shard(model, rank, kSize, cp);
    // By hand: two query heads of 8 dims to a rank, or four to two that share a context; one KV
    // head to two ranks, 24 of 96, and of 97 tokens 24, 24, 24 and 25.
    const Share q =
        cp == 1 ? Share{rank * 16, rank * 16 + 16} : Share{rank / 2 * 32, rank / 2 * 32 + 32};
    const Share kv = {rank / 2 * 8, rank / 2 * 8 + 8};
    const Share inner = {rank * 24, rank * 24 + 24};
    const Share tokens = {rank * 24, rank == 3 ? 97 : rank * 24 + 24};
    const Share hidden = {0, 48};
    const std::string file = dir.path() + "/model.safetensors";
    poison_all_but(file, "model.embed_tokens.weight", tokens, hidden);
    for (int64_t i = 0; i < shape.num_layers; ++i) {
      const std::string layer = "model.layers." + std::to_string(i) + ".";
      poison_all_but(file, layer + "self_attn.q_proj.weight", q, hidden);
      poison_all_but(file, layer + "self_attn.k_proj.weight", kv, hidden);
      poison_all_but(file, layer + "self_attn.v_proj.weight", kv, hidden);
      poison_all_but(file, layer + "self_attn.o_proj.weight", hidden, q);
      poison_all_but(file, layer + "mlp.gate_proj.weight", inner, hidden);
      poison_all_but(file, layer + "mlp.up_proj.weight", inner, hidden);
      poison_all_but(file, layer + "mlp.down_proj.weight", hidden, inner);
    }
    const auto checkpoint = Checkpoint::open(dir.path());
    const auto backend = make_backend("cpu", "float32", 1);
    int64_t read = 0;
    load_weights(model, *checkpoint, *backend, shard, LinearDType::kNative, 1,
                 [&](int64_t done, int64_t) { read = done; });
    const int64_t layer = 48 * (q.size() + 2 * kv.size() + q.size() + 3 * inner.size() + 2);
    EXPECT_EQ(read, 4 * (shape.num_layers * layer + 48 * tokens.size() + 48));
    // What another rank would read is bad, as it must be for this test to mean anything.
    test::expect_throw<CheckpointError>(
        [&] {
          load_weights(model, *checkpoint, *backend, Shard(model, (rank + 2) % kSize, kSize, cp),
                       LinearDType::kNative, 1, {});
        },
        "expected finite values");
  }
}

TEST(Shard, ARankReadsItsSliceAndNothingElse) { expect_slices_alone_are_read(1); }
TEST(Shard, ARankThatSharesAContextReadsTheHeadsOfItsGroup) { expect_slices_alone_are_read(2); }

TEST(Shard, SizesThatDivideTheModel) {
  ModelConfig smollm2;
  smollm2.vocab_size = 49152;
  smollm2.num_heads = 9;
  smollm2.num_kv_heads = 3;
  smollm2.intermediate_size = 1536;
  EXPECT_EQ(possible_tp(smollm2), (std::vector<int>{1, 3}));
  EXPECT_EQ(possible_tp(smollm2, 2), (std::vector<int>{2, 6}));
  EXPECT_EQ(possible_cp(smollm2, 6), (std::vector<int>{2, 6}));
  EXPECT_EQ(possible_cp(smollm2, 5), std::vector<int>{});
  ModelConfig llama;
  llama.vocab_size = 128256;
  llama.num_heads = 32;
  llama.num_kv_heads = 8;
  llama.intermediate_size = 14336;
  EXPECT_EQ(possible_tp(llama), (std::vector<int>{1, 2, 4, 8, 16, 32}));
  // Every query head meets the KV head of its group.
  for (const int size : possible_tp(llama)) {
    for (int rank = 0; rank < size; ++rank) {
      const Shard shard(llama, rank, size);
      EXPECT_EQ(shard.q_heads.size(), 32 / size);
      const int64_t group = shard.q_heads.size() / shard.kv_heads.size();
      for (int64_t h = 0; h < shard.q_heads.size(); ++h) {
        EXPECT_EQ((shard.q_heads.begin + h) / 4, shard.kv_heads.begin + h / group);
      }
    }
  }
}

TEST(Shard, RanksOfAContextHaveTheSameHeadsAndASplitOfAllElse) {
  ModelConfig llama;
  llama.vocab_size = 128256;
  llama.num_heads = 32;
  llama.num_kv_heads = 8;
  llama.intermediate_size = 14336;
  EXPECT_EQ(possible_cp(llama, 8), (std::vector<int>{1, 2, 4, 8}));
  for (int rank = 0; rank < 8; ++rank) {
    const Shard shard(llama, rank, 8, 2);
    const Shard heads(llama, rank / 2, 4);
    const Shard rest(llama, rank, 8);
    EXPECT_EQ(shard.q_heads.begin, heads.q_heads.begin);
    EXPECT_EQ(shard.q_heads.end, heads.q_heads.end);
    EXPECT_EQ(shard.kv_heads.begin, heads.kv_heads.begin);
    EXPECT_EQ(shard.kv_heads.end, heads.kv_heads.end);
    EXPECT_EQ(shard.inner.begin, rest.inner.begin);
    EXPECT_EQ(shard.tokens.begin, rest.tokens.begin);
    EXPECT_EQ(shard.context_rank, rank % 2);
  }
}

}  // namespace
}  // namespace longspan
