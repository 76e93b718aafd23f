// A block of threads, or a cluster of blocks, on one CPU thread: every thread is a fiber, that runs until it waits for
// others.
//
// Of those that can run, the first in FUSEDLOSS_HOST_ORDER does: `forward` (the default) is lowest warp and lane first,
// `backward` highest, a number is the seed of a random choice. What a kernel computes must not depend on it; without a
// barrier that it needs, it does.
#pragma once

#include <sys/mman.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__) && !defined(FUSEDLOSS_HOST_UCONTEXT)
#define FUSEDLOSS_HOST_UCONTEXT
#endif
#ifdef FUSEDLOSS_HOST_UCONTEXT
#include <ucontext.h>
#endif

namespace fusedloss {
// Hidden: two libraries in one process have a machine each.
namespace host __attribute__((visibility("hidden"))) {

constexpr int kMaxThreads = 1024;
constexpr int kMaxCluster = 2;
constexpr int kBarriers = 16;
constexpr int kRankShift = 24;  // a shared address is the block's rank in its cluster and an offset
constexpr size_t kStackBytes = 256 << 10;  // touched pages only; AddressSanitizer's frames are large
constexpr size_t kGuardBytes = 4096;

struct Stack {  // of a fiber, or of who launches
#ifdef FUSEDLOSS_HOST_UCONTEXT
  ucontext_t context;
#else
  void* pointer;
#endif
  const void* bottom;
  size_t bytes;
  void* fake;  // AddressSanitizer's
};

struct Copy {
  uint32_t shared;
  const void* global;
  int bytes, group;
};

using Waiters = std::vector<int>;  // threads

// As the ISA describes it: the arrivals that its phase waits for and those that the next one will, and the bytes that
// are expected less those that landed. A phase is over when nothing is pending; a count of bytes may be below 0 before.
struct Mbarrier {
  uint32_t offset;
  int expected, pending, bytes;
  uint32_t phase;
  bool fenced;
  Waiters waiters;
};

struct Fiber {
  Stack stack;
  std::vector<Copy> copies;  // those under way, oldest first
  int groups;                // committed ones
  int registers;
  const char* waits;  // for what, but for collectives and barriers
  const Mbarrier* mbarrier;
  uint32_t parity;
};

using Collective = void (*)(void* const (&lanes)[32]);

// A warp's part of a warpgroup's product, with the accumulators of its lanes.
struct Product {
  void (*multiply)(const Product&);
  float* c[32];
  uint64_t a, b;
  bool first;
  int warp, group;
};

struct Warp {
  uint32_t ready, exited;  // lanes
  int arrived;             // lanes at `collective`, each with its arguments
  Collective collective;
  const char* name;
  void* arguments[32];
  std::vector<Product> products;  // under way, oldest first
  int groups;                     // committed ones
  bool fenced;
};

struct Barrier {
  uint32_t warps;
  int arrived, threads;
};

struct Block {
  unsigned char* shared;
  Barrier barriers[kBarriers];
  std::deque<Mbarrier> mbarriers;
  int exited;     // threads
  int registers;  // given back
  Waiters for_registers;
};

struct Machine {
  Fiber fibers[kMaxThreads];  // block by block
  Warp warps[kMaxThreads / 32];
  Block blocks[kMaxCluster];
  Barrier cluster_barrier;
  std::vector<std::function<void()>> loads;  // of tensors, not landed
  uint32_t ready;                            // warps
  int cluster, threads, current, created;    // threads: of a block
  bool backward, late, products_wait, truncate;
  uint32_t random, ulps;  // 0: no
  unsigned x, y, blocks_x, blocks_y;
  size_t shared_bytes;
  void (*run)(void*);  // the kernel

