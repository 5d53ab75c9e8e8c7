// The primitives that exist on every architecture we compile for, sm_80 first.
#include "primitives.cuh"

Q1M_PROBE(shared_load_16) {
  const auto v = arch::shared_load(row);
  arch::global_store(p.words, v.word[0] + v.word[1] + v.word[2] + v.word[3]);
}
Q1M_PROBE(shared_load_8) {
  const auto v = arch::shared_load(row.as<uint64_t>());
  arch::global_store(p.words, static_cast<uint32_t>(v) + static_cast<uint32_t>(v >> 32));
}
Q1M_PROBE(shared_load_4) { arch::global_store(p.floats, arch::shared_load(row.as<float>())); }
Q1M_PROBE(shared_load_2) {
  arch::global_store(p.words, uint32_t{arch::shared_load(row.as<uint16_t>())});
}
Q1M_PROBE(shared_store_16) {
  const uint32_t v = p.parity;
  arch::shared_store(row, Vec16{{v, v + 1, v + 2, v + 3}});
}
Q1M_PROBE(shared_store_8) {
  arch::shared_store(row.as<uint64_t>(), uint64_t{p.parity} << 32 | p.parity);
}
Q1M_PROBE(shared_store_4) { arch::shared_store(row.as<float>(), static_cast<float>(p.number)); }
Q1M_PROBE(shared_store_2) {
  arch::shared_store(row.as<uint16_t>(), static_cast<uint16_t>(p.parity));
}
Q1M_PROBE(global_load_16) {
  arch::global_store(reinterpret_cast<Vec16*>(p.floats),
                     arch::global_load(reinterpret_cast<const Vec16*>(p.bytes)));
}
Q1M_PROBE(global_load_8) {
  arch::global_store(reinterpret_cast<uint64_t*>(p.floats),
                     arch::global_load(reinterpret_cast<const uint64_t*>(p.bytes)));
}
Q1M_PROBE(global_load_4) {
  arch::global_store(p.floats, arch::global_load(reinterpret_cast<const float*>(p.bytes)));
}
Q1M_PROBE(global_load_2) {
  arch::global_store(reinterpret_cast<uint16_t*>(p.floats),
                     arch::global_load(reinterpret_cast<const uint16_t*>(p.bytes)));
}
Q1M_PROBE(global_load_1) {
  arch::global_store(reinterpret_cast<uint8_t*>(p.floats), arch::global_load(p.bytes));
}
Q1M_PROBE(global_load_coherent) {
  arch::global_store(p.floats, arch::global_load_coherent(reinterpret_cast<const float*>(p.bytes)));
}
Q1M_PROBE(global_load_acquire) {
  arch::global_store(p.floats, static_cast<float>(arch::global_load_acquire(p.words)));
}
Q1M_PROBE(global_store_release) { arch::global_store_release(p.words, p.parity); }
Q1M_PROBE(atomic_add) {
  arch::global_store(p.floats, static_cast<float>(arch::atomic_add(p.words, p.parity)));
}
Q1M_PROBE(reduce_add) { arch::reduce_add(p.floats, static_cast<float>(p.number)); }
Q1M_PROBE(fence_device) { arch::fence_device(); }
Q1M_PROBE(warp_index) { arch::global_store(p.words, static_cast<uint32_t>(arch::warp_index())); }
Q1M_PROBE(shuffle_xor) {
  arch::global_store(p.floats, arch::shuffle_xor(static_cast<float>(arch::lane_index()), 4));
}
Q1M_PROBE(shuffle) {
  arch::global_store(p.words, arch::shuffle(static_cast<uint32_t>(arch::lane_index()), p.number));
}
Q1M_PROBE(warp_sync) { arch::warp_sync(); }
Q1M_PROBE(block_sync) { arch::block_sync(); }
Q1M_PROBE(named_barrier_sync) { arch::named_barrier_sync<3>(128); }
Q1M_PROBE(named_barrier_arrive) { arch::named_barrier_arrive<4>(p.number); }
Q1M_PROBE(cp_async) {
  const auto* from = reinterpret_cast<const Vec16*>(p.bytes) + arch::thread_index();
  arch::cp_async_16(row.as<void>(), from, arch::thread_index() < p.number);
  arch::cp_async_commit();
  arch::cp_async_wait<1>();
}
Q1M_PROBE(ldmatrix_x4) {
  uint32_t r[4];
  arch::ldmatrix_x4(r, row);
  arch::global_store(p.words, r[0] + r[1] + r[2] + r[3]);
}
Q1M_PROBE(ldmatrix_x4_transposed) {
  uint32_t r[4];
  arch::ldmatrix_x4_transposed(r, row);
  arch::global_store(p.words, r[0] + r[1] + r[2] + r[3]);
}
Q1M_PROBE(mma_m16n8k16) {
  float d[4] = {};
  const uint32_t a[4] = {p.parity, p.parity + 1, p.parity + 2, p.parity + 3};
  const uint32_t b[2] = {p.parity + 4, p.parity + 5};
  arch::mma_m16n8k16(d, a, b);
  arch::global_store(p.floats, d[0] + d[1] + d[2] + d[3]);
}
Q1M_PROBE(mma_m16n8k16_f16) {
  float d[4] = {};
  const uint32_t a[4] = {p.parity, p.parity + 1, p.parity + 2, p.parity + 3};
  const uint32_t b[2] = {p.parity + 4, p.parity + 5};
  arch::mma_m16n8k16_f16(d, a, b);
  arch::global_store(p.floats, d[0] + d[1] + d[2] + d[3]);
}
Q1M_PROBE(e4m3_to_f16) { arch::global_store(p.words, arch::e4m3_to_f16(p.parity)); }
Q1M_PROBE(pack_e4m3) {
  arch::global_store(p.words, arch::pack_e4m3(static_cast<float>(p.number), 1.0F));
}
Q1M_PROBE(pack_f16) {
  arch::global_store(p.words, arch::pack_f16(static_cast<float>(p.number), 1.0F));
}
Q1M_PROBE(permute_bytes) {
  arch::global_store(p.words, arch::permute_bytes(p.parity, p.parity * 3, 0x6420));
}
Q1M_PROBE(exp2_approx) {
  arch::global_store(p.floats, arch::exp2_approx(static_cast<float>(p.number)));
}
Q1M_PROBE(log2_approx) {
  arch::global_store(p.floats, arch::log2_approx(static_cast<float>(p.number)));
}
Q1M_PROBE(reciprocal_approx) {
  arch::global_store(p.floats, arch::reciprocal_approx(static_cast<float>(p.number)));
}
Q1M_PROBE(multiply) {
  const auto x = static_cast<float>(p.number);
  arch::global_store(p.floats, arch::multiply(x, arch::as_float(p.parity)) + x);
}
Q1M_PROBE(pack_bf16) {
  arch::global_store(p.words, arch::pack_bf16(static_cast<float>(p.number), 1.0F));
}
Q1M_PROBE(bf16_low_high) {
  arch::global_store(p.floats, arch::bf16_low(p.parity) + arch::bf16_high(p.parity));
}
// Without clusters and dependent launches these cost nothing.
Q1M_PROBE(before_clusters) {
  arch::wait_for_prior_grid();
  arch::global_store(p.words, arch::cluster_rank() + arch::cluster_size());
  arch::launch_dependents();
}
