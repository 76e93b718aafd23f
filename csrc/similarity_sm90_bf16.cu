#include "similarity_sm90_run.cuh"

namespace fusedloss {
#define INSTANCE(...) FUSEDLOSS_RUN_SM90(bf16, __VA_ARGS__)
FUSEDLOSS_EPILOGUES(INSTANCE)
FUSEDLOSS_EPILOGUES_OF_RANGE(INSTANCE)
}  // namespace fusedloss
