#include "parallel/launch.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <string>

#include "longspan/error.h"
#include "support/expect_throw.h"

namespace longspan {
namespace {

/// What read_launch() makes of an environment of these variables and no others that it reads.
Launch read(const std::map<std::string, std::string>& variables) {
  for (const char* name :
       {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
        "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE", "MASTER_ADDR",
        "MASTER_PORT", "LONGSPAN_PORT"}) {
    unsetenv(name);
  }
  for (const auto& [name, value] : variables) setenv(name.c_str(), value.c_str(), 1);
  return read_launch();
}

TEST(Launch, IsOneProcessWithoutALauncher) {
  EXPECT_EQ(read({}).size, 1);
  EXPECT_EQ(read({{"WORLD_SIZE", "4"}}).size, 1);    // of a shell, not of a process
  EXPECT_EQ(read({{"SLURM_NTASKS", "4"}}).size, 1);  // of an allocation
}

TEST(Launch, ReadsTheEnvironmentsOfThree) {
  const Launch torchrun = read({{"RANK", "5"},
                                {"WORLD_SIZE", "8"},
                                {"LOCAL_RANK", "1"},
                                {"LOCAL_WORLD_SIZE", "4"},
                                {"MASTER_ADDR", "node0"},
                                {"MASTER_PORT", "1234"}});
  EXPECT_EQ(torchrun.rank, 5);
  EXPECT_EQ(torchrun.size, 8);
  EXPECT_EQ(torchrun.local_rank, 1);
  EXPECT_EQ(torchrun.local_size, 4);
  EXPECT_EQ(torchrun.address, "node0");
  EXPECT_EQ(torchrun.port, 1235);
  const Launch mpirun = read({{"OMPI_COMM_WORLD_RANK", "1"},
                              {"OMPI_COMM_WORLD_SIZE", "2"},
                              {"OMPI_COMM_WORLD_LOCAL_RANK", "0"},
                              {"LONGSPAN_PORT", "77"}});
  EXPECT_EQ(mpirun.rank, 1);
  EXPECT_EQ(mpirun.local_rank, 0);
  EXPECT_EQ(mpirun.port, 77);
  const Launch srun = read({{"SLURM_PROCID", "3"}, {"SLURM_NTASKS", "4"}, {"SLURM_LOCALID", "3"}});
  EXPECT_EQ(srun.rank, 3);
  EXPECT_EQ(srun.address, "127.0.0.1");
  EXPECT_EQ(srun.port, 29501);
}

TEST(Launch, NamesABadVariable) {
  test::expect_throw<InvalidArgument>([] { read({{"RANK", "2"}, {"WORLD_SIZE", "2"}}); },
                                      "RANK: expected an integer in [0, 1], got \"2\"");
  test::expect_throw<InvalidArgument>([] { read({{"RANK", "0"}, {"WORLD_SIZE", "two"}}); },
                                      "WORLD_SIZE: expected");
  test::expect_throw<InvalidArgument>([] { read({{"MASTER_PORT", "99999"}}); },
                                      "MASTER_PORT: expected");
}

}  // namespace
}  // namespace longspan
