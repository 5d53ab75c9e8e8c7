#pragma once
/// Position in a ring of kStages buffers that a producer fills and consumers empty, each buffer
/// guarded by a `full` and a `free` mbarrier. Producer and consumers own one Ring each and advance
/// it once per buffer.

#include "arch/arch.h"

namespace qwen1m::arch {

template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t round = 0;  // parity of how often the ring has been gone round

  Q1M_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      round ^= 1;
    }
  }
  /// Consumer: until the buffer has been filled in this round.
  Q1M_DEVICE void wait_full(Shared<Mbarrier[kStages]> full Q1M_SITE) const;
  /// Producer: until the buffer's content of the round before has been released; passes at once in
  /// the first round, because a fresh barrier counts as one that has ended a phase of parity 1.
  Q1M_DEVICE void wait_free(Shared<Mbarrier[kStages]> free Q1M_SITE) const;
};

#ifdef __CUDACC__
#define Q1M_PASS_SITE
#define Q1M_SITE_PARAMETER
#else
#define Q1M_PASS_SITE , site
#define Q1M_SITE_PARAMETER , Site site
#endif

template <int kStages>
Q1M_DEVICE void Ring<kStages>::wait_full(Shared<Mbarrier[kStages]> full Q1M_SITE_PARAMETER) const {
  mbarrier_wait(full[stage], round Q1M_PASS_SITE);
}
template <int kStages>
Q1M_DEVICE void Ring<kStages>::wait_free(Shared<Mbarrier[kStages]> free Q1M_SITE_PARAMETER) const {
  mbarrier_wait(free[stage], round ^ 1 Q1M_PASS_SITE);
}

}  // namespace qwen1m::arch
