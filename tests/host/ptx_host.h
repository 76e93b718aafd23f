// csrc/ptx.cuh once more, for a CPU: what the PTX ISA says of each instruction, and an abort with a message where it
// leaves the result undefined. A warp's instruction takes place when all 32 lanes have come to it.
//
// cp.async copies at the last moment, in the wait for its group (or never), or with FUSEDLOSS_HOST_COPIES=early at
// once: the first shows a wait that is missing, the second a barrier before the memory is used again.
//
// Numbers are by default the best that a GPU could give: products are exact and their sum is rounded once, exp2 and the
// reciprocal are rounded to nearest. FUSEDLOSS_HOST_SUMS=truncate adds as tensor cores do, and
// FUSEDLOSS_HOST_ULPS=SEED moves each exp2 and reciprocal by up to 2 ulp, the same number always by the same.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "machine.h"
#include "types.h"

#define FUSEDLOSS_INLINE inline

namespace fusedloss::ptx {

// Threads -------------------------------------------------------------------------------------------------------------

FUSEDLOSS_INLINE int thread() { return host::machine.thread(); }
FUSEDLOSS_INLINE int block_x() { return int(host::machine.x) + host::machine.rank(); }
FUSEDLOSS_INLINE int block_y() { return int(host::machine.y); }
FUSEDLOSS_INLINE int blocks_x() { return int(host::machine.blocks_x); }
FUSEDLOSS_INLINE int blocks_y() { return int(host::machine.blocks_y); }

FUSEDLOSS_INLINE void sync() { host::barrier(0, host::machine.threads); }
FUSEDLOSS_INLINE void sync_named(int barrier, int threads) {
  if (barrier == 0) host::fail("barrier 0 is sync()'s");
  host::barrier(barrier, threads);
}
FUSEDLOSS_INLINE void sync_warp() {
  host::collective("sync_warp", [](void* const (&)[32]) {}, nullptr);
}

template <class T>
FUSEDLOSS_INLINE T shuffle_xor(T value, int lane_mask) {
  struct Lane {
    T in, out;
    int mask;
  } self{value, value, lane_mask};
  if (lane_mask < 0 || lane_mask > 31) host::fail("shuffle_xor: lane mask %d", lane_mask);
  const auto exchange = [](void* const (&lanes)[32]) {
    for (int i = 0; i < 32; i++) {
      Lane* to = static_cast<Lane*>(lanes[i]);
      to->out = static_cast<Lane*>(lanes[i ^ to->mask])->in;
    }
  };
  host::collective("shuffle_xor", exchange, &self);
  return self.out;
}

FUSEDLOSS_INLINE bool all(bool value) {
  struct Lane {
    bool in, out;
  } self{value, value};
  const auto vote = [](void* const (&lanes)[32]) {
    bool every = true;
    for (void* lane : lanes) every &= static_cast<Lane*>(lane)->in;
    for (void* lane : lanes) static_cast<Lane*>(lane)->out = every;
  };
  host::collective("all", vote, &self);
  return self.out;
}

FUSEDLOSS_INLINE unsigned char* shared_memory() { return host::machine.block().shared; }
FUSEDLOSS_INLINE uint32_t shared_address(const void* pointer) {
  const size_t offset = uintptr_t(pointer) - uintptr_t(shared_memory());
  if (offset > host::machine.shared_bytes) host::fail("shared_address: %p is not in shared memory", pointer);
  return uint32_t(offset) | uint32_t(host::machine.rank()) << host::kRankShift;
}

// Numbers -------------------------------------------------------------------------------------------------------------

FUSEDLOSS_INLINE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
FUSEDLOSS_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// y = f(x), up to 2 ulp aside.
inline float about(float y, float x) {
  if (!host::machine.ulps || !std::isnormal(y)) return y;
  uint32_t hash = (float_to_bits(x) ^ host::machine.ulps) * 0x9e3779b1u;  // of x: the same number has the same result
  hash = (hash ^ hash >> 15) * 0x85ebca6bu;
  const float moved = bits_to_float(float_to_bits(y) + (hash >> 16) % 5 - 2);
  return std::isnormal(moved) ? moved : y;
}

FUSEDLOSS_INLINE float exp2(float x) {
  const float y = about(std::exp2(x), x);
  return y < 0x1p-126f ? 0.0f : y;
}

FUSEDLOSS_INLINE float reciprocal(float x) { return about(1 / x, x); }

// NaN becomes 0x7fff, without a sign.
FUSEDLOSS_INLINE uint16_t round_to(bf16, float x) {
  const uint32_t bits = float_to_bits(x);
  return std::isnan(x) ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
FUSEDLOSS_INLINE uint16_t round_to(fp16, float x) {
  const float size = std::fabs(x);
  const uint32_t bits = float_to_bits(size);
  const uint32_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return 0x7fff;
  if (size >= 65520.0f) return uint16_t(sign | 0x7c00);
  // Denormals are multiples of 2^-24, as is what 0.5's last bit stands for.
  if (size < 0x1p-14f) return uint16_t(sign | (float_to_bits(size + 0.5f) - float_to_bits(0.5f)));
  return uint16_t(sign | (((bits + 0xfff + (bits >> 13 & 1)) >> 13) - ((127 - 15) << 10)));
}
template <class T>
FUSEDLOSS_INLINE uint32_t pack(T, float low, float high) {
  return round_to(T{}, low) | uint32_t(round_to(T{}, high)) << 16;
}

FUSEDLOSS_INLINE float to_float(float x) { return x; }
FUSEDLOSS_INLINE float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
FUSEDLOSS_INLINE float to_float(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 0x3ff;
  if (exponent == 0) return std::copysign(float(fraction) * 0x1p-24f, bits_to_float(sign));
  return bits_to_float(sign | (exponent == 31 ? 255 : exponent + (127 - 15)) << 23 | fraction << 13);
}
template <class T>
FUSEDLOSS_INLINE T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    return T{round_to(T{}, x)};
  }
}
FUSEDLOSS_INLINE uint32_t to_tf32(uint32_t bits) {
  return std::isnan(bits_to_float(bits)) ? 0x7fffffff : (bits + 0x1000) & ~0x1fffu;
}

