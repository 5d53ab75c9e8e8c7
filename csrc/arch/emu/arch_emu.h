#pragma once
/// The primitives of arch.h on the emulator: each hands its arguments to the engine. Included by
/// arch.h under the host compiler.

#include <bit>
#include <cmath>

#include "arch/arch.h"
#include "arch/emu/primitives.h"
#include "qwen1m/dtypes.h"

namespace qwen1m::arch {

// --- Shared memory ---------------------------------------------------------------------------

template <typename Layout>
Q1M_DEVICE Shared<Layout> shared_memory() {
  return {emu::shared_base()};
}

template <typename T>
Q1M_DEVICE T shared_load(Shared<T> from, Site site) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  T value;
  emu::shared_load(&value, from.address, sizeof(T), site);
  return value;
}
template <typename T>
Q1M_DEVICE T shared_load_remote(Shared<T> from, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  T value;
  emu::shared_load_remote(&value, from.address, sizeof(T), site);
  return value;
}
template <typename T>
Q1M_DEVICE void shared_store(Shared<T> to, T value, Site site) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  emu::shared_store(to.address, &value, sizeof(T), site);
}

// --- Identity --------------------------------------------------------------------------------

Q1M_DEVICE int thread_index() { return emu::thread_index(); }
Q1M_DEVICE int lane_index() { return emu::thread_index() % 32; }
Q1M_DEVICE int warp_index() { return emu::thread_index() / 32; }
Q1M_DEVICE int64_t block_index() { return emu::block_index(); }
Q1M_DEVICE int64_t num_blocks() { return emu::num_blocks(); }
Q1M_DEVICE uint32_t cluster_rank() { return emu::cluster_rank(); }
Q1M_DEVICE uint32_t cluster_size() { return emu::cluster_size(); }

// --- Global memory ---------------------------------------------------------------------------

template <typename T>
Q1M_DEVICE T global_load(const T* from, Site site) {
  static_assert(std::has_single_bit(sizeof(T)) && sizeof(T) <= 16);
  T value;
  emu::global_load(&value, from, sizeof(T), emu::GlobalRead::kReadOnly, site);
  return value;
}
template <typename T>
Q1M_DEVICE void global_store(T* to, T value, Site site) {
  static_assert(std::has_single_bit(sizeof(T)) && sizeof(T) <= 16);
  emu::global_store(to, &value, sizeof(T), site);
}
Q1M_DEVICE uint32_t global_load_acquire(const uint32_t* from, Site site) {
  return emu::global_load_acquire(from, site);
}
Q1M_DEVICE void global_store_release(uint32_t* to, uint32_t value, Site site) {
  emu::global_store_release(to, value, site);
}
template <typename T>
Q1M_DEVICE T global_load_coherent(const T* from, Site site) {
  static_assert(std::has_single_bit(sizeof(T)) && sizeof(T) <= 16);
  T value;
  emu::global_load(&value, from, sizeof(T), emu::GlobalRead::kCoherent, site);
  return value;
}
Q1M_DEVICE uint32_t atomic_add(uint32_t* at, uint32_t value, Site site) {
  return emu::atomic_add(at, value, site);
}
Q1M_DEVICE void reduce_add(float* at, float value, Site site) { emu::reduce_add(at, value, site); }
Q1M_DEVICE void fence_device(Site site) { emu::fence_device(site); }

// --- Warp ------------------------------------------------------------------------------------

Q1M_DEVICE void warp_sync(Site site) { emu::warp_sync(site); }
Q1M_DEVICE bool elect_one(Site site) { return emu::elect_one(site); }
template <typename T>
Q1M_DEVICE T shuffle_xor(T value, int lane_mask, Site site) {
  static_assert(sizeof(T) == 4);
  return std::bit_cast<T>(
      emu::shuffle(std::bit_cast<uint32_t>(value), lane_index() ^ lane_mask, "shuffle_xor", site));
}
template <typename T>
Q1M_DEVICE T shuffle(T value, int source_lane, Site site) {
  static_assert(sizeof(T) == 4);
  return std::bit_cast<T>(
      emu::shuffle(std::bit_cast<uint32_t>(value), source_lane, "shuffle", site));
}

// --- Barriers of threads ---------------------------------------------------------------------

