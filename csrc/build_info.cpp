#include "build_info.h"

namespace fusedloss {

namespace {

#define STRING_OF(x) #x
#define STRING(x) STRING_OF(x)

std::string release(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

BuildInfo build_info() {
  int driver = 0;
#if CUDART_VERSION > 0  // the host's build has none
  if (cudaDriverGetVersion(&driver) != cudaSuccess) {
    cudaGetLastError();  // or else the next launch would report it once more
    driver = 0;
  }
#endif
  return {release(CUDART_VERSION), driver ? release(driver) : "", STRING(FUSEDLOSS_ARCHS)};
}

std::string error_text(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

}  // namespace fusedloss
