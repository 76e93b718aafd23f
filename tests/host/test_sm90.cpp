// The sm_90 kernel's addresses and order, csrc/sm90.h, against what the PTX ISA says, written down a second time.
//
// The pipeline: the kernel's own loops run as fibers, one a warp, that a random scheduler switches at every wait. Loads
// land and products end when it pleases, in the order that the ISA promises: loads in none, products in the order of
// their warp. Prints what it did; the first violation ends it with status 1.
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "sm90.h"

using namespace fusedloss::sm90;

#define CHECK(condition)                                                            \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);          \
      std::exit(1);                                                                 \
    }                                                                               \
  } while (0)

// Addresses -----------------------------------------------------------------------------------------------------------

void test_swizzle() {
  // The ISA's figure of the 64-byte mode: where the 16-byte chunks of 8 rows lie.
  const int figure[8][4] = {{0, 1, 2, 3}, {0, 1, 2, 3}, {1, 0, 3, 2}, {1, 0, 3, 2},
                            {2, 3, 0, 1}, {2, 3, 0, 1}, {3, 2, 1, 0}, {3, 2, 1, 0}};
  for (uint32_t row = 0; row < 256; ++row) {
    for (uint32_t chunk = 0; chunk < 4; ++chunk) {
      for (uint32_t byte : {0, 5, 15}) {
        CHECK(swizzle64(row * 64 + chunk * 16 + byte) == row * 64 + figure[row % 8][chunk] * 16 + byte);
      }
    }
  }
}