Q1M_DEVICE void block_sync(Site site) { emu::block_sync(site); }
template <int kId>
Q1M_DEVICE void named_barrier_sync(int threads, Site site) {
  static_assert(kId >= 1 && kId <= 15);
  emu::named_barrier_sync(kId, threads, "named_barrier_sync", site);
}
template <int kId>
Q1M_DEVICE void named_barrier_arrive(int threads, Site site) {
  static_assert(kId >= 1 && kId <= 15);
  emu::named_barrier_arrive(kId, threads, site);
}
Q1M_DEVICE void cluster_arrive(Site site) { emu::cluster_arrive(site); }
Q1M_DEVICE void cluster_wait(Site site) { emu::cluster_wait(site); }

// --- mbarrier --------------------------------------------------------------------------------

Q1M_DEVICE void mbarrier_init(Shared<Mbarrier> bar, int count, Site site) {
  emu::mbarrier_init(bar.address, count, site);
}
Q1M_DEVICE void fence_mbarrier_init(Site site) { emu::fence_mbarrier_init(site); }
Q1M_DEVICE void mbarrier_arrive(Shared<Mbarrier> bar, Site site) {
  emu::mbarrier_arrive(bar.address, 0, site);
}
Q1M_DEVICE void mbarrier_arrive_expect_tx(Shared<Mbarrier> bar, uint32_t bytes, Site site) {
  emu::mbarrier_arrive(bar.address, bytes, site);
}
Q1M_DEVICE void mbarrier_arrive_remote(Shared<Mbarrier> bar, Site site) {
  emu::mbarrier_arrive_remote(bar.address, site);
}
Q1M_DEVICE bool mbarrier_try_wait(Shared<Mbarrier> bar, uint32_t parity, Site site) {
  return emu::mbarrier_try_wait(bar.address, parity, site);
}
Q1M_DEVICE void mbarrier_wait(Shared<Mbarrier> bar, uint32_t parity, Site site) {
  emu::mbarrier_wait(bar.address, parity, site);
}
template <typename T>
Q1M_DEVICE Shared<T> map_to_rank(Shared<T> at, uint32_t rank) {
  return {emu::map_to_rank(at.address, rank)};
}
Q1M_DEVICE void fence_proxy_async(Site site) { emu::fence_proxy_async(site); }

// --- Copies ----------------------------------------------------------------------------------

Q1M_DEVICE void tma_load(Shared<void> to, const TensorMap& map, Shared<Mbarrier> bar,
                         Coordinates5 at, Site site) {
  emu::tma_load(to.address, map, bar.address, at, false, 0, site);
}
Q1M_DEVICE void tma_load_multicast(Shared<void> to, const TensorMap& map, Shared<Mbarrier> bar,
                                   Coordinates5 at, uint16_t mask, Site site) {
  emu::tma_load(to.address, map, bar.address, at, true, mask, site);
}
Q1M_DEVICE void tma_store(const TensorMap& map, Shared<void> from, Coordinates5 at, Site site) {
  emu::tma_store(map, from.address, at, site);
}
Q1M_DEVICE void bulk_load(Shared<void> to, const void* from, uint32_t bytes, Shared<Mbarrier> bar,
                          Site site) {
  emu::bulk_load(to.address, from, bytes, bar.address, site);
}
Q1M_DEVICE void bulk_store(void* to, Shared<void> from, uint32_t bytes, Site site) {
  emu::bulk_store(to, from.address, bytes, site);
}
Q1M_DEVICE void bulk_commit(Site) { emu::bulk_commit(); }
template <int kPending>
Q1M_DEVICE void bulk_wait_read(Site) {
  emu::bulk_wait(kPending, true);
}
template <int kPending>
Q1M_DEVICE void bulk_wait(Site) {
  emu::bulk_wait(kPending, false);
}

Q1M_DEVICE void cp_async_16(Shared<void> to, const void* from, bool valid, Site site) {
  emu::cp_async_16(to.address, from, valid, site);
}
Q1M_DEVICE void cp_async_commit(Site) { emu::cp_async_commit(); }
template <int kPending>
Q1M_DEVICE void cp_async_wait(Site) {
  emu::cp_async_wait(kPending);
}

// --- wgmma -----------------------------------------------------------------------------------

