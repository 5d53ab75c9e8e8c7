// Copies into a ring of stages between a producer and four consumer warps.

#include <vector>

#include "emulator_test.h"

namespace qwen1m::arch {
namespace {

constexpr int kStages = 2;
constexpr int kTiles = 6;
constexpr int kConsumers = 128;
constexpr int kThreads = kConsumers + 32;
constexpr uint32_t kStageBytes = kConsumers * 4;

struct Layout {
  uint32_t stage[kStages][kConsumers];
  Mbarrier full[kStages];
  Mbarrier empty[kStages];
};

enum class Bug {
  kNone,
  kNoInitFence,
  kNoInitBarrier,
  kWrongFullParity,
  kWrongEmptyParity,
  kTooManyArrivals,
  kTooFewArrivals,
  kExpectTooSmall,
  kExpectTooBig,
  kNoLoad,
  kNoEmptyWait,
  kNoFullWait,
  kReleaseBeforeRead,
  kSharedOutOfBounds,
  kGlobalOutOfBounds,
  kBarrierOverwritten,
  kNeverWaited,
  kInitTwice,
  kTryWaitOnly,
};

void produce(Shared<Layout> smem, const uint32_t* in, Bug bug) {
  const auto full = Q1M_SHARED_MEMBER(smem, full);
  const auto empty = Q1M_SHARED_MEMBER(smem, empty);
  const auto stages = Q1M_SHARED_MEMBER(smem, stage);
  for (int tile = 0; tile < kTiles; ++tile) {
    const int stage = tile % kStages;
    const auto turn = static_cast<uint32_t>(tile / kStages & 1);
    if (bug == Bug::kWrongEmptyParity) {
      mbarrier_wait(empty[stage], turn);
    } else if (bug != Bug::kNoEmptyWait) {
      mbarrier_wait(empty[stage], turn ^ 1);
    }
    uint32_t bytes = kStageBytes;
    if (bug == Bug::kExpectTooSmall) bytes -= 16;
    if (bug == Bug::kExpectTooBig) bytes += 16;
    mbarrier_arrive_expect_tx(full[stage], bytes);
    const uint32_t* from = in + tile * kConsumers;
    if (bug == Bug::kGlobalOutOfBounds && tile == kTiles - 1) from += 4;
    if (bug != Bug::kNoLoad) {
      bulk_load(stages[stage].as<void>(), from, kStageBytes, full[stage]);
    }
  }
}

void consume(Shared<Layout> smem, uint32_t* out, Bug bug) {
  const auto full = Q1M_SHARED_MEMBER(smem, full);
  const auto empty = Q1M_SHARED_MEMBER(smem, empty);
  const auto stages = Q1M_SHARED_MEMBER(smem, stage);
  const int lane = lane_index();
  uint32_t sum = 0;
  for (int tile = 0; tile < kTiles; ++tile) {
    const int stage = tile % kStages;
    const auto turn = static_cast<uint32_t>(tile / kStages & 1);
    if (bug == Bug::kNeverWaited) continue;
    if (bug == Bug::kWrongFullParity) {
      mbarrier_wait(full[stage], turn ^ 1);
    } else if (bug == Bug::kTryWaitOnly) {
      mbarrier_try_wait(full[stage], turn);  // may have failed
    } else if (bug != Bug::kNoFullWait) {
      while (!mbarrier_try_wait(full[stage], turn)) {
      }
    }
    const auto release = [&] {
      const bool arrives = bug == Bug::kTooManyArrivals  ? lane < 2
                           : bug == Bug::kTooFewArrivals ? lane == 0 && warp_index() != 3
                                                         : lane == 0;
      if (arrives) mbarrier_arrive(empty[stage]);
    };
    if (bug == Bug::kReleaseBeforeRead) {
      warp_sync();
      release();
    }
    const int element = bug == Bug::kSharedOutOfBounds ? 1 << 14 : thread_index();
    sum += shared_load(stages[stage][element]);
    if (bug != Bug::kReleaseBeforeRead) {
      warp_sync();
      release();
    }
  }
  global_store(out + thread_index(), sum);
}

void pipeline(const uint32_t* in, uint32_t* out, Bug bug) {
  const auto smem = shared_memory<Layout>();
  const auto full = Q1M_SHARED_MEMBER(smem, full);
  const auto empty = Q1M_SHARED_MEMBER(smem, empty);
  if (thread_index() == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(full[i], 1);
      mbarrier_init(empty[i], kConsumers / 32);
    }
    if (bug == Bug::kInitTwice) mbarrier_init(full[0], 1);
    if (bug != Bug::kNoInitFence) fence_mbarrier_init();
  }
  if (bug != Bug::kNoInitBarrier) block_sync();
  if (bug == Bug::kBarrierOverwritten && thread_index() == 1) {
    shared_store(full[0].as<uint32_t>(), 0U);
  }
  if (thread_index() < kConsumers) {
    consume(smem, out, bug);
  } else if (lane_index() == 0) {
    produce(smem, in, bug);
  }
}

struct Buffers {
  Buffers()
      : in(static_cast<uint32_t*>(emu::allocate_global(kTiles * kStageBytes, "in"))),
        out(static_cast<uint32_t*>(emu::allocate_global(kStageBytes, "out"))) {
    for (int i = 0; i < kTiles * kConsumers; ++i) in[i] = static_cast<uint32_t>(i * i);
  }
  ~Buffers() {
    emu::free_global(in);
    emu::free_global(out);
  }
  uint32_t* in;
  uint32_t* out;
};

const emu::LaunchShape kShape{.blocks = 1, .threads = kThreads, .shared_bytes = sizeof(Layout)};

Q1M_TEST(pipeline_is_clean) {
  Buffers buffers;
  EXPECT_CLEAN(kShape, [&] { pipeline(buffers.in, buffers.out, Bug::kNone); });
  for (int i = 0; i < kConsumers; ++i) {
    uint32_t sum = 0;
    for (int tile = 0; tile < kTiles; ++tile) sum += buffers.in[tile * kConsumers + i];
    EXPECT_EQ(buffers.out[i], sum);
  }
}

void caught(const std::string& kind, Bug bug) {
  Buffers buffers;
  EXPECT_CAUGHT(kind, kShape, [&] { pipeline(buffers.in, buffers.out, bug); });
}

Q1M_TEST(missing_init_fence) { caught("proxy-fence", Bug::kNoInitFence); }
// A stage is read before its copy: into memory that nothing wrote, or that an older copy may write.
Q1M_TEST(wrong_parity_of_full) {
  caught("uninitialised|race-read-after-write", Bug::kWrongFullParity);
}
Q1M_TEST(wrong_parity_of_empty) { caught("deadlock", Bug::kWrongEmptyParity); }
Q1M_TEST(too_many_arrivals) { caught("race-write-after-read", Bug::kTooManyArrivals); }
Q1M_TEST(too_few_arrivals) { caught("deadlock", Bug::kTooFewArrivals); }
Q1M_TEST(expect_too_small) { caught("deadlock", Bug::kExpectTooSmall); }
Q1M_TEST(expect_too_big) { caught("deadlock", Bug::kExpectTooBig); }
Q1M_TEST(load_forgotten) { caught("deadlock", Bug::kNoLoad); }
Q1M_TEST(stage_overwritten_while_in_use) {
  caught("race-write-after-write|race-write-after-read|mbarrier-overarrive", Bug::kNoEmptyWait);
}
Q1M_TEST(missing_wait_for_data) { caught("uninitialised|race-read-after-write", Bug::kNoFullWait); }
Q1M_TEST(try_wait_may_fail) { caught("uninitialised|race-read-after-write", Bug::kTryWaitOnly); }
Q1M_TEST(copies_never_waited_for) { caught("exit-in-flight|deadlock", Bug::kNeverWaited); }
Q1M_TEST(released_before_read) { caught("race-write-after-read", Bug::kReleaseBeforeRead); }
Q1M_TEST(shared_out_of_bounds) { caught("shared-bounds", Bug::kSharedOutOfBounds); }
Q1M_TEST(global_out_of_bounds) { caught("global-bounds", Bug::kGlobalOutOfBounds); }
Q1M_TEST(barrier_overwritten) { caught("mbarrier-overlap", Bug::kBarrierOverwritten); }
Q1M_TEST(barrier_initialised_twice) { caught("mbarrier-invalid", Bug::kInitTwice); }

/// Thread 0 initialises a barrier of `count` and does something with it.
template <typename Body>
void caught_alone(const std::string& kinds, int count, const Body& body) {
  Buffers buffers;
  EXPECT_CAUGHT(kinds, kShape, [&] {
    if (thread_index() != 0) return;
    const auto smem = shared_memory<Layout>();
    const auto bar = Q1M_SHARED_MEMBER(smem, full)[0];
    mbarrier_init(bar, count);
    fence_mbarrier_init();
    body(bar, Q1M_SHARED_MEMBER(smem, stage)[0].as<void>(), buffers.in);
  });
}

Q1M_TEST(more_arrivals_than_the_count) {
  caught_alone("mbarrier-overarrive", 1, [](auto bar, auto, auto) {
    mbarrier_arrive_expect_tx(bar, 16);  // keeps the phase open
    mbarrier_arrive(bar);
  });
}
Q1M_TEST(bytes_in_another_phase) {
  // Landed at once, the first copy ends the phase before the second is issued, which is then too
  // much.
  caught_alone("mbarrier-phase|mbarrier-bytes", 1, [](auto bar, auto to, auto in) {
    mbarrier_arrive_expect_tx(bar, 16);
    bulk_load(to, in, 16, bar);
    bulk_load(Shared<void>{to.address + 16}, in, 16, bar);
    mbarrier_wait(bar, 0);
  });
}
Q1M_TEST(bytes_missing_at_exit) {
  caught_alone("mbarrier-bytes", 2,
               [](auto bar, auto, auto) { mbarrier_arrive_expect_tx(bar, 16); });
}
Q1M_TEST(load_not_waited_for_at_exit) {
  caught_alone("exit-in-flight", 1, [](auto bar, auto to, auto in) {
    mbarrier_arrive_expect_tx(bar, 16);
    bulk_load(to, in, 16, bar);
  });
}
Q1M_TEST(bad_parity) {
  caught_alone("mbarrier-invalid", 1, [](auto bar, auto, auto) { mbarrier_wait(bar, 2); });
}
Q1M_TEST(map_that_nobody_made) {
  caught_alone("tensor-map", 1,
               [](auto bar, auto to, auto) { tma_load(to, TensorMap{}, bar, {{0, 0, 0, 0, 0}}); });
}
Q1M_TEST(bulk_load_of_odd_bytes) {
  caught_alone("alignment", 1, [](auto bar, auto to, auto in) { bulk_load(to, in, 24, bar); });
}

Q1M_TEST(deadlock_report_names_everything) {
  Buffers buffers;
  const emu::Report report =
      emu::launch(kShape, [&] { pipeline(buffers.in, buffers.out, Bug::kExpectTooBig); });
  const std::string text = report.text();
  for (const char* part :
       {"emulator_pipeline_test.cpp:", "threads 0-127 in mbarrier_try_wait", "parity 0",
        "thread 128 in mbarrier_wait", "0 of 1 arrivals missing, 16 bytes missing"}) {
    EXPECT(text.find(part) != std::string::npos);
  }
}

Q1M_TEST(seeds_repeat) {
  Buffers buffers;
  const auto switches = [&] {
    return emu::launch(kShape, [&] { pipeline(buffers.in, buffers.out, Bug::kNone); }, {.seed = 7})
        .context_switches;
  };
  EXPECT_EQ(switches(), switches());
}

Q1M_TEST(refused_launches) {
  EXPECT_ERROR("launch: threads: expected a multiple of 32 up to 1,024, got 33",
               emu::launch({.threads = 33}, [] {}));
  EXPECT_ERROR("launch: blocks: expected a multiple of the cluster size from 1 to 2^31 - 1, got 3",
               emu::launch({.blocks = 3, .cluster_size = 2}, [] {}));
  EXPECT_ERROR("launch: shared_bytes: expected at most 232448, got 232449",
               emu::launch({.shared_bytes = 232449}, [] {}));
}

}  // namespace
}  // namespace qwen1m::arch
