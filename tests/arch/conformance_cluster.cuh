#pragma once
/// Clusters, and blocks that meet in global memory.

#include "conformance_case.h"

namespace qwen1m::conformance {

using namespace arch;  // NOLINT: the kernels below read as kernels do

/// Multicast loads into both blocks of a cluster, arrivals on the other block's barrier, the
/// barrier of the cluster.
struct ClusterProbe {
  static constexpr const char* kName =
      "tma_load_multicast, map_to_rank, mbarrier_arrive_remote, cluster_arrive, cluster_wait";
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 6;
  static constexpr int kCluster = 2;
  static constexpr int kTiles = 5;
  static constexpr int kHalf = 64;  // fp32 elements of one block's share of a tile
  struct Layout {
    alignas(128) float tile[2 * kHalf];
    Mbarrier full;
    Mbarrier empty;
  };

  static Q1M_DEVICE void run(const Params& p) {
    const auto shared = shared_memory<Layout>();
    const auto tile = Q1M_SHARED_MEMBER(shared, tile);
    const auto full = Q1M_SHARED_MEMBER(shared, full);
    const auto empty = Q1M_SHARED_MEMBER(shared, empty);
    const int t = thread_index();
    const auto rank = static_cast<int>(cluster_rank());
    const int first_row = static_cast<int>(block_index() / 2) * kTiles;
    if (t == 0) {
      mbarrier_init(full, 1);
      mbarrier_init(empty, 8);  // the warps of both blocks
      fence_mbarrier_init();
    }
    cluster_arrive();
    cluster_wait();
    float sum = 0;
    for (int i = 0; i < kTiles; ++i) {
      const auto turn = static_cast<uint32_t>(i & 1);
      if (t == 0) {
        mbarrier_wait(empty, turn ^ 1);
        mbarrier_arrive_expect_tx(full, 2 * kHalf * 4);
        tma_load_multicast(tile[rank * kHalf].as<void>(), p.map, full,
                           {{rank * kHalf, first_row + i, 0, 0, 0}}, 3);
      }
      mbarrier_wait(full, turn);
      sum = sum * 2 + shared_load(tile[t]);
      warp_sync();
      if (lane_index() < 2) {
        mbarrier_arrive_remote(map_to_rank(empty, static_cast<uint32_t>(lane_index())));
      }
    }
    global_store(reinterpret_cast<float*>(p.out) + block_index() * kThreads + t, sum);
    cluster_arrive();
    cluster_wait();
  }

  static std::vector<Case> cases() {
    constexpr size_t kRows = kBlocks / 2 * kTiles;
    Case test;
    for (size_t i = 0; i < kRows * 2 * kHalf; ++i) {
      test.in.push_back(float_bits(static_cast<float>(i * 37 % 101)));
    }
    test.has_map = true;
    test.map.element_bytes = 4;
    test.map.sizes[0] = 2 * kHalf;
    test.map.sizes[1] = kRows;
    test.map.stride_bytes[0] = 2 * kHalf * 4;
    test.map.box[0] = kHalf;
    for (size_t block = 0; block < kBlocks; ++block) {
      for (size_t t = 0; t < kThreads; ++t) {
        float sum = 0;
        for (size_t i = 0; i < kTiles; ++i) {
          sum =
              sum * 2 + static_cast<float>((((block / 2 * kTiles + i) * 2 * kHalf) + t) * 37 % 101);
        }
        test.expected.push_back(float_bits(sum));
      }
    }
    return {test};
  }
};

/// Reads of other blocks' shared memory between two barriers of the cluster.
struct RemoteLoadProbe {
  static constexpr const char* kName = "shared_load_remote";
  static constexpr int kThreads = 64;
  static constexpr int kBlocks = 8;
  static constexpr int kCluster = 4;
  struct Layout {
    uint64_t wide[kThreads];
    uint32_t narrow[kThreads];
  };

  static Q1M_DEVICE void run(const Params& p) {
    const auto shared = shared_memory<Layout>();
    const int t = thread_index();
    const auto block = static_cast<uint32_t>(block_index());
    shared_store(Q1M_SHARED_MEMBER(shared, wide)[t],
                 uint64_t{block} << 40 | static_cast<uint64_t>(t));
    shared_store(Q1M_SHARED_MEMBER(shared, narrow)[t], 1000 * block + static_cast<uint32_t>(t));
    cluster_arrive();
    cluster_wait();
    uint64_t sum = 0;
    for (uint32_t rank = 0; rank < kCluster; ++rank) {
      const auto wide = map_to_rank(Q1M_SHARED_MEMBER(shared, wide), rank);
      const auto narrow = map_to_rank(Q1M_SHARED_MEMBER(shared, narrow), rank);
      sum = 3 * sum + shared_load_remote(wide[t ^ 1]) + shared_load_remote(narrow[t ^ 5]);
    }
    cluster_arrive();
    cluster_wait();
    uint32_t* out = p.out + (block_index() * kThreads + t) * 2;
    global_store(out, static_cast<uint32_t>(sum));
    global_store(out + 1, static_cast<uint32_t>(sum >> 32));
  }

