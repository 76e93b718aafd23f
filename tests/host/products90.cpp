// Two epilogues of the sm_90 kernel alone, by one block or cluster, `products90 1 | 2`. Products of small whole numbers,
// which fp32 adds up without an error, around the ring 14 or 7 times; and exponentials of 0 times both factors, tiles
// that are shorter than the ring, so that a warp may be in the next tile. tests/backends/test_cuda_sm90.py compiles it
// as csrc/ is, and once more for every fault that it must find.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "launch.h"
#include "similarity_sm90.cuh"

using namespace fusedloss;

namespace {

constexpr int M = 200, N = 600;

template <class Epilogue>
bool launched(const Strip& strip, const typename Epilogue::Args& args, bool pair) {
  const auto error = pair ? launch_sm90<bf16, Epilogue, 256, 2>(strip, args, 2, nullptr)
                          : launch_sm90<bf16, Epilogue, 256, 1>(strip, args, 1, nullptr);
  if (error != cudaSuccess) std::printf("%s\n", cudaGetErrorName(error));
  return error == cudaSuccess;
}

struct Operands {
  int D;
  std::vector<bf16> x, y;
  Strip strip{};

  explicit Operands(int D) : D(D), x(M * D + 8), y(N * D + 8) {
    strip.x = filled(x), strip.y = filled(y);
    strip.M = M, strip.N = N, strip.D = D, strip.stride_xm = strip.stride_yn = D, strip.stride_om = N;
    strip.stride_xd = strip.stride_yd = 1;
  }
  static bf16* filled(std::vector<bf16>& v) {
    const auto aligned = reinterpret_cast<bf16*>((reinterpret_cast<uintptr_t>(v.data()) + 15) / 16 * 16);
    for (bf16* e = aligned; e < aligned + v.size() - 8; e++) *e = ptx::from_float<bf16>(float(std::rand() % 5 - 2));
    return aligned;
  }
  float product(int i, int j) const {
    float sum = 0;
    for (int d = 0; d < D; d++) {
      sum += ptx::to_float(static_cast<const bf16*>(strip.x)[i * D + d]) *
             ptx::to_float(static_cast<const bf16*>(strip.y)[j * D + d]);
    }
    return sum;
  }
};

int wrong_products(bool pair) {
  Operands operands(600);
  std::vector<float> out(M * N, -1e9f);
  const float one = 1;
  operands.strip.out = out.data(), operands.strip.scale = &one;
  if (!launched<Store>(operands.strip, {}, pair)) return M * N;
  int wrong = 0;
  for (int i = 0; i < M * N; i++) wrong += out[i] != operands.product(i / N, i % N);
  return wrong;
}

int wrong_exponentials(bool pair) {
  Operands operands(64);
  std::vector<bf16> out(M * N);
  std::vector<float> rows(M), columns(N), sums(M * ((N - 1) / 256 + 1));
  for (float& row : rows) row = float(std::rand() % 8 + 1);
  for (float& column : columns) column = float(std::rand() % 16 + 1);
  const float zero = 0;
  operands.strip.out = out.data(), operands.strip.scale = &zero;
  operands.strip.row_factor = rows.data(), operands.strip.col_factor = columns.data();
  ExpArgs args{};
  args.row_sum = sums.data();
  if (!launched<Exp<false, false>>(operands.strip, args, pair)) return M * N;
  int wrong = 0;
  for (int i = 0; i < M * N; i++) wrong += ptx::to_float(out[i]) != rows[i / N] * columns[i % N];
  return wrong;
}

}  // namespace

int main(int argc, char** argv) {
  const bool pair = argc == 2 && std::atoi(argv[1]) == 2;
  const int wrong = wrong_products(pair) + wrong_exponentials(pair);
  std::printf("%d of %d are wrong\n", wrong, 2 * M * N);
  return wrong > 0;
}
