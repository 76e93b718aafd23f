// One epilogue of the sm_90 kernel alone: products of small whole numbers, which fp32 adds up without an error, by one
// block or cluster, `products90 1 | 2`, that goes around its ring 14 or 7 times. tests/backends/test_cuda_sm90.py compiles it as
// csrc/ is, and once more for every fault that it must find.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "launch.h"
#include "similarity_sm90.cuh"

using namespace fusedloss;

int main(int argc, char** argv) {
  constexpr int M = 200, N = 600, D = 600;
  const float one = 1;
  std::vector<bf16> x(M * D + 8), y(N * D + 8);
  std::vector<float> out(M * N, -1e9f);
  const auto fill = [](std::vector<bf16>& v) {
    const auto aligned = reinterpret_cast<bf16*>((reinterpret_cast<uintptr_t>(v.data()) + 15) / 16 * 16);
    for (bf16* e = aligned; e < aligned + v.size() - 8; e++) *e = ptx::from_float<bf16>(float(std::rand() % 5 - 2));
    return aligned;
  };
  Strip strip{};
  strip.x = fill(x), strip.y = fill(y), strip.out = out.data(), strip.scale = &one;
  strip.M = M, strip.N = N, strip.D = D, strip.stride_xm = strip.stride_yn = D, strip.stride_om = N;
  strip.stride_xd = strip.stride_yd = 1;
  const bool pair = argc == 2 && std::atoi(argv[1]) == 2;
  const auto error = pair ? launch_sm90<bf16, Store, 256, 2>(strip, {}, 2, nullptr)
                          : launch_sm90<bf16, Store, 256, 1>(strip, {}, 1, nullptr);
  if (error != cudaSuccess) return std::printf("%s\n", cudaGetErrorName(error)), 2;
  int wrong = 0;
  for (int i = 0; i < M; i++) {
    for (int j = 0; j < N; j++) {
      float sum = 0;
      for (int d = 0; d < D; d++) {
        sum += ptx::to_float(static_cast<const bf16*>(strip.x)[i * D + d]) *
               ptx::to_float(static_cast<const bf16*>(strip.y)[j * D + d]);
      }
      wrong += out[i * N + j] != sum;
    }
  }
  std::printf("%d of %d are wrong\n", wrong, M * N);
  return wrong > 0;
}
