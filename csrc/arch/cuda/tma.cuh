#pragma once
/// Bulk asynchronous copies, with and without a tensor map.

#include "arch/arch.h"
#include "arch/cuda/memory.cuh"

namespace qwen1m::arch {

Q1M_DEVICE void tma_load(Shared<void> to, const TensorMap& map, Shared<Mbarrier> bar,
                         Coordinates5 at) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(to.address),
      "l"(&map), "r"(bar.address), "r"(at.c[0]), "r"(at.c[1]), "r"(at.c[2]), "r"(at.c[3]),
      "r"(at.c[4])
      : "memory");
}

Q1M_DEVICE void tma_load_multicast(Shared<void> to, const TensorMap& map, Shared<Mbarrier> bar,
                                   Coordinates5 at, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(to.address),
      "l"(&map), "r"(bar.address), "r"(at.c[0]), "r"(at.c[1]), "r"(at.c[2]), "r"(at.c[3]),
      "r"(at.c[4]), "h"(mask)
      : "memory");
}

Q1M_DEVICE void tma_store(const TensorMap& map, Shared<void> from, Coordinates5 at) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group "
      "[%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map),
      "r"(from.address), "r"(at.c[0]), "r"(at.c[1]), "r"(at.c[2]), "r"(at.c[3]), "r"(at.c[4])
      : "memory");
}

Q1M_DEVICE void bulk_load(Shared<void> to, const void* from, uint32_t bytes, Shared<Mbarrier> bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to.address),
      "l"(detail::global_address(from)), "r"(bytes), "r"(bar.address)
      : "memory");
}

Q1M_DEVICE void bulk_store(void* to, Shared<void> from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                   detail::global_address(to)),
               "r"(from.address), "r"(bytes)
               : "memory");
}

Q1M_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

template <int kPending>
Q1M_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
Q1M_DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace qwen1m::arch
