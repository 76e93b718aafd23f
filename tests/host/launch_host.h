// csrc/launch.h's launch() for the host, and the launch of clusters: one after the other, done on return. From one
// thread at a time.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <utility>

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

// What `name` is set to, a number from 1 on; 0 where it is no number.
inline uint32_t number_of(const char* name) {
  const char* value = std::getenv(name);
  char* end = nullptr;
  const unsigned long number = value ? std::strtoul(value, &end, 10) : 0;
  return end && !*end ? uint32_t(number) : 0;
}

inline void run_cluster(unsigned x, unsigned y) {
  Machine& m = machine;
  m.x = x;
  m.y = y;
  m.cluster_barrier = {};
  for (int rank = 0; rank < m.cluster; rank++) {
    Block& block = m.blocks[rank];
    std::memset(block.shared, 0xff, m.shared_bytes);  // NaNs
    block.mbarriers.clear();
    block.exited = block.registers = 0;
  }
  for (int t = 0; t < m.all(); t++) {
    Fiber& fiber = m.fibers[t];
    fiber.copies.clear();
    fiber.groups = 0;
    fiber.registers = 65536 / m.threads / 8 * 8;  // what __launch_bounds__ lets ptxas have
  }
  for (int w = 0; w < m.all() / 32; w++) {
    m.warps[w] = {};
    m.warps[w].ready = ~0u;
  }
  m.ready = ~0u >> (32 - m.all() / 32);
  reschedule(m.launcher);
  if (!m.loads.empty()) fail("%zu loads are under way behind the end", m.loads.size());
  for (int w = 0; w < m.all() / 32; w++) {
    if (!m.warps[w].products.empty()) fail("warp %d ended without a wait for its products", w);
  }
  for (int rank = 0; rank < m.cluster; rank++) {
    for (const Mbarrier& mbarrier : m.blocks[rank].mbarriers) {
      if (mbarrier.bytes) fail("block %d's mbarrier at %u: %d bytes at the end", rank, mbarrier.offset, mbarrier.bytes);
    }
  }
}

inline cudaError_t run_grid(dim3 grid, int threads, size_t shared_bytes, int cluster, void (*run)(void*), void* body) {
  Machine& m = machine;
  if (threads < 1 || threads > kMaxThreads || !grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 ||
      grid.x > 0x7fffffff || grid.x % cluster) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes > 227 << 10) return cudaErrorInvalidValue;
  if (threads % 32 || grid.z > 1) fail("launch: whole warps and a grid of two dimensions, please");
  if (cluster > kMaxCluster || threads * cluster > kMaxThreads) fail("launch: a cluster of %d blocks", cluster);
  m.random = number_of("FUSEDLOSS_HOST_ORDER");
  m.backward = !m.random && chosen("FUSEDLOSS_HOST_ORDER", "forward", "backward");
  m.late = !chosen("FUSEDLOSS_HOST_COPIES", "late", "early");
  m.products_wait = chosen("FUSEDLOSS_HOST_PRODUCTS", "issue", "wait");
  m.truncate = chosen("FUSEDLOSS_HOST_SUMS", "exact", "truncate");
  m.ulps = number_of("FUSEDLOSS_HOST_ULPS");
  for (; m.created < threads * cluster; m.created++) create(m.created);

  m.cluster = cluster;
  m.shared_bytes = shared_bytes;
  m.threads = threads;
  m.blocks_x = grid.x;
  m.blocks_y = grid.y;
  m.body = body;
  m.run = run;
  for (int rank = 0; rank < cluster; rank++) {
    void* shared;  // of exactly this size: what follows is AddressSanitizer's
    if (posix_memalign(&shared, 1024, shared_bytes)) fail("launch: no memory");
    m.blocks[rank].shared = static_cast<unsigned char*>(shared);
  }
  std::vector<uint64_t> clusters(uint64_t(grid.x) * grid.y / cluster);
  std::iota(clusters.begin(), clusters.end(), uint64_t(0));
  if (m.backward) std::reverse(clusters.begin(), clusters.end());
  for (size_t i = m.random ? clusters.size() : 0; i > 1; i--) std::swap(clusters[i - 1], clusters[random(i)]);
  for (const uint64_t i : clusters) run_cluster(unsigned(i * cluster % grid.x), unsigned(i * cluster / grid.x));
  for (int rank = 0; rank < cluster; rank++) std::free(m.blocks[rank].shared);
  return cudaSuccess;
}

template <class Body>
cudaError_t run_grid(dim3 grid, int threads, size_t shared_bytes, int cluster, Body&& body) {
  const auto run = [](void* erased) { (*static_cast<std::remove_reference_t<Body>*>(erased))(); };
  return run_grid(grid, threads, shared_bytes, cluster, run, &body);
}

}  // namespace host

template <class... Params>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t,
                   Params... params) {
  return host::run_grid(grid, threads, shared_bytes, 1, [&] { kernel(params...); });
}

}  // namespace fusedloss

template <class... Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), const Params&... params) {
  const int cluster = config->numAttrs ? int(config->attrs[0].val.clusterDim.x) : 1;
  return fusedloss::host::run_grid(config->gridDim, int(config->blockDim.x), config->dynamicSmemBytes, cluster,
                                   [&] { kernel(params...); });
}