  int all() const { return cluster * threads; }
  int rank() const { return current / threads; }
  int thread() const { return current % threads; }
  Block& block() { return blocks[rank()]; }
  void* body;
  Stack launcher, *previous;
};
inline Machine machine;

[[noreturn, gnu::cold, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  const bool placed = machine.threads > 0;
  std::fprintf(stderr, "fusedloss host: block (%u, %u), thread %d: ", machine.x + (placed ? machine.rank() : 0),
               machine.y, placed ? machine.thread() : 0);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  if (machine.random) std::fprintf(stderr, "FUSEDLOSS_HOST_ORDER=%s\n", std::getenv("FUSEDLOSS_HOST_ORDER"));
  std::abort();
}

[[noreturn, gnu::cold]] inline void deadlock() {
  for (int w = 0; w < machine.all() / 32; w++) {
    const Warp& warp = machine.warps[w];
    const int rank = w * 32 / machine.threads;
    std::fprintf(stderr, "block %d, warp %d: %d lanes exited", rank, w - rank * machine.threads / 32,
                 __builtin_popcount(warp.exited));
    if (warp.arrived) std::fprintf(stderr, ", %d wait in %s", warp.arrived, warp.name);
    for (int b = 0; b <= kBarriers; b++) {
      const bool whole = b == kBarriers;
      const Barrier& barrier = whole ? machine.cluster_barrier : machine.blocks[rank].barriers[b];
      if (!(barrier.warps >> w & 1)) continue;
      std::fprintf(stderr, ", all wait at %s %d with %d of %d threads", whole ? "the cluster's barrier" : "barrier",
                   whole ? 0 : b, barrier.arrived, barrier.threads);
    }
    for (int lane = 0; lane < 32; lane++) {
      const Fiber& fiber = machine.fibers[w * 32 + lane];
      const auto same = [&](int other) {
        const Fiber& f = machine.fibers[w * 32 + other];
        return f.waits == fiber.waits && f.mbarrier == fiber.mbarrier && f.parity == fiber.parity;
      };
      if (!fiber.waits || (lane && same(lane - 1))) continue;
      int last = lane;
      while (last < 31 && same(last + 1)) last++;
      std::fprintf(stderr, ", lanes %d to %d wait for %s", lane, last, fiber.waits);
      if (fiber.mbarrier) std::fprintf(stderr, " at %u, parity %u", fiber.mbarrier->offset, fiber.parity);
    }
    std::fputc('\n', stderr);
  }
  for (int rank = 0; rank < machine.cluster; rank++) {
    for (const Mbarrier& m : machine.blocks[rank].mbarriers) {
      std::fprintf(stderr, "block %d, the mbarrier at %u: phase %u waits for %d of %d arrivals and %d bytes\n", rank,
                   m.offset, m.phase, m.pending, m.expected, m.bytes);
    }
  }
  fail("deadlock: no thread can go on");
}

// Switching -----------------------------------------------------------------------------------------------------------

#ifndef FUSEDLOSS_HOST_UCONTEXT
// What a call preserves, without swapcontext's system call. noipa: it clobbers more than the compiler could see.
__attribute__((naked, noipa)) inline void swap_stacks(void** /* from: rdi */, void* /* to: rsi */) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret");
}
#endif

inline void switched(Stack* self) {
#if defined(__SANITIZE_ADDRESS__)  // tells where the launcher's stack is, too
  __sanitizer_finish_switch_fiber(self ? self->fake : nullptr, &machine.previous->bottom, &machine.previous->bytes);
#else
  (void)self;
#endif
}

inline void switch_stack(Stack& from, Stack& to) {
  machine.previous = &from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.bytes);
#endif
#ifdef FUSEDLOSS_HOST_UCONTEXT
  swapcontext(&from.context, &to.context);
#else
  swap_stacks(&from.pointer, to.pointer);
#endif
  switched(&from);
}

inline uint32_t random(uint32_t below) {  // xorshift
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 17;
  machine.random ^= machine.random << 5;
  return machine.random % below;
}

inline int first(uint32_t set) {
  if (machine.random) {
    for (uint32_t skip = random(__builtin_popcount(set)); skip; skip--) set &= set - 1;
    return __builtin_ctz(set);
  }
  return machine.backward ? 31 - __builtin_clz(set) : __builtin_ctz(set);
}

// One of the loads, which land in no order.
inline void land() {
  const size_t count = machine.loads.size();
  const size_t which = machine.random ? random(count) : machine.backward ? count - 1 : 0;
  const auto load = std::move(machine.loads[which]);
  machine.loads.erase(machine.loads.begin() + which);
  load();
}

// To the first thread that can run, from one that may no longer; back to the launcher after the last.
inline void reschedule(Stack& from) {
  int exited = 0;
  while (!machine.ready) {
    for (int rank = exited = 0; rank < machine.cluster; rank++) exited += machine.blocks[rank].exited;
    if (exited == machine.all()) return switch_stack(from, machine.launcher);
    if (machine.loads.empty()) deadlock();
    land();
  }
  const int warp = first(machine.ready);
  machine.current = warp * 32 + first(machine.warps[warp].ready);
  Stack& to = machine.fibers[machine.current].stack;
  if (&to != &from) switch_stack(from, to);
}

inline void block(int thread) {
  const int w = thread / 32;
  machine.warps[w].ready &= ~(1u << thread % 32);
  if (!machine.warps[w].ready) machine.ready &= ~(1u << w);
}

// A fiber outlives its block: it runs the same thread of the next.
inline void fiber() {
  switched(nullptr);
  for (;;) {
    machine.run(machine.body);
    const int thread = machine.current;
    machine.block().exited++;
    machine.warps[thread / 32].exited |= 1u << thread % 32;
    block(thread);
    reschedule(machine.fibers[thread].stack);
  }
}

inline void create(int thread) {
  void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE)) fail("no memory for a stack");
  Stack& stack = machine.fibers[thread].stack;
  stack.bottom = static_cast<char*>(memory) + kGuardBytes;
  stack.bytes = kStackBytes - kGuardBytes - thread % 32 * 1088;  // equal addresses would share a line of the cache
