#pragma once
/// Threads, warps and the block: who am I, exchange, barriers of threads, warp-level matrices,
/// arithmetic.

#include "arch/arch.h"
#include "qwen1m/dtypes.h"

namespace qwen1m::arch {

// --- Identity ----------------------------------------------------------------------------------

Q1M_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
Q1M_DEVICE int lane_index() { return thread_index() % 32; }
/// The shuffle tells the compiler that the value is uniform, so that branches on it are too.
Q1M_DEVICE int warp_index() { return __shfl_sync(0xffffffffu, thread_index() / 32, 0); }
Q1M_DEVICE int64_t block_index() { return static_cast<int64_t>(blockIdx.x); }
Q1M_DEVICE int64_t num_blocks() { return static_cast<int64_t>(gridDim.x); }

// Clusters and dependent launches came with sm_90; before, a block stands alone and a grid starts
// when the one before it has finished.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
Q1M_DEVICE uint32_t cluster_rank() { return 0; }
Q1M_DEVICE uint32_t cluster_size() { return 1; }
Q1M_DEVICE void wait_for_prior_grid() {}
Q1M_DEVICE void launch_dependents() {}
#else
Q1M_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
Q1M_DEVICE uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
Q1M_DEVICE void wait_for_prior_grid() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
Q1M_DEVICE void launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
#endif

// --- Exchange in a warp ------------------------------------------------------------------------

Q1M_DEVICE void warp_sync() { __syncwarp(); }

Q1M_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
}

template <typename T>
Q1M_DEVICE T shuffle_xor(T value, int lane_mask) {
  static_assert(sizeof(T) == 4, "shuffle_xor: T is a 32-bit type");
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}
template <typename T>
Q1M_DEVICE T shuffle(T value, int source_lane) {
  static_assert(sizeof(T) == 4, "shuffle: T is a 32-bit type");
  return __shfl_sync(0xffffffffu, value, source_lane);
}

// --- Barriers of threads -----------------------------------------------------------------------

Q1M_DEVICE void block_sync() { asm volatile("bar.sync 0;" ::: "memory"); }

template <int kId>
Q1M_DEVICE void named_barrier_sync(int threads) {
  static_assert(1 <= kId && kId <= 15, "named barriers are 1 to 15; 0 is block_sync");
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "r"(threads) : "memory");
}
template <int kId>
Q1M_DEVICE void named_barrier_arrive(int threads) {
  static_assert(1 <= kId && kId <= 15, "named barriers are 1 to 15; 0 is block_sync");
  asm volatile("bar.arrive %0, %1;" ::"n"(kId), "r"(threads) : "memory");
}

// Without .aligned: the threads of a warp may come from different branches.
Q1M_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
Q1M_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// --- Warp-level matrices -----------------------------------------------------------------------

Q1M_DEVICE void ldmatrix_x4(uint32_t (&r)[4], Shared<Vec16> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row.address)
               : "memory");
}
Q1M_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], Shared<Vec16> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row.address)
               : "memory");
}
Q1M_DEVICE void stmatrix_x4(Shared<Vec16> row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row.address),
      "r"(r0), "r"(r1), "r"(r2), "r"(r3)
      : "memory");
}

/// Not volatile: it touches registers only.
Q1M_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

Q1M_DEVICE void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- Arithmetic --------------------------------------------------------------------------------

Q1M_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
Q1M_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
Q1M_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
Q1M_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
Q1M_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
Q1M_DEVICE float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
Q1M_DEVICE float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
Q1M_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
Q1M_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
Q1M_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}
Q1M_DEVICE uint32_t e4m3_to_f16(uint32_t pair) {
  uint32_t result;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  // The exponent, as that of an fp16, is 8 too small; denormals come out right as well.
  const uint32_t wide = permute_bytes(pair, 0, 0x1404);
  const uint32_t small = (wide & 0x80008000u) | ((wide & 0x7f007f00u) >> 1);
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(small), "r"(0x5c005c00u));  // 256
#else
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(result) : "h"(static_cast<uint16_t>(pair)));
#endif
  return result;
}
Q1M_DEVICE uint32_t pack_e4m3(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  return uint32_t{e4m3(low).bits} | uint32_t{e4m3(high).bits} << 8;
#else
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}
Q1M_DEVICE int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

}  // namespace qwen1m::arch