template <int kN, Major kMajorA, Major kMajorB>
Q1M_DEVICE void wgmma_ss(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate, Site site) {
  static_assert(kN == 64 || kN == 128);
  emu::wgmma({d, kN, nullptr, a, b, kMajorA, kMajorB, accumulate}, site);
}
template <int kN, Major kMajorB>
Q1M_DEVICE void wgmma_rs(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate,
                         Site site) {
  static_assert(kN == 64 || kN == 128);
  emu::wgmma({d, kN, a, 0, b, Major::kK, kMajorB, accumulate}, site);
}
template <typename A>
Q1M_DEVICE void wgmma_fence(A& registers, Site site) {
  static_assert(std::is_array_v<A>);
  emu::wgmma_fence(&registers, sizeof(A), site);
}
template <typename A, typename B>
Q1M_DEVICE void wgmma_fence(A& registers, B& more_registers, Site site) {
  static_assert(std::is_array_v<A> && std::is_array_v<B>);
  emu::wgmma_fence(&registers, sizeof(A), site);
  emu::wgmma_fence(&more_registers, sizeof(B), site);
}
Q1M_DEVICE void wgmma_commit(Site) { emu::wgmma_commit(); }
template <int kPending, typename A>
Q1M_DEVICE void wgmma_wait(A& registers, Site site) {
  const void* const listed[] = {&registers};
  const size_t bytes[] = {sizeof(A)};
  emu::wgmma_wait(kPending, listed, bytes, 1, site);
}
template <int kPending, typename A, typename B>
Q1M_DEVICE void wgmma_wait(A& registers, B& more_registers, Site site) {
  const void* const listed[] = {&registers, &more_registers};
  const size_t bytes[] = {sizeof(A), sizeof(B)};
  emu::wgmma_wait(kPending, listed, bytes, 2, site);
}

template <int kCount>
Q1M_DEVICE void registers_decrease(Site site) {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  emu::registers_decrease(kCount, site);
}
template <int kCount>
Q1M_DEVICE void registers_increase(Site site) {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  emu::registers_increase(kCount, site);
}

// --- Warp-level matrices ---------------------------------------------------------------------

Q1M_DEVICE void ldmatrix_x4(uint32_t (&r)[4], Shared<Vec16> row, Site site) {
  emu::ldmatrix_x4(r, row.address, false, site);
}
Q1M_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], Shared<Vec16> row, Site site) {
  emu::ldmatrix_x4(r, row.address, true, site);
}
Q1M_DEVICE void stmatrix_x4(Shared<Vec16> row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3,
                            Site site) {
  const uint32_t r[4] = {r0, r1, r2, r3};
  emu::stmatrix_x4(row.address, r, site);
}
Q1M_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             Site site) {
  emu::mma_m16n8k16(d, a, b, site);
}
Q1M_DEVICE void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                 Site site) {
  emu::mma_m16n8k16_f16(d, a, b, site);
}

// --- Arithmetic ------------------------------------------------------------------------------

Q1M_DEVICE float exp2_approx(float x) { return emu::exp2_approx(x); }
Q1M_DEVICE float log2_approx(float x) { return emu::log2_approx(x); }
Q1M_DEVICE float reciprocal_approx(float x) { return emu::reciprocal_approx(x); }
Q1M_DEVICE float multiply(float a, float b) { return a * b; }
Q1M_DEVICE uint32_t pack_f16(float low, float high) {
  return emu::float_to_f16(low) | static_cast<uint32_t>(emu::float_to_f16(high)) << 16;
}
Q1M_DEVICE uint32_t e4m3_to_f16(uint32_t pair) {
  float value[2];
  for (int i = 0; i < 2; ++i) {
    e4m3 number;
    number.bits = static_cast<uint8_t>(pair >> 8 * i);
    value[i] = static_cast<float>(number);
  }
  return pack_f16(value[0], value[1]);
}
Q1M_DEVICE uint32_t pack_e4m3(float low, float high) {
  const auto round = [](float x) -> uint32_t {
    const uint32_t bits = e4m3(x).bits;
    return (bits & 0x7f) == 0x7f ? 0x7f : bits;
  };
  return round(low) | round(high) << 8;
}
Q1M_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return result;
}
Q1M_DEVICE uint32_t pack_bf16(float low, float high) {
  const auto round = [](float x) -> uint32_t {  // to nearest, ties to even
    const auto bits = std::bit_cast<uint32_t>(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;  // the NaN that cvt gives
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return round(low) | round(high) << 16;
}
Q1M_DEVICE float bf16_low(uint32_t pair) { return std::bit_cast<float>(pair << 16); }
Q1M_DEVICE float bf16_high(uint32_t pair) { return std::bit_cast<float>(pair & 0xffff0000); }
inline float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline int opaque(int value) { return value; }

// --- Programmatic dependent launch: a launch runs alone here ---------------------------------

Q1M_DEVICE void wait_for_prior_grid(Site) {}
Q1M_DEVICE void launch_dependents(Site) {}

}  // namespace qwen1m::arch
