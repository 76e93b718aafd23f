#include "similarity.h"

namespace fusedloss {

Plan plan(int capability, DType dtype, bool aligned, bool general) {
  return {80, 128, 128};
}

}  // namespace fusedloss