#ifdef FUSEDLOSS_HOST_UCONTEXT
  getcontext(&stack.context);
  stack.context.uc_stack.ss_sp = const_cast<void*>(stack.bottom);
  stack.context.uc_stack.ss_size = stack.bytes;
  makecontext(&stack.context, &fiber, 0);
#else
  void** top = reinterpret_cast<void**>(uintptr_t(stack.bottom) + stack.bytes);
  top[-1] = nullptr;  // where a return address lies: the stack ends here
  top[-2] = reinterpret_cast<void*>(&fiber);
  stack.pointer = top - 8;  // six registers below
#endif
}

// Waiting -------------------------------------------------------------------------------------------------------------

// Every lane brings its arguments, and the last to arrive computes for all.
inline void collective(const char* name, Collective compute, void* arguments) {
  const int thread = machine.current;
  Warp& warp = machine.warps[thread / 32];
  if (warp.arrived && warp.collective != compute) {
    fail("divergent collective: %d lanes of the warp are in %s, this one in %s", warp.arrived, warp.name, name);
  }
  warp.collective = compute;
  warp.name = name;
  warp.arguments[thread % 32] = arguments;
  block(thread);
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    warp.ready = ~0u;
    machine.ready |= 1u << thread / 32;
    compute(warp.arguments);
  }
  reschedule(machine.fibers[thread].stack);
}

// Until another thread wakes who waits there; what was waited for may be gone again.
inline void wait(Waiters& waiters, const char* what, const Mbarrier* mbarrier = nullptr, uint32_t parity = 0) {
  const int thread = machine.current;
  Fiber& fiber = machine.fibers[thread];
  fiber.waits = what, fiber.mbarrier = mbarrier, fiber.parity = parity;
  waiters.push_back(thread);
  block(thread);
  reschedule(fiber.stack);
  fiber.waits = nullptr, fiber.mbarrier = nullptr;
}
inline void wake(Waiters& waiters) {
  for (const int thread : waiters) {
    machine.warps[thread / 32].ready |= 1u << thread % 32;
    machine.ready |= 1u << thread / 32;
  }
  waiters.clear();
}

struct BarrierArguments {
  Barrier* barrier;
  int id, threads;
};

// bar.sync is .aligned: whole warps arrive.
inline void arrive(void* const (&lanes)[32]) {
  const BarrierArguments wanted = *static_cast<BarrierArguments*>(lanes[0]);
  for (void* lane : lanes) {
    const BarrierArguments& other = *static_cast<BarrierArguments*>(lane);
    if (other.barrier != wanted.barrier || other.threads != wanted.threads) fail("divergent collective: two barriers in a warp");
  }
  Barrier& barrier = *wanted.barrier;
  if (barrier.warps && barrier.threads != wanted.threads) {
    fail("barrier %d of %d threads, and of %d", wanted.id, barrier.threads, wanted.threads);
  }
  const uint32_t warp = 1u << machine.current / 32;
  barrier.threads = wanted.threads;
  barrier.warps |= warp;
  barrier.arrived += 32;
  machine.ready &= ~warp;
  if (barrier.arrived == barrier.threads) {
    machine.ready |= barrier.warps;
    barrier = {};
  }
}

inline void barrier(int id, int threads) {
  if (id < 0 || id >= kBarriers || threads < 32 || threads > machine.threads || threads % 32) {
    fail("barrier %d of %d threads: 0 to 15, and whole warps of the block", id, threads);
  }
  BarrierArguments arguments{&machine.block().barriers[id], id, threads};
  collective("a barrier", arrive, &arguments);
}
inline void cluster_barrier() {
  BarrierArguments arguments{&machine.cluster_barrier, kBarriers, machine.all()};
  collective("the cluster's barrier", arrive, &arguments);
}

// Memory --------------------------------------------------------------------------------------------------------------

inline void aligned(const void* pointer, size_t bytes, const char* what) {
  if (uintptr_t(pointer) % bytes) fail("%s: %p is not aligned to %zu bytes", what, pointer, bytes);
}

// The offset of an address that an instruction takes, of `bytes` bytes in the thread's block.
inline uint32_t offset_of(uint32_t address, size_t bytes, size_t alignment, const char* what) {
  const uint32_t offset = address & ((1u << kRankShift) - 1);
  if (address % alignment) fail("%s: shared address %u is not aligned to %zu bytes", what, address, alignment);
  if (int(address >> kRankShift) != machine.rank()) fail("%s: address %u is another block's", what, address);
  if (offset + bytes > machine.shared_bytes) {
    fail("%s: shared address %u is beyond the block's %zu bytes", what, address, machine.shared_bytes);
  }
  return offset;
}
inline unsigned char* shared16(uint32_t address, const char* what) {
  return machine.block().shared + offset_of(address, 16, 16, what);
}

inline void copy(const Copy& c) {
  unsigned char* to = shared16(c.shared, "cp.async");
  if (c.bytes) std::memcpy(to, c.global, c.bytes);
  std::memset(to + c.bytes, 0, 16 - c.bytes);
}

}  // namespace host
}  // namespace fusedloss
