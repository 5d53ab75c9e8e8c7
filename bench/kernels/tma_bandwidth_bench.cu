// How fast TMA brings tiles to the multiprocessors: from the L2 cache (a 20 MB buffer that all
// blocks read) and from memory (2 GB), by each block alone and shared by clusters of two
// (multicast). The answer decides how many query rows have to share a tile of keys.
//
// GB/s counts the bytes that land in shared memory; with multicast the L2 cache is read half as
// often.
#include "arch/cuda/kernel.cuh"
#include "arch/ring.h"
#include "bench.h"

namespace qwen1m::bench {

/// One thread loads 32 KB tiles, [128 rows][128 bf16], into a ring and drops them. In a cluster
/// each block loads its share of the rows for all.
template <int kCluster>
struct TmaBandwidth {
  static constexpr int kThreads = 32;
  static constexpr int kStages = 6;
  static constexpr int kRows = 128, kShare = kRows / kCluster;
  static constexpr uint32_t kTileBytes = kRows * 256;

  struct Params {
    arch::TensorMap map;  // (64 columns, row, half), the box is kShare rows
    int num_tiles;        // in the buffer
    int loads;            // by each cluster
  };
  struct Smem {
    alignas(1024) uint16_t tile[kStages][kRows * 128];
    arch::Mbarrier full[kStages], free[kStages];
  };

  static Q1M_DEVICE void load(const Params& p, arch::Shared<Smem> smem, int stage, int index) {
    const auto full = Q1M_SHARED_MEMBER(smem, full)[stage];
    const int first =
        static_cast<int>((arch::block_index() / kCluster * 131 + index) % int64_t{p.num_tiles}) *
        kRows;
    arch::mbarrier_arrive_expect_tx(full, kTileBytes);
    const int share = kCluster == 1 ? 0 : static_cast<int>(arch::cluster_rank());
    // Each share is [2 halves][kShare rows][64 columns]; where it lies does not matter here.
    const arch::Shared<void> to = {Q1M_SHARED_MEMBER(smem, tile)[stage].address +
                                   static_cast<uint32_t>(share) * (kTileBytes / kCluster)};
    const arch::Coordinates5 at = {{0, first + share * kShare, 0, 0, 0}};
    if constexpr (kCluster == 1) {
      arch::tma_load(to, p.map, full, at);
    } else {
      arch::tma_load_multicast(to, p.map, full, at, (1 << kCluster) - 1);
    }
  }

  static Q1M_DEVICE void run(const Params& p) {
    const auto smem = arch::shared_memory<Smem>();
    const auto full = Q1M_SHARED_MEMBER(smem, full), free = Q1M_SHARED_MEMBER(smem, free);
    if (arch::thread_index() == 0) {
      for (int i = 0; i < kStages; ++i) {
        arch::mbarrier_init(full[i], 1);
        arch::mbarrier_init(free[i], kCluster);
      }
      arch::fence_mbarrier_init();
    }
    arch::cluster_arrive();
    arch::cluster_wait();
    if (arch::thread_index() == 0) {
      arch::Ring<kStages> filling, dropping;
      for (int i = 0; i < p.loads + kStages - 1; ++i) {
        if (i < p.loads) {
          filling.wait_free(free);
          load(p, smem, filling.stage, i);
          filling.advance();
        }
        if (i < kStages - 1) continue;
        dropping.wait_full(full);
        for (uint32_t rank = 0; rank < kCluster; ++rank) {  // all may write here again
          if constexpr (kCluster == 1) {
            arch::mbarrier_arrive(free[dropping.stage]);
          } else {
            arch::mbarrier_arrive_remote(arch::map_to_rank(free[dropping.stage], rank));
          }
        }
        dropping.advance();
      }
    }
    arch::cluster_arrive();  // nobody leaves while another block may still write to it
    arch::cluster_wait();
  }
};

Q1M_KERNEL_SM90(tma_bandwidth_alone, TmaBandwidth<1>, 1)
Q1M_KERNEL_SM90(tma_bandwidth_cluster2, TmaBandwidth<2>, 1)

namespace {

template <int kCluster>
void measure(void (*kernel)(typename TmaBandwidth<kCluster>::Params), const char* source,
             const Buffer<bf16>& buffer, const Options& options, Report& report) {
  using Kernel = TmaBandwidth<kCluster>;
  const auto rows = static_cast<uint64_t>(buffer.count() / 128);
  const int64_t sms = arch::device_facts().num_sms;
  const int64_t blocks = sms / kCluster * kCluster;
  typename Kernel::Params params;
  params.map = arch::make_tensor_map({.base = buffer.data(),
                                      .sizes = {64, rows, 2, 1, 1},
                                      .stride_bytes = {256, 128, 16, 16},
                                      .box = {64, Kernel::kShare, 2, 1, 1},
                                      .swizzle = arch::Swizzle::k128});
  params.num_tiles = static_cast<int>(rows / Kernel::kRows);
  params.loads = 4096;
  const Microseconds us = time_cold(
      [&](cudaStream_t stream) {
        arch::launch(kernel,
                     {.name = "tma_bandwidth",
                      .blocks = blocks,
                      .threads = Kernel::kThreads,
                      .shared_bytes = sizeof(typename Kernel::Smem),
                      .cluster = kCluster,
                      .stream = stream},
                     params);
      },
      options.runs);
  const double bytes = static_cast<double>(blocks) * params.loads * Kernel::kTileBytes;
  const double rate = bytes / us.p50 * 1e-3;
  report.add(std::string("\"op\": \"tma_load\", \"source\": \"") + source +
                 "\", \"cluster\": " + std::to_string(kCluster),
             us, "gb_per_s", rate);
  std::printf("tma_load | %s, clusters of %d | %10.1f us (%.1f to %.1f) | %7.0f GB/s\n", source,
              kCluster, us.p50, us.p10, us.p90, rate);
}

}  // namespace
}  // namespace qwen1m::bench

int main(int argc, char** argv) {
  using namespace qwen1m::bench;
  return run(argc, argv, [](const Options& options, Report& report) {
    for (const int64_t megabytes : {20, 2048}) {
      const Buffer<qwen1m::bf16> buffer((megabytes << 20) / 2);
      fill_normal(buffer, 1);
      const char* source = megabytes == 20 ? "L2 cache, 20 MB" : "memory, 2 GB";
      measure<1>(tma_bandwidth_alone, source, buffer, options, report);
      measure<2>(tma_bandwidth_cluster2, source, buffer, options, report);
    }
  });
}