// Global memory -------------------------------------------------------------------------------------------------------

template <class T>
FUSEDLOSS_INLINE T load(const T* pointer) {
  host::aligned(pointer, sizeof(T), "load");
  return *pointer;
}
FUSEDLOSS_INLINE Vector16 load16(const void* pointer) {
  host::aligned(pointer, 16, "load16");
  Vector16 v;
  std::memcpy(&v, pointer, 16);
  return v;
}
FUSEDLOSS_INLINE Vector16 read16(const void* pointer) { return load16(pointer); }
FUSEDLOSS_INLINE void store16(void* pointer, Vector16 v) {
  host::aligned(pointer, 16, "store16");
  std::memcpy(pointer, &v, 16);
}
FUSEDLOSS_INLINE void store8(void* pointer, float x, float y) {
  host::aligned(pointer, 8, "store8");
  const float pair[2] = {x, y};
  std::memcpy(pointer, pair, 8);
}

// sm_80 ---------------------------------------------------------------------------------------------------------------

FUSEDLOSS_INLINE void cp_async16(uint32_t shared, const void* global, int bytes) {
  host::aligned(global, 16, "cp.async");
  host::shared16(shared, "cp.async");
  if (bytes < 0 || bytes > 16) host::fail("cp.async: %d of 16 bytes", bytes);
  host::Fiber& self = host::machine.fibers[host::machine.current];
  const host::Copy copy{shared, global, bytes, self.groups};
  if (host::machine.late) {
    self.copies.push_back(copy);
  } else {
    host::copy(copy);
  }
}
FUSEDLOSS_INLINE void cp_async_commit() { host::machine.fibers[host::machine.current].groups++; }
template <int N>
FUSEDLOSS_INLINE void cp_async_wait() {
  host::Fiber& self = host::machine.fibers[host::machine.current];
  size_t done = 0;
  while (done < self.copies.size() && self.copies[done].group + N < self.groups) host::copy(self.copies[done++]);
  self.copies.erase(self.copies.begin(), self.copies.begin() + done);
}

// Of an 8x8 matrix lane l receives elements 2 (l % 4) and the next of row l / 4, or with .trans of column l / 4.
struct LdmatrixLane {
  uint32_t* r;
  uint32_t row;
};
template <bool TRANS>
inline void ldmatrix_warp(void* const (&lanes)[32]) {
  for (int m = 0; m < 4; m++) {
    uint16_t matrix[8][8];
    for (int j = 0; j < 8; j++) {
      std::memcpy(matrix[j], host::shared16(static_cast<LdmatrixLane*>(lanes[8 * m + j])->row, "ldmatrix"), 16);
    }
    for (int l = 0; l < 32; l++) {
      const int i = l / 4, j = 2 * (l % 4);
      const uint16_t low = TRANS ? matrix[j][i] : matrix[i][j], high = TRANS ? matrix[j + 1][i] : matrix[i][j + 1];
      static_cast<LdmatrixLane*>(lanes[l])->r[m] = low | uint32_t(high) << 16;
    }
  }
}
FUSEDLOSS_INLINE void ldmatrix(uint32_t (&r)[4], uint32_t row) {
  LdmatrixLane self{r, row};
  host::collective("ldmatrix", ldmatrix_warp<false>, &self);
}
FUSEDLOSS_INLINE void ldmatrix_trans(uint32_t (&r)[4], uint32_t row) {
  LdmatrixLane self{r, row};
  host::collective("ldmatrix_trans", ldmatrix_warp<true>, &self);
}

// The way back.
inline void stmatrix_warp(void* const (&lanes)[32]) {
  for (int m = 0; m < 4; m++) {
    for (int j = 0; j < 8; j++) {
      uint32_t row[4];
      for (int k = 0; k < 4; k++) row[k] = static_cast<LdmatrixLane*>(lanes[4 * j + k])->r[m];
      std::memcpy(host::shared16(static_cast<LdmatrixLane*>(lanes[8 * m + j])->row, "stmatrix"), row, 16);
    }
  }
}
FUSEDLOSS_INLINE void stmatrix(uint32_t row, const uint32_t (&r)[4]) {
  LdmatrixLane self{const_cast<uint32_t*>(r), row};
  host::collective("stmatrix", stmatrix_warp, &self);
}

