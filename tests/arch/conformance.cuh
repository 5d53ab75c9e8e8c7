#pragma once
/// All probes. A driver calls for_each_probe with a generic lambda that takes a Tag<Probe>.

#include "conformance_cluster.cuh"
#include "conformance_copy.cuh"
#include "conformance_warp.cuh"
#include "conformance_wgmma.cuh"

namespace qwen1m::conformance {

template <typename Probe>
struct Tag {
  using Type = Probe;
};

template <typename Visit>
void for_each_probe(const Visit& visit) {
  const auto visit_all = [&](auto... tags) { (visit(tags), ...); };
  visit_all(Tag<IdentityProbe>{}, Tag<WidthsProbe>{}, Tag<ShuffleProbe>{}, Tag<MatrixCopyProbe>{},
            Tag<MmaProbe<false>>{}, Tag<MmaProbe<true>>{}, Tag<F16Probe>{}, Tag<E4m3Probe>{},
            Tag<MultiplyProbe>{}, Tag<PackProbe>{}, Tag<ApproximationProbe>{},
            Tag<NamedBarrierProbe>{}, Tag<RegisterProbe>{});
  visit_all(Tag<MbarrierProbe>{}, Tag<TmaLoadProbe>{}, Tag<TmaStoreProbe>{}, Tag<BulkProbe>{},
            Tag<CpAsyncProbe>{});
  visit_all(
      Tag<WgmmaProbe<64, Major::kK, Major::kK>>{}, Tag<WgmmaProbe<64, Major::kK, Major::kMN>>{},
      Tag<WgmmaProbe<64, Major::kMN, Major::kK>>{}, Tag<WgmmaProbe<64, Major::kMN, Major::kMN>>{},
      Tag<WgmmaProbe<128, Major::kK, Major::kK>>{}, Tag<WgmmaProbe<128, Major::kK, Major::kMN>>{},
      Tag<WgmmaProbe<128, Major::kMN, Major::kK>>{}, Tag<WgmmaProbe<128, Major::kMN, Major::kMN>>{},
      Tag<WgmmaRegistersProbe<64, Major::kK>>{}, Tag<WgmmaRegistersProbe<64, Major::kMN>>{},
      Tag<WgmmaRegistersProbe<128, Major::kK>>{}, Tag<WgmmaRegistersProbe<128, Major::kMN>>{});
  visit_all(Tag<ClusterProbe>{}, Tag<RemoteLoadProbe>{}, Tag<LastBlockProbe>{}, Tag<FlagProbe>{});
}

}  // namespace qwen1m::conformance
