// What ptx.cuh has for sm_90a alone, for a CPU: mbarriers, tensor maps and their loads, products of a warpgroup, clusters.
//
// A tensor's load lands at once with FUSEDLOSS_HOST_COPIES=early, else when no thread can go on before it has. A product
// takes place where it is issued, or with FUSEDLOSS_HOST_PRODUCTS=wait in the wait for its group: a stage that is let go
// too early has then been overwritten.
#pragma once

#include <cuda.h>

#include "ptx_host.h"

namespace fusedloss {
namespace host __attribute__((visibility("hidden"))) {

// mbarriers -----------------------------------------------------------------------------------------------------------

// Of the block `rank`, at the offset that `address` has in the thread's own.
inline Mbarrier& mbarrier(uint32_t address, int rank, const char* what) {
  const uint32_t offset = offset_of(address, 8, 8, what);
  if (rank < 0 || rank >= machine.cluster) fail("%s: block %d of a cluster of %d", what, rank, machine.cluster);
  if (machine.blocks[rank].exited == machine.threads) fail("%s: block %d of the cluster has ended", what, rank);
  for (Mbarrier& m : machine.blocks[rank].mbarriers) {
    if (m.offset != offset) continue;
    if (!m.fenced) fail("%s: no fence followed mbarrier.init", what);
    return m;
  }
  fail("%s: no mbarrier at %u of block %d", what, offset, rank);
}

constexpr int kMostBytes = (1 << 20) - 1;

inline void settle(Mbarrier& m) {
  if (m.bytes > kMostBytes || m.bytes < -kMostBytes) fail("mbarrier at %u: %d bytes", m.offset, m.bytes);
  if (m.pending) return;
  if (m.bytes < 0) fail("mbarrier at %u: %d bytes more than were expected", m.offset, -m.bytes);
  if (m.bytes) return;
  m.phase++;
  m.pending = m.expected;
  wake(m.waiters);
}
inline void arrive(Mbarrier& m) {
  if (!m.pending) fail("mbarrier at %u: one arrival more than the %d of its phase", m.offset, m.expected);
  m.pending--;
  settle(m);
}

// Loads ---------------------------------------------------------------------------------------------------------------

inline const TensorMap& tensor_map(const void* map, const char* what) {
  aligned(map, 64, what);
  const TensorMap& found = static_cast<const CUtensorMap*>(map)->host;
  if (found.encoded != TensorMap::kEncoded) fail("%s: %p is no tensor map", what, map);
  return found;
}

// To the nearest tf32, ties to even, infinities and NaN left alone.
inline uint32_t nearest_tf32(uint32_t bits) {
  return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu;
}

inline void land(const TensorMap& map, int column, int row, unsigned char* shared, uint32_t offset) {
  for (int r = 0; r < map.box[1]; r++) {
    for (int c = 0; c < map.box[0]; c++) {
      const int64_t i = int64_t(row) + r, j = int64_t(column) + c;
      const uint32_t at = offset + r * map.box[0] * map.element + c * map.element;
      unsigned char* to = shared + (at ^ (at >> 3 & 0x30));  // of the address: 64-byte swizzle
      if (i < 0 || i >= map.sizes[1] || j < 0 || j >= map.sizes[0]) {
        std::memset(to, 0, map.element);
        continue;
      }
      const unsigned char* from = map.base + i * map.stride + j * map.element;
      std::memcpy(to, from, map.element);
      if (map.tf32) {
        uint32_t bits;
        std::memcpy(&bits, from, 4);
        bits = nearest_tf32(bits);
        std::memcpy(to, &bits, 4);
      }
    }
  }
}

inline void load(const char* what, uint32_t shared, const void* from, int column, int row, uint32_t barrier, int rank) {
  const TensorMap map = tensor_map(from, what);
  const int bytes = map.box[0] * map.box[1] * map.element;
  const uint32_t offset = offset_of(shared, bytes, 128, what);
  Mbarrier& m = mbarrier(barrier, rank, what);
  for (const Mbarrier& other : machine.blocks[rank].mbarriers) {
    if (other.offset + 8 > offset && other.offset < offset + bytes) fail("%s: over the mbarrier at %u", what, other.offset);
  }
  const auto landing = [=, &m] {
    if (machine.blocks[rank].exited == machine.threads) fail("%s: lands in block %d, which has ended", what, rank);
    land(map, column, row, machine.blocks[rank].shared, offset);
    m.bytes -= bytes;
    settle(m);
  };
  machine.late ? machine.loads.push_back(landing) : landing();
}

// Products ------------------------------------------------------------------------------------------------------------

// A byte of an operand whose rows are swizzled in 64 bytes, K-major.
struct Operand {
  uint32_t start, stride;

