#include "similarity_sm90_run.cuh"

namespace fusedloss {
#define INSTANCE(...) FUSEDLOSS_RUN_SM90(fp16, __VA_ARGS__)
FUSEDLOSS_EPILOGUES(INSTANCE)
}  // namespace fusedloss
