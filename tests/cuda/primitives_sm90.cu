// The primitives that came with sm_90.
#include "primitives.cuh"

Q1M_PROBE(cluster_rank) { arch::global_store(p.words, arch::cluster_rank()); }
Q1M_PROBE(cluster_size) { arch::global_store(p.words, arch::cluster_size()); }
Q1M_PROBE(cluster_arrive) { arch::cluster_arrive(); }
Q1M_PROBE(cluster_wait) { arch::cluster_wait(); }
Q1M_PROBE(elect_one) {
  if (arch::elect_one()) arch::global_store(p.words, p.parity);
}
Q1M_PROBE(mbarrier_init) { arch::mbarrier_init(bar, p.number); }
Q1M_PROBE(fence_mbarrier_init) { arch::fence_mbarrier_init(); }
Q1M_PROBE(mbarrier_arrive) { arch::mbarrier_arrive(bar); }
Q1M_PROBE(mbarrier_arrive_expect_tx) { arch::mbarrier_arrive_expect_tx(bar, p.parity); }
Q1M_PROBE(mbarrier_arrive_remote) { arch::mbarrier_arrive_remote(arch::map_to_rank(bar, 1)); }
Q1M_PROBE(shared_load_remote) {
  arch::global_store(
      p.words, arch::shared_load_remote(arch::map_to_rank(Q1M_SHARED_MEMBER(shared, words)[3], 1)));
}
Q1M_PROBE(mbarrier_wait) { arch::mbarrier_wait(bar, p.parity); }
Q1M_PROBE(fence_proxy_async) { arch::fence_proxy_async(); }
Q1M_PROBE(tma_load) { arch::tma_load(row.as<void>(), p.map, bar, {{0, p.number, 0, 1, 2}}); }
Q1M_PROBE(tma_load_multicast) {
  arch::tma_load_multicast(row.as<void>(), p.map, bar, {{0, p.number, 0, 1, 2}}, 3);
}
Q1M_PROBE(tma_store) {
  arch::tma_store(p.map, row.as<void>(), {{0, p.number, 0, 1, 2}});
  arch::bulk_commit();
  arch::bulk_wait_read<0>();
}
Q1M_PROBE(bulk_load) { arch::bulk_load(row.as<void>(), p.floats, 4096, bar); }
Q1M_PROBE(bulk_store) {
  arch::bulk_store(p.floats, row.as<void>(), 4096);
  arch::bulk_commit();
  arch::bulk_wait<0>();
}
Q1M_PROBE(stmatrix_x4) { arch::stmatrix_x4(row, p.parity, p.parity + 1, p.parity + 2, 7); }
Q1M_PROBE(registers_decrease) { arch::registers_decrease<24>(); }
Q1M_PROBE(registers_increase) { arch::registers_increase<240>(); }
Q1M_PROBE(wait_for_prior_grid) { arch::wait_for_prior_grid(); }
Q1M_PROBE(launch_dependents) { arch::launch_dependents(); }

// d = a b + a b of one tile; the accumulator goes out so that nothing is left away.
template <int kN, bool kRegisters, arch::Major kMajorA, arch::Major kMajorB>
static Q1M_DEVICE void wgmma(const Arguments& p, Shared<Vec16> row) {
  const uint64_t a = arch::matrix_descriptor(row.address, 0, 1024, arch::Swizzle::k128);
  const uint64_t b = arch::matrix_descriptor(row.address + 8192, 8192, 1024, arch::Swizzle::k128);
  float d[kN / 2];
  uint32_t in[4] = {p.parity, p.parity + 1, p.parity + 2, p.parity + 3};
  arch::wgmma_fence(d, in);
  Q1M_UNROLL
  for (int k = 0; k < 2; ++k) {
    if constexpr (kRegisters) {
      arch::wgmma_rs<kN, kMajorB>(d, in, b + 2 * k, k > 0);
    } else {
      arch::wgmma_ss<kN, kMajorA, kMajorB>(d, a + 2 * k, b + 2 * k, k > 0);
    }
  }
  arch::wgmma_commit();
  arch::wgmma_wait<0>(d, in);
  Q1M_UNROLL
  for (int i = 0; i < kN / 2; ++i)
    arch::global_store(p.floats + 128 * i + arch::thread_index(), d[i]);
}

using arch::Major;
Q1M_PROBE(wgmma_ss_64_k_k) { wgmma<64, false, Major::kK, Major::kK>(p, row); }
Q1M_PROBE(wgmma_ss_64_mn_mn) { wgmma<64, false, Major::kMN, Major::kMN>(p, row); }
Q1M_PROBE(wgmma_ss_128_k_k) { wgmma<128, false, Major::kK, Major::kK>(p, row); }
Q1M_PROBE(wgmma_ss_128_k_mn) { wgmma<128, false, Major::kK, Major::kMN>(p, row); }
Q1M_PROBE(wgmma_rs_64_k) { wgmma<64, true, Major::kK, Major::kK>(p, row); }
Q1M_PROBE(wgmma_rs_64_mn) { wgmma<64, true, Major::kK, Major::kMN>(p, row); }
Q1M_PROBE(wgmma_rs_128_k) { wgmma<128, true, Major::kK, Major::kK>(p, row); }
Q1M_PROBE(wgmma_rs_128_mn) { wgmma<128, true, Major::kK, Major::kMN>(p, row); }