void test_descriptor() {
  // By hand, of the ISA's table of fields: swizzle mode 2 in bits 62-63 is 8 << 60; a stride of 512 bytes is 32 in bits
  // 32-45; the leading offset's 1 in bits 16-29; the address / 16 in bits 0-13.
  CHECK(descriptor(0) == 0x8000'0020'0001'0000);
  CHECK(descriptor(0x400) == 0x8000'0020'0001'0040);
  CHECK(descriptor(0x38c00) == 0x8000'0020'0001'38c0);
  CHECK(descriptor(0x0103'8c00) == 0x8000'0020'0001'38c0);  // the second block of a cluster: bits from 24 are its rank
  CHECK(advance(descriptor(0x400), 32) == 0x8000'0020'0001'0042);
  CHECK(advance(descriptor(0x400), 7 * 24576) == descriptor(0x400 + 7 * 24576));
  CHECK(advance(descriptor(227 * 1024), 1024) == descriptor(228 * 1024));

  // What the products read is what the loads wrote: byte b of row r, for each step along the row and wherever the tile
  // lies. A product's byte is at start + r / 8 * stride + r % 8 * 64 + b, with that address's bits 7-8 xored into its
  // bits 4-5.
  for (uint32_t base : {0x400u, 0x4400u, 0x2c400u}) {
    for (uint32_t row = 0; row < 256; ++row) {
      for (uint32_t byte = 0; byte < 64; ++byte) {
        const uint64_t d = advance(descriptor(base), byte / kStepBytes * kStepBytes);
        const uint32_t start = uint32_t(d & 0x3fff) * 16, stride = uint32_t(d >> 32 & 0x3fff) * 16;
        const uint32_t address = start + row / 8 * stride + row % 8 * 64 + byte % kStepBytes;
        CHECK((address ^ ((address & 0x180) >> 3)) == base + swizzle64(row * 64 + byte));
      }
    }
  }
}

// The pipeline --------------------------------------------------------------------------------------------------------

// An mbarrier as the ISA describes it: a phase, the arrivals that are pending in it, the arrivals that the next one
// expects, and a count of bytes in transit. The phase completes when both counts are 0.
struct Mbarrier {
  int expected, pending, bytes = 0;
  int64_t phase = 0;

  explicit Mbarrier(int count) : expected(count), pending(count) {}
  void settle() {
    if (pending == 0 && bytes == 0) ++phase, pending = expected;
  }
  void arrive() {
    CHECK(pending > 0);
    --pending, settle();
  }
  void arrive_expect(int count) {
    CHECK(pending > 0);
    bytes += count;
    CHECK(bytes <= (1 << 20) - 1);
    --pending, settle();
  }
  void complete(int count) {
    bytes -= count;
    CHECK(bytes >= -((1 << 20) - 1));
    settle();
  }
  // test_wait.parity: the parity is the current phase's, which is incomplete, or that of the one before, which is over.
  bool done(uint32_t parity) const { return uint32_t(phase & 1) != parity; }
};

struct Fiber {
  ucontext_t context, *scheduler;
  std::vector<char> stack = std::vector<char>(64 << 10);
  std::function<void()> body;
  std::function<bool()> ready = [] { return true; };
  bool finished = false;

  static Fiber*& current() {
    static Fiber* fiber = nullptr;
    return fiber;
  }
  static void enter() {
    Fiber* self = current();
    self->body();
    self->finished = true;
    swapcontext(&self->context, self->scheduler);
  }
  static void wait(std::function<bool()> until) {
    Fiber* self = current();
    self->ready = std::move(until);
    swapcontext(&self->context, self->scheduler);
  }
};

constexpr int kWarps = 4, kConsumers = 2;

template <int STAGES, int LEAD, int CLUSTER>
struct Simulation {
  static constexpr int kLoads = 1 + CLUSTER;  // of a stage: x, and a part of y from every block
  struct Slot {
    int64_t holds[kLoads];  // which step of all: -1 before the first
    int reading = 0;        // products under way
  };
  struct Block {
    std::vector<Slot> slots;
    std::vector<Mbarrier> full, empty;
    int met = 0;
    int64_t meetings = 0;
  };
  struct Load {
    int block, stage, part;
    int64_t step;
  };
  struct Product {
    int block, stage;
    int64_t step;
  };
  struct Warp {
    std::vector<Product> issued;  // not over
    std::vector<std::vector<Product>> groups;
    int64_t steps = 0;
  };

  std::mt19937 random;
  std::vector<Block> blocks{CLUSTER};
  std::vector<Load> loads;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::unique_ptr<Fiber>> fibers;
  int64_t furthest = 0;

  struct ProducerOps {
    Simulation& s;
    int rank;
    int64_t& count;
    void wait_empty(int stage, uint32_t phase) {
      Fiber::wait([this, stage, phase] { return s.blocks[rank].empty[stage].done(phase); });
    }
    void load(int stage, int) {
      s.blocks[rank].full[stage].arrive_expect(kLoads * 1000);
      Fiber::wait([] { return true; });
      s.loads.push_back({rank, stage, 0, count});
      for (int block = 0; block < CLUSTER; ++block) s.loads.push_back({block, stage, 1 + rank, count});
      ++count;
    }
  };

  struct ConsumerOps {
    Simulation& s;
    int rank, consumer;
    Warp& warp;
    void wait_full(int stage, uint32_t phase) {
      Fiber::wait([this, stage, phase] { return s.blocks[rank].full[stage].done(phase); });
    }
    void multiply_first(int stage) { multiply(stage); }
    void multiply(int stage) {
      Slot& slot = s.blocks[rank].slots[stage];
      for (int64_t step : slot.holds) CHECK(step == warp.steps);
      ++slot.reading;
      warp.groups.push_back({{rank, stage, warp.steps}});
      ++warp.steps;
      Fiber::wait([] { return true; });
    }
    void wait_groups(size_t most) {
      Fiber::wait([this, most] { return warp.groups.size() <= most; });
    }
    void all_but_one_done() { wait_groups(1); }
    void all_done() { wait_groups(0); }
    void release(int stage) {
      for (int block = 0; block < CLUSTER; ++block) {
        s.blocks[block].empty[stage].arrive();
        Fiber::wait([] { return true; });
      }
    }
    // bar.sync of all warps of both consumers.
    void meet() {
      Block& block = s.blocks[rank];
      const int64_t meeting = block.meetings;
      if (++block.met == kWarps * kConsumers) block.met = 0, ++block.meetings;
      Fiber::wait([&block, meeting] { return block.meetings > meeting; });
    }
  };

  Simulation(int tiles, int steps, unsigned seed) : random(seed) {
    for (Block& block : blocks) {
      for (int stage = 0; stage < STAGES; ++stage) {
        Slot slot;
        for (int64_t& step : slot.holds) step = -1;
        block.slots.push_back(slot);
        block.full.emplace_back(1);
        block.empty.emplace_back(kWarps * kConsumers * CLUSTER);
      }
    }
    for (int rank = 0; rank < CLUSTER; ++rank) {
      start([this, rank, tiles, steps] {
        auto ring = Ring<STAGES>::producer();
        int64_t count = 0;
        ProducerOps ops{*this, rank, count};
        for (int tile = 0; tile < tiles; ++tile) produce(ring, steps, ops);
      });
      for (int consumer = 0; consumer < kConsumers; ++consumer) {
        for (int w = 0; w < kWarps; ++w) {
          warps.push_back(std::make_unique<Warp>());
          start([this, rank, consumer, tiles, steps, warp = warps.back().get()] {
            auto ring = Ring<STAGES>::consumer();
            ConsumerOps ops{*this, rank, consumer, *warp};
            for (int tile = 0; tile < tiles; ++tile) {
              consume<LEAD>(ring, steps, consumer == 0, ops);
              CHECK(warp->groups.empty());
              Fiber::wait([] { return true; });  // the fold
            }
          });
        }
      }
    }
  }

  void start(std::function<void()> body) {
    auto fiber = std::make_unique<Fiber>();
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.data();
    fiber->context.uc_stack.ss_size = fiber->stack.size();
    fiber->context.uc_link = nullptr;
    fiber->body = std::move(body);
    makecontext(&fiber->context, &Fiber::enter, 0);
    fibers.push_back(std::move(fiber));
  }

  void land(size_t which) {
    const Load load = loads[which];
    loads.erase(loads.begin() + which);
    Slot& slot = blocks[load.block].slots[load.stage];
    CHECK(slot.reading == 0);                                                  // nobody multiplies what it overwrites
    CHECK(slot.holds[load.part] == (load.step < STAGES ? -1 : load.step - STAGES));  // and everybody had it
    for (size_t w = 0; w < warps.size(); ++w) {
      const int rank = int(w) / (kWarps * kConsumers);
      if (rank == load.block) CHECK(warps[w]->steps > load.step - STAGES);
    }
    slot.holds[load.part] = load.step;
    blocks[load.block].full[load.stage].complete(1000);
  }

  void end_product(Warp& warp) {
    const Product product = warp.groups.front()[0];
    warp.groups.erase(warp.groups.begin());
    Slot& slot = blocks[product.block].slots[product.stage];
    for (int64_t step : slot.holds) CHECK(step == product.step);
    --slot.reading;
  }

  // Weights of the scheduler differ from run to run, so that sometimes loads, products or single warps starve.
  void run() {
    const int favour_loads = random() % 8 + 1, favour_products = random() % 8 + 1;
    std::vector<int> favour(fibers.size());
    for (int& f : favour) f = random() % 8 + 1;
    ucontext_t scheduler;
    for (;;) {
      struct Choice {
        int kind;
        size_t which;
      };
      std::vector<Choice> choices;
      bool alive = false;
      for (size_t f = 0; f < fibers.size(); ++f) {
        if (fibers[f]->finished) continue;
        alive = true;
        if (fibers[f]->ready()) choices.insert(choices.end(), favour[f], {0, f});
      }
      for (size_t l = 0; l < loads.size(); ++l) choices.insert(choices.end(), favour_loads, {1, l});
      for (size_t w = 0; w < warps.size(); ++w) {
        if (!warps[w]->groups.empty()) choices.insert(choices.end(), favour_products, {2, w});
      }
      if (!alive) break;
      CHECK(!choices.empty());  // else: deadlock
      const Choice choice = choices[random() % choices.size()];
      if (choice.kind == 1) {
        land(choice.which);
      } else if (choice.kind == 2) {
        end_product(*warps[choice.which]);
      } else {
        Fiber* fiber = fibers[choice.which].get();
        fiber->ready = [] { return true; };
        fiber->scheduler = &scheduler;
        Fiber::current() = fiber;
        swapcontext(&scheduler, &fiber->context);
        lead();
      }
    }
    CHECK(loads.empty());  // a block may end
  }

  // How far the leader is ahead: never by more than there are stages.
  void lead() {
    for (int rank = 0; rank < CLUSTER; ++rank) {
      const int first = rank * kWarps * kConsumers;
      furthest = std::max(furthest, warps[first]->steps - warps[first + kWarps]->steps);
    }
    CHECK(furthest <= STAGES);
  }
};

int64_t runs = 0;

template <int STAGES, int LEAD, int CLUSTER>
void test_pipeline(int seeds) {
  for (int steps : {1, 2, 3, LEAD, STAGES - 1, STAGES, STAGES + 1, 3 * STAGES + 1}) {
    for (int tiles : {1, 2, 3, 7}) {
      for (int seed = 0; seed < seeds; ++seed) {
        Simulation<STAGES, LEAD, CLUSTER> simulation(tiles, steps, unsigned(seed * 1000 + steps * 10 + tiles));
        simulation.run();
        for (const auto& warp : simulation.warps) CHECK(warp->steps == int64_t(tiles) * steps);
        ++runs;
      }
    }
  }
}

// Tiles ---------------------------------------------------------------------------------------------------------------

void test_place() {
  for (int m_tiles : {1, 2, 7, 8, 9, 16, 31}) {
    for (int n_tiles : {1, 2, 5, 13}) {
      for (int group_m : {1, 4, 8}) {
        std::set<std::pair<int, int>> seen;
        for (int tile = 0; tile < m_tiles * n_tiles; ++tile) {
          const Place at = place(tile, m_tiles, n_tiles, group_m);
          CHECK(at.m >= 0 && at.m < m_tiles && at.n >= 0 && at.n < n_tiles);
          seen.insert({at.m, at.n});
        }
        CHECK(seen.size() == size_t(m_tiles) * n_tiles);
      }
    }
  }
}

// With arguments m_tiles, n_tiles, group_m: the order, to be compared with the Triton kernel's.
int main(int argc, char** argv) {
  if (argc == 4) {
    const int m_tiles = std::atoi(argv[1]), n_tiles = std::atoi(argv[2]), group_m = std::atoi(argv[3]);
    for (int tile = 0; tile < m_tiles * n_tiles; ++tile) {
      const Place at = place(tile, m_tiles, n_tiles, group_m);
      std::printf("%d %d\n", at.m, at.n);
    }
    return 0;
  }
  test_swizzle();
  test_descriptor();
  test_place();
  test_pipeline<8, 6, 1>(20);   // 128 x 256
  test_pipeline<12, 9, 1>(10);  // 128 x 128
  test_pipeline<8, 6, 2>(10);
  test_pipeline<2, 1, 1>(10);  // the least and the most that the proof allows
  test_pipeline<2, 2, 1>(10);
  test_pipeline<4, 4, 2>(10);
  std::printf("%lld interleavings\n", static_cast<long long>(runs));
}
