// Generates greedily from token ids, without Python:
//   embed MODEL_DIR MAX_NEW_TOKENS ID [ID ...]
// prints the generated ids on one line; progress goes to stderr.
#include <longspan/engine.h>
#include <longspan/error.h>

#include <cstdio>
#include <cstdlib>

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: %s MODEL_DIR MAX_NEW_TOKENS ID [ID ...]\n", argv[0]);
    return 2;
  }
  try {
    auto engine = longspan::Engine::load(argv[1]);
    std::fprintf(stderr, "%s, %s\n", engine->model().architecture.c_str(),
                 engine->model().backend.c_str());

    longspan::Request request;
    request.generation.max_new_tokens = std::atoll(argv[2]);
    for (int i = 3; i < argc; ++i) request.input_ids.push_back(std::atoi(argv[i]));

    const auto output = engine->run(request, [](const longspan::Progress& progress) {
      std::fprintf(stderr, "prefill %lld of %lld tokens, %lld generated\n",
                   static_cast<long long>(progress.prefill_done),
                   static_cast<long long>(progress.prefill_total),
                   static_cast<long long>(progress.generated));
    });
    for (int32_t id : output.token_ids) std::printf("%d ", id);
    std::printf("\n");
  } catch (const longspan::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
