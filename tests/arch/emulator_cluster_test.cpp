// Clusters of two blocks: each block loads one half of a stage for both.

#include "emulator_test.h"

namespace qwen1m::arch {
namespace {

constexpr int kTiles = 4;
constexpr int kHalf = 64;  // fp32 elements of one block's share

struct Layout {
  alignas(128) float stage[2][kHalf];
  Mbarrier full;
  Mbarrier empty;  // the warps of both blocks
};

enum class Bug {
  kNone,
  kNoClusterBarrier,
  kNoInitFence,
  kReleaseToOwnBlockOnly,
  kNoEmptyWait,
  kExitsEarly,
  kWaitWithoutArrive,
  kMask,
  kRemoteHandle,
  kHalfExpected,
};

void kernel(const TensorMap& map, float* out, Bug bug) {
  const auto smem = shared_memory<Layout>();
  const auto full = Q1M_SHARED_MEMBER(smem, full);
  const auto empty = Q1M_SHARED_MEMBER(smem, empty);
  const auto stage = Q1M_SHARED_MEMBER(smem, stage);
  const uint32_t rank = cluster_rank();
  const int t = thread_index();
  const int cluster = static_cast<int>(block_index() / 2);
  if (t == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, bug == Bug::kReleaseToOwnBlockOnly ? 2 : 4);
    if (bug != Bug::kNoInitFence) fence_mbarrier_init();
  }
  if (bug == Bug::kWaitWithoutArrive) cluster_wait();
  if (bug == Bug::kNoClusterBarrier) {
    block_sync();
  } else {
    cluster_arrive();
    cluster_wait();
  }
  float sum = 0;
  for (int tile = 0; tile < kTiles; ++tile) {
    const auto turn = static_cast<uint32_t>(tile & 1);
    if (t == 64) {
      if (bug != Bug::kNoEmptyWait) mbarrier_wait(empty, turn ^ 1);
      mbarrier_arrive_expect_tx(full, (bug == Bug::kHalfExpected ? 1 : 2) * kHalf * 4);
      const auto mask = static_cast<uint16_t>(bug == Bug::kMask ? 4 : 3);
      tma_load_multicast(Shared<void>{stage.address + rank * kHalf * 4}, map, full,
                         {{static_cast<int>(rank) * kHalf, cluster * kTiles + tile, 0, 0, 0}},
                         mask);
    }
    if (t < 64) {
      mbarrier_wait(full, turn);
      sum += shared_load(stage[0][t]) + shared_load(stage[1][t]);
      warp_sync();
      if (t % 32 < 2) {
        const auto to = static_cast<uint32_t>(t % 32);
        if (bug != Bug::kReleaseToOwnBlockOnly) {
          mbarrier_arrive_remote(map_to_rank(empty, to));
        } else if (to == 0) {
          mbarrier_arrive(empty);
        }
      }
    }
  }
  if (bug == Bug::kRemoteHandle) shared_load(map_to_rank(stage[0][0], rank ^ 1));
  if (t < 64) global_store(out + block_index() * 64 + t, sum);
  // No block leaves while the other may still arrive on its barriers.
  if (bug != Bug::kExitsEarly) {
    cluster_arrive();
    cluster_wait();
  }
}

struct Buffers {
  static constexpr int kClusters = 4;
  static constexpr int kRow = 2 * kHalf;
  Buffers()
      : in(static_cast<float*>(emu::allocate_global(kClusters * kTiles * kRow * 4, "in"))),
        out(static_cast<float*>(emu::allocate_global(kClusters * 2 * 64 * 4, "out"))) {
    for (int i = 0; i < kClusters * kTiles * kRow; ++i) in[i] = static_cast<float>(i % 97);
    TensorMapSpec spec;
    spec.base = in;
    spec.element_bytes = 4;
    spec.sizes[0] = kRow;
    spec.sizes[1] = kClusters * kTiles;
    spec.stride_bytes[0] = kRow * 4;
    spec.box[0] = kHalf;
    map = emu::make_tensor_map(spec);
  }
  ~Buffers() {
    emu::free_global(in);
    emu::free_global(out);
  }
  float* in;
  float* out;
  TensorMap map;
};

const emu::LaunchShape kShape{.blocks = 2 * Buffers::kClusters,
                              .threads = 96,
                              .cluster_size = 2,
                              .shared_bytes = sizeof(Layout)};

Q1M_TEST(multicast_is_clean) {
  Buffers buffers;
  EXPECT_CLEAN(kShape, [&] { kernel(buffers.map, buffers.out, Bug::kNone); });
  for (int block = 0; block < 2 * Buffers::kClusters; ++block) {
    for (int t = 0; t < 64; ++t) {
      float sum = 0;
      for (int tile = 0; tile < kTiles; ++tile) {
        const float* row = buffers.in + (block / 2 * kTiles + tile) * Buffers::kRow;
        sum += row[t] + row[kHalf + t];
      }
      EXPECT_EQ(buffers.out[block * 64 + t], sum);
    }
  }
}

void caught(const std::string& kinds, Bug bug) {
  Buffers buffers;
  EXPECT_CAUGHT(kinds, kShape, [&] { kernel(buffers.map, buffers.out, bug); });
}

Q1M_TEST(peer_barrier_used_before_cluster_barrier) {
  caught("mbarrier-invalid|mbarrier-init-race", Bug::kNoClusterBarrier);
}
Q1M_TEST(init_not_fenced_for_the_cluster) { caught("proxy-fence", Bug::kNoInitFence); }
Q1M_TEST(stage_released_by_one_block_only) {
  caught("race-write-after-read|race-write-after-write|mbarrier-phase",
         Bug::kReleaseToOwnBlockOnly);
}
Q1M_TEST(stage_not_waited_for) {
  caught("race-write-after-read|race-write-after-write|mbarrier-overarrive", Bug::kNoEmptyWait);
}
Q1M_TEST(block_exits_while_its_peer_uses_it) { caught("cluster-exit", Bug::kExitsEarly); }
Q1M_TEST(wait_without_arrive) { caught("cluster-barrier", Bug::kWaitWithoutArrive); }
Q1M_TEST(mask_beyond_the_cluster) { caught("multicast", Bug::kMask); }
Q1M_TEST(remote_handle_for_a_local_load) { caught("shared-window", Bug::kRemoteHandle); }
Q1M_TEST(half_the_bytes_expected) {
  caught("mbarrier-phase|deadlock|mbarrier-overarrive", Bug::kHalfExpected);
}

// --- Reads of another block's shared memory ------------------------------------------------------

enum class ReadBug { kNone, kNoBarrier, kWrittenAgain, kExitsEarly };

void read_peer(float* out, ReadBug bug) {
  const auto own = Q1M_SHARED_MEMBER(shared_memory<Layout>(), stage)[0][thread_index() % kHalf];
  if (thread_index() < kHalf) shared_store(own, static_cast<float>(block_index()));
  if (bug != ReadBug::kNoBarrier) {
    cluster_arrive();
    cluster_wait();
  } else {
    block_sync();
  }
  const float peer = shared_load_remote(map_to_rank(own, cluster_rank() ^ 1));
  if (bug == ReadBug::kWrittenAgain && thread_index() < kHalf) shared_store(own, 0.0F);
  if (bug != ReadBug::kExitsEarly) {
    cluster_arrive();
    cluster_wait();
  }
  if (thread_index() == 0) global_store(out + block_index(), peer);
}

Q1M_TEST(reading_a_peer_is_clean) {
  Buffers buffers;
  EXPECT_CLEAN(kShape, [&] { read_peer(buffers.out, ReadBug::kNone); });
  for (int block = 0; block < 2 * Buffers::kClusters; ++block) {
    EXPECT_EQ(buffers.out[block], static_cast<float>(block ^ 1));
  }
}

void read_caught(const std::string& kinds, ReadBug bug) {
  Buffers buffers;
  EXPECT_CAUGHT(kinds, kShape, [&] { read_peer(buffers.out, bug); });
}

Q1M_TEST(peer_read_before_it_has_written) {
  read_caught("race-read-after-write|race-write-after-read|uninitialised", ReadBug::kNoBarrier);
}
Q1M_TEST(written_again_while_the_peer_reads) {
  read_caught("race-write-after-read|race-read-after-write", ReadBug::kWrittenAgain);
}
Q1M_TEST(block_exits_while_its_peer_reads_it) { read_caught("cluster-exit", ReadBug::kExitsEarly); }

}  // namespace
}  // namespace qwen1m::arch
