// What the sm_90 kernel knows of addresses and of order, as plain functions: tests/host/test_sm90.cpp runs them, the
// two loops of the pipeline included, on a CPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FUSEDLOSS_BOTH __host__ __device__ __forceinline__
#else
#define FUSEDLOSS_BOTH inline
#endif

namespace fusedloss::sm90 {

// Shared memory -------------------------------------------------------------------------------------------------------
//
// An operand tile has a row of x or y in each 64 bytes: 32 16-bit numbers or 16 tf32. Unswizzled, the same column of 8
// rows would lie in 8 of 32 banks. The tensor memory accelerator therefore stores the 16-byte chunk c of row r as chunk
// c ^ (r / 2 % 4), and the products read it back the same way. The pattern repeats every 8 rows, 512 bytes, and hangs
// on the address itself: tiles start at multiples of 512.
constexpr uint32_t kRowBytes = 64;
constexpr uint32_t kAtomBytes = 512;

FUSEDLOSS_BOTH constexpr uint32_t swizzle64(uint32_t offset) { return offset ^ ((offset >> 3) & 0x30); }

// The matrix descriptor of wgmma for such a tile, K-major. In units of 16 bytes:
//   bits  0..13  start address
//   bits 16..29  leading byte offset: without meaning where K fits the swizzled row, 1 by convention
//   bits 32..45  stride byte offset: from 8 rows to the next 8
//   bits 49..51  base offset: 0, since tiles start at multiples of 512
//   bits 62..63  2: swizzled in 64 bytes
FUSEDLOSS_BOTH constexpr uint64_t descriptor(uint32_t address) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(kAtomBytes >> 4) << 32 | uint64_t(2) << 62;
}

// One wgmma eats 32 bytes of each row: k16 of 16-bit numbers, k8 of tf32. The swizzle is applied to the sum of start
// address and offset, so that the next 32 bytes are reached by moving the start address. Shared memory has less than
// 2^18 bytes: the sum never leaves its 14 bits.
constexpr uint32_t kStepBytes = 32;
FUSEDLOSS_BOTH constexpr uint64_t advance(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

// The pipeline --------------------------------------------------------------------------------------------------------
//
// Two mbarriers a stage: `full` completes a phase when a load has landed, `empty` when every consumer has let go of it.
// wait(P) returns once the phase of parity P is over, where a fresh barrier is in phase 0 and the one before it, of
// parity 1, counts as over. So a consumer starts with 0, which the first load ends, and the producer with 1, which lets
// it through as many times as there are stages.
template <int STAGES>
struct Ring {
  int stage;
  uint32_t phase;

  FUSEDLOSS_BOTH static constexpr Ring producer() { return {0, 1}; }
  FUSEDLOSS_BOTH static constexpr Ring consumer() { return {0, 0}; }
  FUSEDLOSS_BOTH constexpr void advance() {
    if (++stage == STAGES) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// One tile of `steps` >= 1 stages, as the producer sees it.
template <int STAGES, class Ops>
FUSEDLOSS_BOTH void produce(Ring<STAGES>& ring, int steps, Ops& ops) {
  for (int step = 0; step < steps; ++step) {
    ops.wait_empty(ring.stage, ring.phase);
    ops.load(ring.stage, step);
    ring.advance();
  }
}

// The same tile as a consumer sees it. One product stays under way while the next is issued; a stage is let go when the
// product after it was issued and its own is over.
//
// The two consumers meet once a tile: the leader when it has issued LEAD steps (or all, if there are fewer), the
// follower before its first. From there the leader is LEAD steps ahead, so that it finishes, and folds its tile, while
// the follower still multiplies; then it multiplies again while the follower folds. Meeting once at the start would not
// do: whenever loads are late the leader waits for them and the follower, whose stages are there, catches up.
//
// No deadlock, for 2 <= STAGES and 1 <= LEAD <= STAGES. Take the earliest step i, of all tiles in a row, that somebody
// has not let go. Nothing before i is held, so that loads up to i + STAGES - 1 are or will be there. Whoever holds i
// needs at most i + 1 to let go of it, or else waits to meet:
//   the follower, before its tile that starts with i: the leader comes after step i + LEAD - 1 at the latest, loaded;
//   the leader: it has read every step of the tiles that the follower must finish first, so that they are loaded.
// And neither waits for a meeting other than this one, since both have left the one before.
template <int LEAD, int STAGES, class Ops>
FUSEDLOSS_BOTH void consume(Ring<STAGES>& ring, int steps, bool leader, Ops& ops) {
  static_assert(STAGES >= 2 && LEAD >= 1 && LEAD <= STAGES);
  Ring<STAGES> held = ring;
  const int meeting = (steps < LEAD ? steps : LEAD) - 1;
  if (!leader) ops.meet();
  ops.wait_full(ring.stage, ring.phase);
  ops.multiply_first(ring.stage);
  ring.advance();
  if (leader && meeting == 0) ops.meet();
  for (int step = 1; step < steps; ++step) {
    ops.wait_full(ring.stage, ring.phase);
    ops.multiply(ring.stage);
    ring.advance();
    ops.all_but_one_done();
    ops.release(held.stage);
    held.advance();
    if (leader && step == meeting) ops.meet();
  }
  ops.all_done();
  ops.release(held.stage);
}

// Tiles ---------------------------------------------------------------------------------------------------------------

struct Place {
  int m, n;
};

// group_m row tiles walk the columns together: x stays in L2, a y tile is fetched once for all. As `_place` in
// kernels/similarity.py.
FUSEDLOSS_BOTH constexpr Place place(int tile, int m_tiles, int n_tiles, int group_m) {
  const int group_size = group_m * n_tiles;
  const int first_m = tile / group_size * group_m;
  const int rows_in_group = m_tiles - first_m < group_m ? m_tiles - first_m : group_m;
  const int in_group = tile % group_size;
  return {first_m + in_group % rows_in_group, in_group / rows_in_group};
}

}  // namespace fusedloss::sm90
