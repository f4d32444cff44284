#pragma once

#include <string>

namespace longspan {

/// A process among those that a launcher started to work together.
struct Launch {
  int rank = 0;
  int size = 1;        ///< 1: no launcher, or one of one process
  int local_rank = 0;  ///< among those of this machine
  int local_size = 1;
  std::string address = "127.0.0.1";  ///< where rank 0 listens
  int port = 0;
  int answer_ms = 0;  ///< how long rank 0 waits for a rank in an op; 0: as long as that lives
};

/// What the environment says: torchrun's names (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE),
/// else Open MPI's (OMPI_COMM_WORLD_RANK, ...), else Slurm's (SLURM_PROCID, ...); and MASTER_ADDR
/// and MASTER_PORT (29500 where unset). Rank 0 listens on LONGSPAN_PORT, else on the port after
/// MASTER_PORT, which torchrun keeps for itself. Throws InvalidArgument for a value that is no
/// number in its range.
Launch read_launch();

}  // namespace longspan
