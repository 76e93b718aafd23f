// Checks of ptx_host.h and launch_host.h, run by tests/backends/test_host_ptx.py: `selftest NAME`. The layouts are written here
// as the PTX ISA lists them, element by element.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "launch.h"
#include "ptx.cuh"

using namespace fusedloss;

#define CHECK(condition) \
  if (!(condition)) std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition), std::exit(1)

namespace {

constexpr int kThreads = 128;

template <class... Params>
void run(void (*kernel)(Params...), int threads, size_t shared_bytes, Params... params) {
  CHECK(launch(kernel, dim3(1), threads, shared_bytes, nullptr, params...) == cudaSuccess);
}

template <class T>
T* shared() {
  return reinterpret_cast<T*>(ptx::shared_memory());
}

// Launches ------------------------------------------------------------------------------------------------------------

__global__ void note_place(int* where, int* turn) {
  const int block = ptx::block_y() * ptx::blocks_x() + ptx::block_x();
  where[(block * kThreads + ptx::thread())] = (*turn)++;
  CHECK(ptx::blocks_x() == 3 && ptx::blocks_y() == 2);
}

// Without barriers threads run in order, or backward.
void order() {
  const char* name = std::getenv("FUSEDLOSS_HOST_ORDER");
  const bool backward = name && !std::strcmp(name, "backward");
  std::vector<int> where(6 * kThreads, -1);
  for (int times = 0; times < 2; times++) {  // fibers are used again
    int turn = 0;
    CHECK(launch(note_place, dim3(3, 2), kThreads, 0, nullptr, where.data(), &turn) == cudaSuccess);
    for (int i = 0; i < 6 * kThreads; i++) CHECK(where[i] == (backward ? 6 * kThreads - 1 - i : i));
  }
}

__global__ void nothing() {}

void refused_launches() {
  CHECK(launch(nothing, dim3(0), 32, 0, nullptr) == cudaErrorInvalidConfiguration);
  CHECK(launch(nothing, dim3(1, 65536), 32, 0, nullptr) == cudaErrorInvalidConfiguration);
  CHECK(launch(nothing, dim3(1), 1056, 0, nullptr) == cudaErrorInvalidConfiguration);
  CHECK(launch(nothing, dim3(1), 32, (227 << 10) + 1, nullptr) == cudaErrorInvalidValue);
  CHECK(launch(nothing, dim3(1), 1024, 227 << 10, nullptr) == cudaSuccess);
}

__global__ void see_fresh_memory() {
  const int t = ptx::thread();
  CHECK(uintptr_t(ptx::shared_memory()) % 1024 == 0);
  CHECK(ptx::shared_address(shared<float>() + t) == uint32_t(4 * t));
  CHECK(std::isnan(shared<float>()[t]));
  shared<float>()[t] = 1.0f;
}

void shared_memory_is_nan() {
  CHECK(launch(see_fresh_memory, dim3(2, 2), kThreads, 4 * kThreads, nullptr) == cudaSuccess);
}

// Waiting -------------------------------------------------------------------------------------------------------------

__global__ void reverse(float* out, bool barrier) {
  const int t = ptx::thread();
  for (int round = 0; round < 3; round++) {
    shared<float>()[t] = float(1000 * round + t);
    if (barrier) ptx::sync();
    out[t] = shared<float>()[kThreads - 1 - t];
    if (barrier) ptx::sync();
  }
}

void barrier() {
  float out[kThreads];
  run<float*, bool>(reverse, kThreads, 4 * kThreads, out, true);
  for (int t = 0; t < kThreads; t++) CHECK(out[t] == float(2000 + kThreads - 1 - t));
  run<float*, bool>(reverse, kThreads, 4 * kThreads, out, false);
  bool seen = false;
  for (int t = 0; t < kThreads; t++) seen |= !(out[t] == float(2000 + kThreads - 1 - t));
  CHECK(seen);
}

__global__ void neighbours(float* out, bool barrier) {
  const int t = ptx::thread();
  shared<float>()[t] = float(t);
  if (barrier) ptx::sync_warp();
  out[t] = shared<float>()[t ^ 1];
}

void warp_barrier() {
  float out[kThreads];
  run<float*, bool>(neighbours, kThreads, 4 * kThreads, out, true);
  for (int t = 0; t < kThreads; t++) CHECK(out[t] == float(t ^ 1));
  run<float*, bool>(neighbours, kThreads, 4 * kThreads, out, false);
  int unset = 0;
  for (int t = 0; t < kThreads; t++) unset += std::isnan(out[t]);
  CHECK(unset == kThreads / 2);
}

// Two halves of a block, of which the second goes more often through its barrier; then warps 0 and 3 alone.
__global__ void halves(int* out) {
  const int t = ptx::thread(), half = t / 64;
  int x = t;
  for (int round = 0; round < 3 + 4 * half; round++) {
    shared<int>()[t] = x;
    ptx::sync_named(1 + half, 64);
    x = shared<int>()[t ^ 32] + 1;
    ptx::sync_named(1 + half, 64);
  }
  if (t / 32 % 3 == 0) {
    shared<int>()[t] = x;
    ptx::sync_named(15, 64);
    x = shared<int>()[t ^ 96];
  }
  out[t] = x;
}

void named_barriers() {
  int out[kThreads];
  run<int*>(halves, kThreads, 4 * kThreads, out);
  for (int t = 0; t < kThreads; t++) {
    const auto after = [](int t) { return (t ^ 32) + (t < 64 ? 3 : 7); };
    CHECK(out[t] == after(t / 32 % 3 == 0 ? t ^ 96 : t));
  }
}

__global__ void butterfly(int64_t* sums, float* partners) {
  const int t = ptx::thread();
  int64_t sum = int64_t(t) << 32;
  for (int mask = 16; mask; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
  sums[t] = sum;
  partners[t] = ptx::shuffle_xor(float(t), 5);
}

void shuffles() {
  int64_t sums[kThreads];
  float partners[kThreads];
  run<int64_t*, float*>(butterfly, kThreads, 0, sums, partners);
  for (int t = 0; t < kThreads; t++) {
    CHECK(sums[t] == int64_t(t / 32 * 32 * 32 + 31 * 16) << 32);
    CHECK(partners[t] == float(t ^ 5));
  }
}

// cp.async ------------------------------------------------------------------------------------------------------------

bool late() {
  const char* name = std::getenv("FUSEDLOSS_HOST_COPIES");
  return !name || !std::strcmp(name, "late");
}

// A chunk of which `bytes` are there and no more, behind its pointer nothing.
__global__ void copy_part(const unsigned char* const* chunks) {
  const int t = ptx::thread();
  ptx::cp_async16(ptx::shared_address(ptx::shared_memory() + 16 * t), chunks[t], t < 17 ? t : 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  for (int i = 0; i < 16; i++) CHECK(ptx::shared_memory()[16 * t + i] == (t < 17 && i < t ? t + i : 0));
}

void zero_fill() {
  const unsigned char* chunks[32] = {};
  for (int t = 0; t < 17; t++) {
    void* chunk;
    CHECK(!posix_memalign(&chunk, 16, t));
    for (int i = 0; i < t; i++) static_cast<unsigned char*>(chunk)[i] = uint8_t(t + i);
    chunks[t] = static_cast<unsigned char*>(chunk);
  }
  run<const unsigned char* const*>(copy_part, 32, 16 * 32, chunks);
  for (const unsigned char* chunk : chunks) std::free(const_cast<unsigned char*>(chunk));
}

// Groups complete oldest first; what is not committed is in none.
__global__ void wait_for_groups(const float* numbers, bool is_late) {
  float* mine = shared<float>() + 20 * ptx::thread();
  const auto arrived = [&] {
    int count = 0;
    for (int i = 0; i < 5; i++) count += mine[4 * i] == float(i);
    return count;
  };
  for (int i = 0; i < 5; i++) {
    ptx::cp_async16(ptx::shared_address(mine + 4 * i), numbers + 4 * i, 16);
    if (i < 3) ptx::cp_async_commit();  // one, two, and three of a chunk each; then two without
  }
  CHECK(arrived() == (is_late ? 0 : 5));
  ptx::cp_async_wait<3>();
  CHECK(arrived() == (is_late ? 0 : 5));
  ptx::cp_async_wait<1>();
  CHECK(arrived() == (is_late ? 2 : 5));
  ptx::cp_async_wait<0>();
  CHECK(arrived() == (is_late ? 3 : 5));
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  CHECK(arrived() == 5);
}

void copy_groups() {
  alignas(16) float numbers[20];
  for (int i = 0; i < 20; i++) numbers[i] = float(i / 4);
  run<const float*, bool>(wait_for_groups, 32, 32 * 80, numbers, late());
}

// Sums tiles that pass through one buffer, each thread what its neighbour in the next warp copied.
__global__ void stream_tiles(const float* in, float* out, int tiles, bool wait, bool barrier) {
  const int t = ptx::thread(), other = (t + 32) % kThreads;
  float sum = 0.0f;
  for (int i = 0; i < tiles; i++) {
    ptx::cp_async16(ptx::shared_address(shared<float>() + 4 * t), in + 4 * (i * kThreads + t), 16);
    ptx::cp_async_commit();
    if (wait) ptx::cp_async_wait<0>();
    ptx::sync();
    sum += shared<float>()[4 * other];
    if (barrier) ptx::sync();
  }
  out[t] = sum;
}

bool streams(bool wait, bool barrier) {
  constexpr int kTiles = 3;
  static Vector16 in[kTiles * kThreads];
  for (int i = 0; i < kTiles * kThreads; i++) {
    const float x = float(i);
    std::memcpy(in[i].word, &x, 4);
  }
  float out[kThreads];
  run<const float*, float*, int, bool, bool>(stream_tiles, kThreads, 16 * kThreads, reinterpret_cast<float*>(in), out,
                                             kTiles, wait, barrier);
  for (int t = 0; t < kThreads; t++) {
    if (out[t] != float(kTiles * ((t + 32) % kThreads) + kThreads * kTiles * (kTiles - 1) / 2)) return false;
  }
  return true;
}

void pipelines() {
  CHECK(streams(true, true));
  CHECK(streams(false, true) == !late());
  if (!late()) CHECK(!streams(true, false));
}

// ldmatrix and mma ----------------------------------------------------------------------------------------------------

// Row j of matrix i lies at slot 5 (8 i + j) % 32, so that addresses are the lanes' own.
template <bool TRANS>
__global__ void load_matrices() {
  const int t = ptx::thread(), slot = 5 * t % 32;
  for (int j = 0; j < 8; j++) shared<uint16_t>()[8 * slot + j] = uint16_t(8 * t + j);
  ptx::sync();
  uint32_t r[4];
  const uint32_t row = ptx::shared_address(shared<uint16_t>() + 8 * slot);
  if (TRANS) {
    ptx::ldmatrix_trans(r, row);
  } else {
    ptx::ldmatrix(r, row);
  }
  for (int i = 0; i < 4; i++) {
    for (int half = 0; half < 2; half++) {
      const int number = uint16_t(r[i] >> 16 * half), matrix = number / 64, row = number / 8 % 8, col = number % 8;
      CHECK(matrix == i);
      CHECK((TRANS ? col : row) == t / 4);
      CHECK((TRANS ? row : col) == 2 * (t % 4) + half);
    }
  }
}

void ldmatrix() { run(load_matrices<false>, 32, 512); }
void ldmatrix_trans() { run(load_matrices<true>, 32, 512); }

// Number 64 i + 8 j + k is element k of row j of matrix i; rows lie as above.
__global__ void store_matrices() {
  const int t = ptx::thread(), slot = 5 * t % 32;
  uint32_t r[4];
  for (int i = 0; i < 4; i++) {
    const int first = 64 * i + 8 * (t / 4) + 2 * (t % 4);
    r[i] = uint32_t(first) | uint32_t(first + 1) << 16;
  }
  ptx::stmatrix(ptx::shared_address(shared<uint16_t>() + 8 * slot), r);
  ptx::sync_warp();
  for (int j = 0; j < 8; j++) CHECK(shared<uint16_t>()[8 * slot + j] == 8 * t + j);
}
void stmatrix() { run(store_matrices, 32, 512); }

struct Element {
  int row, col;
};
// m16n8k16 of .f16 and .bf16: a0 to a7, b0 to b3; c0 to c3 are the same in m16n8k8.
Element a16(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  return {(0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8,
          i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8};
}
Element b16(int lane, int i) {
  return {i < 2 ? lane % 4 * 2 + (i & 1) : lane % 4 * 2 + (i & 1) + 8, lane >> 2};
}
Element c32(int lane, int i) { return {i < 2 ? lane >> 2 : (lane >> 2) + 8, lane % 4 * 2 + (i & 1)}; }
// m16n8k8 of .tf32: a0 to a3, b0 and b1
Element a32(int lane, int i) {
  return {i == 0 || i == 2 ? lane >> 2 : (lane >> 2) + 8, i == 0 || i == 1 ? lane % 4 : lane % 4 + 4};
}
Element b32(int lane, int i) { return {i == 0 ? lane % 4 : lane % 4 + 4, lane >> 2}; }

template <class T, int K>
__global__ void multiply(const float* A, const float* B, float* C, uint32_t noise) {
  const int lane = ptx::thread();
  uint32_t a[4], b[2];
  float c[4];
  if constexpr (K == 16) {
    float x[8], y[4];
    for (int i = 0; i < 8; i++) x[i] = A[a16(lane, i).row * K + a16(lane, i).col];
    for (int i = 0; i < 4; i++) y[i] = B[b16(lane, i).row * 8 + b16(lane, i).col];
    for (int i = 0; i < 4; i++) a[i] = ptx::pack(T{}, x[2 * i], x[2 * i + 1]);
    for (int i = 0; i < 2; i++) b[i] = ptx::pack(T{}, y[2 * i], y[2 * i + 1]);
  } else {
    const auto bits = [&](float x) {
      uint32_t r;
      std::memcpy(&r, &x, 4);
      return r | noise;
    };
    for (int i = 0; i < 4; i++) a[i] = bits(A[a32(lane, i).row * K + a32(lane, i).col]);
    for (int i = 0; i < 2; i++) b[i] = bits(B[b32(lane, i).row * 8 + b32(lane, i).col]);
  }
  for (int i = 0; i < 4; i++) c[i] = C[c32(lane, i).row * 8 + c32(lane, i).col];
  ptx::mma(T{}, c, a, b);
  for (int i = 0; i < 4; i++) C[c32(lane, i).row * 8 + c32(lane, i).col] = c[i];
}

template <class T, int K>
void check_mma() {
  float A[16 * K], B[K * 8], C[16 * 8], expected[16 * 8];
  for (float& x : A) x = float(std::rand() % 255 - 127) / 8;  // exact in every format, as all sums are in fp32
  for (float& x : B) x = float(std::rand() % 255 - 127) / 16;
  for (float& x : C) x = float(std::rand() % 9999);
  for (int m = 0; m < 16; m++) {
    for (int n = 0; n < 8; n++) {
      expected[m * 8 + n] = C[m * 8 + n];
      for (int k = 0; k < K; k++) expected[m * 8 + n] += A[m * K + k] * B[k * 8 + n];
    }
  }
  run<const float*, const float*, float*, uint32_t>(multiply<T, K>, 32, 0, A, B, C, 0x1fffu);  // the bits tf32 ignores
  for (int i = 0; i < 16 * 8; i++) CHECK(C[i] == expected[i]);

  for (float& x : A) x = 0x1p-12f;  // each product is too small for 1's ulp
  for (float& x : B) x = 0x1p-12f;
  for (float& x : C) x = 1.0f;
  run<const float*, const float*, float*, uint32_t>(multiply<T, K>, 32, 0, A, B, C, 0u);
  for (float x : C) CHECK(x == 1.0f + K * 0x1p-24f);
}

void mma_bf16() { check_mma<bf16, 16>(); }
void mma_fp16() { check_mma<fp16, 16>(); }
void mma_tf32() { check_mma<float, 8>(); }

// 1, or another c, and 16 equal products.
template <int TOGETHER, int BITS>
float truncated_sum(double c, double product) {
  const double a[1][16] = {{1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}};
  ptx::Eight b[16], sum[1] = {ptx::Eight{} + c};
  for (ptx::Eight& each : b) each = ptx::Eight{} + product;
  ptx::multiply_add_truncated<TOGETHER, BITS>(a, b, sum);
  for (int n = 0; n < 8; n++) CHECK(sum[0][n] == sum[0][0] || (std::isnan(sum[0][n]) && std::isnan(sum[0][0])));
  return float(sum[0][0]);
}

void truncated_sums() {
  CHECK((truncated_sum<8, 1>(1, 0x1p-24) == 1 + 0x1p-20f) && (truncated_sum<16, 2>(1, 0x1p-24) == 1 + 0x1p-20f));
  CHECK((truncated_sum<8, 1>(1, 0x1p-25) == 1) && (truncated_sum<16, 2>(1, 0x1p-25) == 1 + 0x1p-21f));
  CHECK((truncated_sum<8, 1>(1, 0x1p-26) == 1) && (truncated_sum<16, 2>(1, 0x1p-26) == 1));
  CHECK((truncated_sum<16, 2>(-1, 3 * 0x1p-28) == -1) && (truncated_sum<16, 2>(-1, -3 * 0x1p-26) == -1 - 0x1p-21f));
  CHECK((truncated_sum<16, 2>(1, 7 * 0x1p-27) == 1 + 0x1p-21f));  // each 1.75 of the last bit: 1
  CHECK((truncated_sum<16, 2>(0x1p30, 1) == 0x1p30f) && (truncated_sum<8, 1>(0, 3) == 48));
  CHECK(std::isnan(truncated_sum<8, 1>(1, std::nan(""))) && std::isinf(truncated_sum<8, 1>(INFINITY, 1)));
}

// The usual way from memory to a product, which the layouts are made for: A [16, 16] by ldmatrix, B [16, 16] row by row
// along N by ldmatrix_trans.
__global__ void tile(const fp16* A, const fp16* B, float* C) {
  const int lane = ptx::thread();
  for (int i = lane; i < 64; i += 32) {
    const fp16* from = i < 32 ? A + 8 * i : B + 8 * (i - 32);
    ptx::cp_async16(ptx::shared_address(shared<fp16>() + 8 * i), from, 16);
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::sync_warp();
  uint32_t a[4], b[4];
  const int offset = lane % 16 * 16 + lane / 16 * 8;
  ptx::ldmatrix(a, ptx::shared_address(shared<fp16>() + offset));
  ptx::ldmatrix_trans(b, ptx::shared_address(shared<fp16>() + 256 + offset));
  for (int n = 0; n < 2; n++) {
    float c[4] = {};
    const uint32_t half[2] = {b[2 * n], b[2 * n + 1]};
    ptx::mma(fp16{}, c, a, half);
    for (int i = 0; i < 4; i++) C[c32(lane, i).row * 16 + 8 * n + c32(lane, i).col] = c[i];
  }
}

void matmul() {
  alignas(16) fp16 A[256], B[256];
  float C[256];
  for (fp16& x : A) x = ptx::from_float<fp16>(float(std::rand() % 99 - 49));
  for (fp16& x : B) x = ptx::from_float<fp16>(float(std::rand() % 99 - 49));
  run<const fp16*, const fp16*, float*>(tile, 32, 1024, A, B, C);
  for (int m = 0; m < 16; m++) {
    for (int n = 0; n < 16; n++) {
      float sum = 0.0f;
      for (int k = 0; k < 16; k++) sum += ptx::to_float(A[m * 16 + k]) * ptx::to_float(B[k * 16 + n]);
      CHECK(C[m * 16 + n] == sum);
    }
  }
}

// Faults that must be reported ----------------------------------------------------------------------------------------

enum class Fault {
  divergence, exit, block_barrier, two_sizes, barrier_number, ldmatrix_unaligned, ldmatrix_beyond, stmatrix_unaligned,
  copy_to_unaligned, copy_from_unaligned, copy_beyond, copy_source, load_unaligned, load16_unaligned, store8_unaligned,
  not_shared, shared_overrun, lane_mask,
};

__global__ void commit(Fault fault, unsigned char* global) {
  const int t = ptx::thread();
  uint32_t r[4];
  switch (fault) {
    case Fault::divergence:
      if (t % 2) {
        ptx::sync_warp();
      } else {
        ptx::shuffle_xor(t, 1);
      }
      break;
    case Fault::exit:
      if (t % 32 != 7) ptx::ldmatrix(r, 0);
      break;
    case Fault::block_barrier:
      if (t < 32) ptx::sync();
      break;
    case Fault::two_sizes:
      ptx::sync_named(1, t < 32 ? 64 : 32);
      break;
    case Fault::barrier_number:
      ptx::sync_named(16, 64);
      break;
    case Fault::ldmatrix_unaligned:
      ptx::ldmatrix(r, 8);
      break;
    case Fault::ldmatrix_beyond:
      ptx::ldmatrix_trans(r, t == 63 ? 1008 : 0);
      break;
    case Fault::stmatrix_unaligned:
      r[0] = r[1] = r[2] = r[3] = 0;
      ptx::stmatrix(8, r);
      break;
    case Fault::copy_to_unaligned:
      ptx::cp_async16(4, global, 16);
      break;
    case Fault::copy_from_unaligned:
      ptx::cp_async16(0, global + 8, 8);
      break;
    case Fault::copy_beyond:
      ptx::cp_async16(992, global, 16);
      break;
    case Fault::copy_source:
      ptx::cp_async16(0, global + 16, 9);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      break;
    case Fault::load_unaligned:
      ptx::load(reinterpret_cast<const int64_t*>(global + 4));
      break;
    case Fault::load16_unaligned:
      ptx::load16(global + 8);
      break;
    case Fault::store8_unaligned:
      ptx::store8(global + 4, 0.0f, 0.0f);
      break;
    case Fault::not_shared:
      ptx::shared_address(global);
      break;
    case Fault::shared_overrun:
      ptx::shared_memory()[991 + t / 63] = 0;
      break;
    case Fault::lane_mask:
      ptx::shuffle_xor(t, 32);
      break;
  }
}

void fault(int number) {
  void* global;
  CHECK(!posix_memalign(&global, 16, 24));
  run<Fault, unsigned char*>(commit, 64, 992, Fault(number), static_cast<unsigned char*>(global));
}

// Numbers: standard input converted to standard output ----------------------------------------------------------------

template <class In, class Function>
void convert(Function function) {
  In x;
  while (std::fread(&x, sizeof x, 1, stdin) == 1) {
    const auto y = function(x);
    std::fwrite(&y, sizeof y, 1, stdout);
  }
}

struct Pair {
  float low, high;
};

const struct {
  const char* name;
  void (*function)();
} kChecks[] = {
    {"order", order},
    {"refused_launches", refused_launches},
    {"shared_memory_is_nan", shared_memory_is_nan},
    {"barrier", barrier},
    {"warp_barrier", warp_barrier},
    {"named_barriers", named_barriers},
    {"shuffles", shuffles},
    {"zero_fill", zero_fill},
    {"copy_groups", copy_groups},
    {"pipelines", pipelines},
    {"ldmatrix", ldmatrix},
    {"ldmatrix_trans", ldmatrix_trans},
    {"stmatrix", stmatrix},
    {"mma_bf16", mma_bf16},
    {"mma_fp16", mma_fp16},
    {"mma_tf32", mma_tf32},
    {"truncated_sums", truncated_sums},
    {"matmul", matmul},
    {"pack_bf16", [] { convert<Pair>([](Pair x) { return ptx::pack(bf16{}, x.low, x.high); }); }},
    {"pack_fp16", [] { convert<Pair>([](Pair x) { return ptx::pack(fp16{}, x.low, x.high); }); }},
    {"from_bf16", [] { convert<bf16>([](bf16 x) { return ptx::to_float(x); }); }},
    {"from_fp16", [] { convert<fp16>([](fp16 x) { return ptx::to_float(x); }); }},
    {"to_tf32", [] { convert<uint32_t>([](uint32_t x) { return ptx::to_tf32(x); }); }},
    {"exp2", [] { convert<float>([](float x) { return ptx::exp2(x); }); }},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && !std::strcmp(argv[1], "fault")) return fault(std::atoi(argv[2])), 0;
  for (const auto& check : kChecks) {
    if (argc == 2 && !std::strcmp(argv[1], check.name)) return check.function(), 0;
  }
  std::fprintf(stderr, "no such check\n");
  return 2;
}