// A is 16 x K, B K x 8. A register holds two numbers of 16 bits, neighbours along K, or one of tf32; a lane's registers
// are half of K apart (A's odd ones 8 rows).
struct MmaLane {
  float* c;
  const uint32_t *a, *b;
};
FUSEDLOSS_INLINE float element(bf16, uint32_t r, int i) { return to_float(bf16{uint16_t(r >> 16 * i)}); }
FUSEDLOSS_INLINE float element(fp16, uint32_t r, int i) { return to_float(fp16{uint16_t(r >> 16 * i)}); }
FUSEDLOSS_INLINE float element(float, uint32_t r, int) { return bits_to_float(r & ~0x1fffu); }

typedef double Eight __attribute__((vector_size(64)));

// c += a b, of ROWS x K and K x 8. The products are exact, and the sum is rounded once.
template <int ROWS, int K>
inline void multiply_add(const double (&a)[ROWS][K], const Eight (&b)[K], Eight (&c)[ROWS]) {
  for (int m = 0; m < ROWS; m++) {
    for (int k = 0; k < K; k++) c[m] += a[m][k] * b[k];
    for (int n = 0; n < 8; n++) c[m][n] = float(c[m][n]);
  }
}

// As tensor cores do (arXiv 2512.07004): TOGETHER products and c are aligned to the largest exponent, of which a
// product's is the sum of its factors', and cut off BITS bits behind fp32's last; so is their sum behind fp32's.
template <int TOGETHER, int BITS, int ROWS, int K>
inline void multiply_add_truncated(const double (&a)[ROWS][K], const Eight (&b)[K], Eight (&c)[ROWS]) {
  constexpr int kZero = -2000;
  const auto exponent = [](double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, 8);
    return x == 0 ? kZero : int(bits >> 52 & 0x7ff) - 1023;  // no number here is denormal in fp64
  };
  const auto power = [](int e) {
    const uint64_t bits = uint64_t(e + 1023) << 52;
    double x;
    std::memcpy(&x, &bits, 8);
    return x;
  };
  const auto truncated = [](double x) {
    const float y = float(x);
    return double(std::isfinite(x) && std::fabs(y) > std::fabs(x) ? std::nextafter(y, 0.0f) : y);
  };
  int of_b[K][8];
  for (int k = 0; k < K; k++) {
    for (int n = 0; n < 8; n++) of_b[k][n] = exponent(b[k][n]);
  }
  for (int m = 0; m < ROWS; m++) {
    int of_a[K];
    for (int k = 0; k < K; k++) of_a[k] = exponent(a[m][k]);
    for (int n = 0; n < 8; n++) {
      for (int first = 0; first < K; first += TOGETHER) {
        const int end = first + TOGETHER;
        int largest = exponent(c[m][n]);
        for (int k = first; k < end; k++) largest = std::max(largest, of_a[k] + of_b[k][n]);
        if (largest >= 128 || largest <= kZero / 2) {  // infinities, NaN, or nothing but zeros
          for (int k = first; k < end; k++) c[m][n] += a[m][k] * b[k][n];
          continue;
        }
        const double up = power(23 + BITS - largest);
        int64_t sum = int64_t(c[m][n] * up);
        for (int k = first; k < end; k++) sum += int64_t(a[m][k] * b[k][n] * up);
        c[m][n] = truncated(double(sum) / up);
      }
    }
  }
}

template <class T>
inline void mma_warp(void* const (&lanes)[32]) {
  constexpr int PER = 4 / sizeof(T), K = 8 * PER;
  double a[16][K];
  Eight b[K], c[16];
  for (int l = 0; l < 32; l++) {
    const MmaLane& lane = *static_cast<MmaLane*>(lanes[l]);
    const int group = l / 4, member = l % 4;
    for (int i = 0; i < PER; i++) {
      const int k = PER * member + i;
      for (int r = 0; r < 4; r++) a[group + r % 2 * 8][k + r / 2 * (K / 2)] = element(T{}, lane.a[r], i);
      for (int r = 0; r < 2; r++) b[k + r * (K / 2)][group] = element(T{}, lane.b[r], i);
    }
    for (int r = 0; r < 4; r++) c[group + r / 2 * 8][2 * member + r % 2] = lane.c[r];
  }
  host::machine.truncate ? multiply_add_truncated<K / 2, 1>(a, b, c) : multiply_add(a, b, c);  // an A100's
  for (int l = 0; l < 32; l++) {
    for (int r = 0; r < 4; r++) {
      static_cast<MmaLane*>(lanes[l])->c[r] = float(c[l / 4 + r / 2 * 8][2 * (l % 4) + r % 2]);
    }
  }
}
template <class T>
FUSEDLOSS_INLINE void mma(T, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaLane self{c, a, b};
  host::collective("mma", mma_warp<T>, &self);
}

}  // namespace fusedloss::ptx

#include "ptx_host90.h"
