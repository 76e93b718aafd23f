#include "similarity.h"

namespace fusedloss {

Plan plan(int capability, bool tensor_cores, bool aligned, bool narrow) {
#if FUSEDLOSS_SM90A
  if (capability == 90 && tensor_cores && aligned) return {90, 64, narrow ? 128 : 256, narrow ? 1 : 0, 0};
#endif
  return {80, 128, 128, 1, 0};
}

}  // namespace fusedloss