  Operand(uint64_t descriptor, int rows) : start(descriptor & 0x3fff), stride(descriptor >> 32 & 0x3fff) {
    start *= 16, stride *= 16;
    const auto bits = [&](int first, int count) { return uint32_t(descriptor >> first & ((1u << count) - 1)); };
    if (bits(62, 2) != 2) fail("wgmma: swizzle mode %u; the loads here know 2, of 64 bytes", bits(62, 2));
    if (bits(14, 2) | bits(30, 2) | bits(46, 3) | bits(52, 10)) fail("wgmma: a descriptor's reserved bits are not 0");
    if (bits(49, 3) || start & 0x1c0) fail("wgmma: base offset %u, start %u: not on 512 bytes", bits(49, 3), start);
    if (bits(16, 14) != 1) fail("wgmma: leading offset %u: 1 where K is in the swizzled row", bits(16, 14));
    if (start % 64 + 32 > 64) fail("wgmma: start %u: K leaves its row of 64 bytes", start);
    if (start + (rows / 8 - 1) * stride + 512 - start % 64 > machine.shared_bytes) {
      fail("wgmma: start %u, stride %u: %d rows leave shared memory", start, stride, rows);
    }
  }
  uint32_t at(int row, int byte) const {
    const uint32_t address = start + row / 8 * stride + row % 8 * 64 + byte;
    return address ^ (address >> 3 & 0x30);
  }
};

template <class T>
double number_at(const unsigned char* from) {
  T x;
  std::memcpy(&x, from, sizeof(T));
  if constexpr (sizeof(T) == 4) {
    return ptx::bits_to_float(ptx::float_to_bits(x) & ~0x1fffu);
  } else {
    return ptx::to_float(x);
  }
}

// 16 rows of the warp, all columns, 32 bytes of K.
template <class T, int NT>
void multiply(const Product& p) {
  constexpr int K = 32 / sizeof(T);
  const int rank = p.warp * 32 / machine.threads, row0 = p.warp % 4 * 16;
  const unsigned char* shared = machine.blocks[rank].shared;
  const Operand x(p.a, 64), y(p.b, 8 * NT);
  double a[16][K];
  for (int m = 0; m < 16; m++) {
    for (int k = 0; k < K; k++) a[m][k] = number_at<T>(shared + x.at(row0 + m, k * int(sizeof(T))));
  }
  for (int nt = 0; nt < NT; nt++) {
    ptx::Eight b[K], c[16];
    for (int n = 0; n < 8; n++) {
      for (int k = 0; k < K; k++) b[k][n] = number_at<T>(shared + y.at(8 * nt + n, k * int(sizeof(T))));
    }
    const auto place = [&](int m, int n) -> float& { return p.c[m % 8 * 4 + n / 2][4 * nt + m / 8 * 2 + n % 2]; };
    for (int m = 0; m < 16; m++) {
      for (int n = 0; n < 8; n++) c[m][n] = p.first ? 0 : place(m, n);
    }
    machine.truncate ? ptx::multiply_add_truncated<K, 2>(a, b, c) : ptx::multiply_add(a, b, c);
    for (int m = 0; m < 16; m++) {
      for (int n = 0; n < 8; n++) place(m, n) = float(c[m][n]);
    }
  }
}

struct ProductLane {
  float* c;
  uint64_t a, b;
};

template <class T, int NT, bool FIRST>
void issue(void* const (&lanes)[32]) {
  const int w = machine.current / 32;
  Warp& warp = machine.warps[w];
  const ProductLane& one = *static_cast<ProductLane*>(lanes[0]);
  if (!warp.fenced) fail("wgmma: no wgmma.fence since other instructions may have touched the accumulators");
  Product product{multiply<T, NT>, {}, one.a, one.b, FIRST, w, warp.groups};
  for (int l = 0; l < 32; l++) {
    const ProductLane& lane = *static_cast<ProductLane*>(lanes[l]);
    if (lane.a != one.a || lane.b != one.b) fail("wgmma: descriptors differ in a warp");
    product.c[l] = lane.c;
  }
  machine.products_wait ? warp.products.push_back(product) : multiply<T, NT>(product);
}

// All but the youngest N groups take place, one after the other.
template <int N>
void wait_groups(void* const (&)[32]) {
  Warp& warp = machine.warps[machine.current / 32];
  size_t done = 0;
  for (; done < warp.products.size() && warp.products[done].group + N < warp.groups; done++) {
    warp.products[done].multiply(warp.products[done]);
  }
  warp.products.erase(warp.products.begin(), warp.products.begin() + done);
  if (N == 0) warp.fenced = false;
}

}  // namespace host

namespace ptx {

FUSEDLOSS_INLINE void trap() { host::fail("trap"); }

// Threads -------------------------------------------------------------------------------------------------------------

FUSEDLOSS_INLINE int uniform(int value) {
  struct Lane {
    int in, out;
  } self{value, value};
  const auto broadcast = [](void* const (&lanes)[32]) {
    for (void* lane : lanes) static_cast<Lane*>(lane)->out = static_cast<Lane*>(lanes[0])->in;
  };
  host::collective("uniform", broadcast, &self);
  return self.out;
}

// Any lane may be the one.
FUSEDLOSS_INLINE bool elect_one() {
  bool elected = false;
  const auto elect = [](void* const (&lanes)[32]) { *static_cast<bool*>(lanes[host::first(~0u)]) = true; };
  host::collective("elect_one", elect, &elected);
  return elected;
}

// Registers are a block's: what one warpgroup gives back, another may take. A block starts with what ptxas may use.
template <int N>
FUSEDLOSS_INLINE void setmaxnreg_dec() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
  int& registers = host::machine.fibers[host::machine.current].registers;
  if (N > registers) host::fail("setmaxnreg.dec: to %d from %d", N, registers);
  host::machine.block().registers += registers - N;
  registers = N;
  host::wake(host::machine.block().for_registers);
}
template <int N>
FUSEDLOSS_INLINE void setmaxnreg_inc() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
  int& registers = host::machine.fibers[host::machine.current].registers;
  if (N < registers) host::fail("setmaxnreg.inc: to %d from %d", N, registers);
  host::Block& block = host::machine.block();
  while (block.registers < N - registers) host::wait(block.for_registers, "registers");
  block.registers -= N - registers;
  registers = N;
}

