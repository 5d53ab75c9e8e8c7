#pragma once
/// mbarrier objects and the fences between proxies.

#include "arch/arch.h"

namespace qwen1m::arch {

Q1M_DEVICE void mbarrier_init(Shared<Mbarrier> bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar.address), "r"(count) : "memory");
}

Q1M_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

Q1M_DEVICE void mbarrier_arrive(Shared<Mbarrier> bar) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(bar.address)
               : "memory");
}

Q1M_DEVICE void mbarrier_arrive_expect_tx(Shared<Mbarrier> bar, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(bar.address),
      "r"(bytes)
      : "memory");
}

/// Release and acquire have block scope here and in mbarrier_try_wait. A remote arrival therefore
/// says "I am done with my copy of the slot" (its reads by wgmma are complete after wgmma_wait),
/// and does not publish shared or global memory that this thread wrote: that takes cluster_arrive
/// and cluster_wait. With .cluster scope sm_90 gets MEMBAR.ALL.GPU before each arrival and
/// CCTL.IVALL after each wait (nvcc 13.0), a stall per tile for nothing that a ring of tiles needs.
Q1M_DEVICE void mbarrier_arrive_remote(Shared<Mbarrier> bar) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(bar.address) : "memory");
}

Q1M_DEVICE bool mbarrier_try_wait(Shared<Mbarrier> bar, uint32_t parity) {
  uint32_t ended;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(ended)
      : "r"(bar.address), "r"(parity)
      : "memory");
  return ended != 0;
}

Q1M_DEVICE void mbarrier_wait(Shared<Mbarrier> bar, uint32_t parity) {
  while (!mbarrier_try_wait(bar, parity)) {
  }
}

template <typename T>
Q1M_DEVICE Shared<T> map_to_rank(Shared<T> at, uint32_t rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(at.address), "r"(rank));
  return {address};
}

Q1M_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace qwen1m::arch
