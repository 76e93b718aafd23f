// csrc/launch.h's launch() for the host: the blocks one after the other, done on return. From one thread at a time.
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>

#include "machine.h"

namespace fusedloss {
namespace host __attribute__((visibility("hidden"))) {

// Whether the environment variable `name` is set to the second of two values, the first being the default.
inline bool chosen(const char* name, const char* usual, const char* other) {
  const char* value = std::getenv(name);
  if (!value || !std::strcmp(value, usual)) return false;
  if (std::strcmp(value, other)) fail("%s=%s: %s or %s", name, value, usual, other);
  return true;
}

inline void run_block(unsigned x, unsigned y) {
  Machine& m = machine;
  m.x = x;
  m.y = y;
  m.exited = 0;
  std::memset(m.shared, 0xff, m.shared_bytes);  // NaNs
  for (int t = 0; t < m.threads; t++) {
    m.fibers[t].copies.clear();
    m.fibers[t].groups = 0;
  }
  for (int w = 0; w < m.threads / 32; w++) {
    m.warps[w] = {};
    m.warps[w].ready = ~0u;
  }
  m.ready = ~0u >> (32 - m.threads / 32);
  reschedule(m.launcher);
}

}  // namespace host

template <class... Params>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t,
                   Params... params) {
  host::Machine& m = host::machine;
  if (threads < 1 || threads > host::kMaxThreads || !grid.x || !grid.y || !grid.z || grid.y > 65535 ||
      grid.z > 65535 || grid.x > 0x7fffffff) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes > 227 << 10) return cudaErrorInvalidValue;
  if (threads % 32 || grid.z > 1) host::fail("launch: whole warps and a grid of two dimensions, please");
  m.backward = host::chosen("FUSEDLOSS_HOST_ORDER", "forward", "backward");
  m.late = !host::chosen("FUSEDLOSS_HOST_COPIES", "late", "early");
  for (; m.created < threads; m.created++) host::create(m.created);

  void* shared;  // of exactly this size: what follows is AddressSanitizer's
  if (posix_memalign(&shared, 1024, shared_bytes)) host::fail("launch: no memory");
  m.shared = static_cast<unsigned char*>(shared);
  m.shared_bytes = shared_bytes;
  m.threads = threads;
  m.blocks_x = grid.x;
  m.blocks_y = grid.y;
  auto body = [&] { kernel(params...); };
  m.body = &body;
  m.run = [](void* erased) { (*static_cast<decltype(body)*>(erased))(); };
  const uint64_t blocks = uint64_t(grid.x) * grid.y;
  for (uint64_t i = 0; i < blocks; i++) {
    const uint64_t block = m.backward ? blocks - 1 - i : i;
    host::run_block(unsigned(block % grid.x), unsigned(block / grid.x));
  }
  std::free(shared);
  return cudaSuccess;
}

}  // namespace fusedloss
