#include "parallel/launch.h"

#include <charconv>
#include <cstdlib>
#include <string_view>

#include "core/check.h"

namespace longspan {
namespace {

struct Names {
  const char* rank;
  const char* size;
  const char* local_rank;
  const char* local_size;
};
constexpr Names kLaunchers[] = {
    {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"},
    {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
     "OMPI_COMM_WORLD_LOCAL_SIZE"},
    {"SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"},
};
constexpr int kMaxRanks = 1 << 16;
constexpr int kMaxPort = 65535;
constexpr int kMasterPort = 29500;  // torchrun's default

/// A variable's number in [least, most]; fallback where it is not set.
int number(const char* name, int fallback, int least, int most) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') return fallback;
  const std::string_view view(text);
  int value = 0;
  const auto [end, error] = std::from_chars(view.data(), view.data() + view.size(), value);
  require<InvalidArgument>(
      error == std::errc() && end == view.data() + view.size() && value >= least && value <= most,
      name, ": expected an integer in [", least, ", ", most, "], got \"", view, "\"");
  return value;
}

bool is_set(const char* name) {
  const char* text = std::getenv(name);
  return text != nullptr && *text != '\0';
}

}  // namespace

Launch read_launch() {
  Launch launch;
  for (const Names& names : kLaunchers) {
    if (!is_set(names.rank) || !is_set(names.size)) continue;
    launch.size = number(names.size, 1, 1, kMaxRanks);
    launch.rank = number(names.rank, 0, 0, launch.size - 1);
    launch.local_rank = number(names.local_rank, launch.rank, 0, kMaxRanks);
    launch.local_size = number(names.local_size, launch.size, 1, kMaxRanks);
    break;
  }
  if (is_set("MASTER_ADDR")) launch.address = std::getenv("MASTER_ADDR");
  const int after_master = number("MASTER_PORT", kMasterPort, 1, kMaxPort - 1) + 1;
  launch.port = number("LONGSPAN_PORT", after_master, 1, kMaxPort);
  return launch;
}

}  // namespace longspan