FUSEDLOSS_INLINE uint32_t cluster_rank() { return uint32_t(host::machine.rank()); }
FUSEDLOSS_INLINE void cluster_sync() { host::cluster_barrier(); }

// mbarriers -----------------------------------------------------------------------------------------------------------

FUSEDLOSS_INLINE void mbarrier_init(uint32_t barrier, int arrivals) {
  const uint32_t offset = host::offset_of(barrier, 8, 8, "mbarrier.init");
  if (arrivals < 1 || arrivals > host::kMostBytes) host::fail("mbarrier.init: %d arrivals", arrivals);
  auto& all = host::machine.block().mbarriers;
  for (const host::Mbarrier& m : all) {
    if (m.offset == offset) host::fail("mbarrier.init: there is one at %u", offset);
  }
  all.push_back({offset, arrivals, arrivals, 0, 0, false, {}});
}
FUSEDLOSS_INLINE void fence_barrier_init() {
  for (host::Mbarrier& m : host::machine.block().mbarriers) m.fenced = true;
}
FUSEDLOSS_INLINE void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
  host::Mbarrier& m = host::mbarrier(barrier, host::machine.rank(), "mbarrier.arrive.expect_tx");
  m.bytes += int(bytes);
  host::arrive(m);
}
FUSEDLOSS_INLINE void mbarrier_arrive(uint32_t barrier, uint32_t rank) {
  host::arrive(host::mbarrier(barrier, int(rank), "mbarrier.arrive"));
}
FUSEDLOSS_INLINE void mbarrier_arrive(uint32_t barrier) { mbarrier_arrive(barrier, cluster_rank()); }
// The parity is the current phase's, which is not over, or that of the one before, which is.
FUSEDLOSS_INLINE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  host::Mbarrier& m = host::mbarrier(barrier, host::machine.rank(), "mbarrier.try_wait");
  while ((m.phase & 1) == parity) host::wait(m.waiters, "the mbarrier", &m, parity);
}

// Loads ---------------------------------------------------------------------------------------------------------------

FUSEDLOSS_INLINE void prefetch_tensormap(const void* map) { host::tensor_map(map, "prefetch.tensormap"); }
FUSEDLOSS_INLINE void tma_load(uint32_t shared, const void* map, int column, int row, uint32_t barrier) {
  host::load("cp.async.bulk.tensor", shared, map, column, row, barrier, host::machine.rank());
}
FUSEDLOSS_INLINE void tma_load_multicast(uint32_t shared, const void* map, int column, int row, uint32_t barrier,
                                         uint16_t blocks) {
  if (blocks >> host::machine.cluster) host::fail("multicast: blocks %x of a cluster of %d", blocks, host::machine.cluster);
  for (int rank = 0; rank < host::machine.cluster; rank++) {
    if (blocks >> rank & 1) host::load("multicast", shared, map, column, row, barrier, rank);
  }
}

// Products ------------------------------------------------------------------------------------------------------------

FUSEDLOSS_INLINE void wgmma_fence() {
  const auto fence = [](void* const (&)[32]) { host::machine.warps[host::machine.current / 32].fenced = true; };
  host::collective("wgmma.fence", fence, nullptr);
}
FUSEDLOSS_INLINE void wgmma_commit() {
  const auto commit = [](void* const (&)[32]) { host::machine.warps[host::machine.current / 32].groups++; };
  host::collective("wgmma.commit_group", commit, nullptr);
}
template <int N>
FUSEDLOSS_INLINE void wgmma_wait() {
  host::collective("wgmma.wait_group", host::wait_groups<N>, nullptr);
}
template <int NT>
FUSEDLOSS_INLINE void wgmma_done(float (&)[NT][4]) {}

template <class T, int NT>
FUSEDLOSS_INLINE void wgmma(T, float (&c)[NT][4], uint64_t a, uint64_t b) {
  host::ProductLane self{c[0], a, b};
  host::collective("wgmma", host::issue<T, NT, false>, &self);
}
template <class T, int NT>
FUSEDLOSS_INLINE void wgmma_first(T, float (&c)[NT][4], uint64_t a, uint64_t b) {
  host::ProductLane self{c[0], a, b};
  host::collective("wgmma", host::issue<T, NT, true>, &self);
}

}  // namespace ptx
}  // namespace fusedloss
