// A block of threads on one CPU thread: every thread is a fiber, that runs until it waits for others.
//
// Of those that can run, the first in FUSEDLOSS_HOST_ORDER does: `forward` (the default) is lowest warp and lane first,
// `backward` highest. What a kernel computes must not depend on it; without a barrier that it needs, it does.
#pragma once

#include <sys/mman.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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
constexpr int kBarriers = 16;
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

struct Fiber {
  Stack stack;
  std::vector<Copy> copies;  // those under way, oldest first
  int groups;                // committed ones
};

using Collective = void (*)(void* const (&lanes)[32]);

struct Warp {
  uint32_t ready, exited;  // lanes
  int arrived;             // lanes at `collective`, each with its arguments
  Collective collective;
  const char* name;
  void* arguments[32];
};

struct Barrier {
  uint32_t warps;
  int arrived, threads;
};

struct Machine {
  Fiber fibers[kMaxThreads];
  Warp warps[kMaxThreads / 32];
  Barrier barriers[kBarriers];
  uint32_t ready;  // warps
  int threads, exited, current, created;
  bool backward, late;
  unsigned x, y, blocks_x, blocks_y;
  unsigned char* shared;
  size_t shared_bytes;
  void (*run)(void*);  // the kernel
  void* body;
  Stack launcher, *previous;
};
inline Machine machine;

[[noreturn, gnu::cold, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  std::fprintf(stderr, "fusedloss host: block (%u, %u), thread %d: ", machine.x, machine.y, machine.current);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::abort();
}

[[noreturn, gnu::cold]] inline void deadlock() {
  for (int w = 0; w < machine.threads / 32; w++) {
    const Warp& warp = machine.warps[w];
    std::fprintf(stderr, "warp %d: %d lanes exited", w, __builtin_popcount(warp.exited));
    if (warp.arrived) std::fprintf(stderr, ", %d wait in %s", warp.arrived, warp.name);
    for (int b = 0; b < kBarriers; b++) {
      const Barrier& barrier = machine.barriers[b];
      if (barrier.warps >> w & 1) {
        std::fprintf(stderr, ", all wait at barrier %d with %d of %d threads", b, barrier.arrived, barrier.threads);
      }
    }
    std::fputc('\n', stderr);
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

inline int first(uint32_t set) { return machine.backward ? 31 - __builtin_clz(set) : __builtin_ctz(set); }

// To the first thread that can run, from one that may no longer; back to the launcher after the last.
inline void reschedule(Stack& from) {
  if (machine.ready) {
    const int warp = first(machine.ready);
    machine.current = warp * 32 + first(machine.warps[warp].ready);
    Stack& to = machine.fibers[machine.current].stack;
    if (&to != &from) switch_stack(from, to);
  } else if (machine.exited == machine.threads) {
    switch_stack(from, machine.launcher);
  } else {
    deadlock();
  }
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
    machine.exited++;
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

struct BarrierArguments {
  int id, threads;
};

// bar.sync is .aligned: whole warps arrive.
inline void arrive(void* const (&lanes)[32]) {
  const BarrierArguments wanted = *static_cast<BarrierArguments*>(lanes[0]);
  for (void* lane : lanes) {
    const BarrierArguments& other = *static_cast<BarrierArguments*>(lane);
    if (other.id != wanted.id || other.threads != wanted.threads) fail("divergent collective: two barriers in a warp");
  }
  Barrier& barrier = machine.barriers[wanted.id];
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
  BarrierArguments arguments{id, threads};
  collective("a barrier", arrive, &arguments);
}

// Memory --------------------------------------------------------------------------------------------------------------

inline void aligned(const void* pointer, size_t bytes, const char* what) {
  if (uintptr_t(pointer) % bytes) fail("%s: %p is not aligned to %zu bytes", what, pointer, bytes);
}

// 16 bytes at an address that an instruction takes.
inline unsigned char* shared16(uint32_t address, const char* what) {
  if (address % 16) fail("%s: shared address %u is not aligned to 16 bytes", what, address);
  if (size_t(address) + 16 > machine.shared_bytes) {
    fail("%s: shared address %u is beyond the block's %zu bytes", what, address, machine.shared_bytes);
  }
  return machine.shared + address;
}

inline void copy(const Copy& c) {
  unsigned char* to = shared16(c.shared, "cp.async");
  if (c.bytes) std::memcpy(to, c.global, c.bytes);
  std::memset(to + c.bytes, 0, 16 - c.bytes);
}

}  // namespace host
}  // namespace fusedloss