  static std::vector<Case> cases() {
    Case test;
    test.in = {0};
    for (uint32_t block = 0; block < kBlocks; ++block) {
      for (uint32_t t = 0; t < kThreads; ++t) {
        uint64_t sum = 0;
        for (uint32_t rank = 0; rank < kCluster; ++rank) {
          const uint32_t other = block / kCluster * kCluster + rank;
          sum = 3 * sum + (uint64_t{other} << 40 | (t ^ 1)) + 1000 * other + (t ^ 5);
        }
        test.expected.push_back(static_cast<uint32_t>(sum));
        test.expected.push_back(static_cast<uint32_t>(sum >> 32));
      }
    }
    return {test};
  }
};

/// The block that finishes last sums up what all wrote; a sum of fp32 by reductions.
struct LastBlockProbe {
  static constexpr const char* kName = "atomic_add, fence_device, global_load_coherent, reduce_add";
  static constexpr int kThreads = 64;
  static constexpr int kBlocks = 24;
  static constexpr int kCluster = 1;
  struct Layout {
    uint32_t before;
  };

  static Q1M_DEVICE void run(const Params& p) {
    const auto before = Q1M_SHARED_MEMBER(shared_memory<Layout>(), before);
    const int t = thread_index();
    uint32_t* counter = p.out;
    uint32_t* parts = p.out + 2 + kThreads;
    global_store(parts + block_index() * kThreads + t,
                 static_cast<uint32_t>(block_index() * 100 + t));
    reduce_add(reinterpret_cast<float*>(p.out) + 1, static_cast<float>(t));
    block_sync();
    if (t == 0) {
      fence_device();
      shared_store(before, atomic_add(counter, 1));
    }
    block_sync();
    if (shared_load(before) != kBlocks - 1) return;
    uint32_t sum = 0;
    for (int i = 0; i < kBlocks; ++i) {
      sum += global_load_coherent(parts + i * kThreads + (t ^ 1));
    }
    global_store(p.out + 2 + t, sum);
  }

  static std::vector<Case> cases() {
    Case test;
    test.in = {0};
    test.out_start.assign(2 + kThreads + kBlocks * kThreads, 0);
    test.expected = {kBlocks, float_bits(kBlocks * kThreads * (kThreads - 1) / 2)};
    for (uint32_t t = 0; t < kThreads; ++t) {
      test.expected.push_back(100 * kBlocks * (kBlocks - 1) / 2 + kBlocks * (t ^ 1));
    }
    for (uint32_t block = 0; block < kBlocks; ++block) {
      for (uint32_t t = 0; t < kThreads; ++t) test.expected.push_back(block * 100 + t);
    }
    return {test};
  }
};

/// A block waits for a flag of another one.
struct FlagProbe {
  static constexpr const char* kName = "global_store_release, global_load_acquire";
  static constexpr int kThreads = 64;
  static constexpr int kBlocks = 2;
  static constexpr int kCluster = 1;
  struct Layout {
    uint32_t word;
  };

  static Q1M_DEVICE void run(const Params& p) {
    const int t = thread_index();
    uint32_t* flag = p.out;
    uint32_t* data = p.out + 1;
    if (block_index() == 0) {
      global_store(data + t, static_cast<uint32_t>(t * t));
      block_sync();
      if (t == 0) global_store_release(flag, 1);
    } else {
      if (t == 0) {
        while (global_load_acquire(flag) == 0) {
        }
      }
      block_sync();
      global_store(data + kThreads + t, global_load_coherent(data + (t ^ 3)) + 1);
    }
  }

  static std::vector<Case> cases() {
    Case test;
    test.in = {0};
    test.out_start.assign(1 + 2 * kThreads, 0);
    test.expected = {1};
    for (uint32_t t = 0; t < kThreads; ++t) test.expected.push_back(t * t);
    for (uint32_t t = 0; t < kThreads; ++t) test.expected.push_back((t ^ 3) * (t ^ 3) + 1);
    return {test};
  }
};

}  // namespace qwen1m::conformance
