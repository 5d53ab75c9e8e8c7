#pragma once
/// The hardware as a kernel sees it: one declaration per primitive.
///
/// A kernel includes this header and nothing else of a device. It is compiled twice from the same
/// source: by nvcc, where each primitive is one instruction (arch/cuda, the only inline assembly),
/// and by the host compiler, where it runs under an emulator that checks every rule stated here
/// (arch/emu, docs/emulator.md). Section numbers are those of the PTX ISA manual, version 9.0:
/// https://docs.nvidia.com/cuda/parallel-thread-execution/
///
/// Rules that keep kernels free of #ifdef:
///  * shared memory is reached through handles (Shared<T>) only, global memory through global_*;
///  * two bf16 travel as one uint32_t, the lower index in the lower half (pack_bf16);
///  * registers that an asynchronous wgmma reads or writes are listed in wgmma_fence and
///  wgmma_wait;
///  * ids of named barriers are compile-time constants.

#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define Q1M_DEVICE __device__ __forceinline__
#define Q1M_HOST_DEVICE __host__ __device__ __forceinline__
#define Q1M_UNROLL _Pragma("unroll")
#define Q1M_NO_UNROLL _Pragma("unroll 1")
/// Where in the kernel a primitive was called: an argument of the emulator's, nothing under nvcc.
#define Q1M_SITE
#define Q1M_ONLY_SITE
#else
#define Q1M_DEVICE inline
#define Q1M_HOST_DEVICE inline
#define Q1M_UNROLL
#define Q1M_NO_UNROLL
#define Q1M_SITE , ::qwen1m::arch::Site site = ::qwen1m::arch::Site::here()
#define Q1M_ONLY_SITE ::qwen1m::arch::Site site = ::qwen1m::arch::Site::here()
#endif

namespace qwen1m::arch {

#ifndef __CUDACC__
/// Source position of a call, for the emulator's reports.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};
#endif

// --- Shared memory ---------------------------------------------------------------------------

/// Most dynamic shared memory of a block in bytes: sm_90 (CUDA programming guide, table of compute
/// capabilities), and the sm_86/sm_89 limit that our sm_80 kernels keep to.
inline constexpr uint32_t kMaxSharedBytesSm90 = 227 * 1024;
inline constexpr uint32_t kMaxSharedBytesSm80 = 99 * 1024;

/// A place of type T in shared memory: its 32-bit address in the shared::cluster window, never a
/// pointer. Arrays are indexed, structs are entered with Q1M_SHARED_MEMBER.
template <typename T>
struct Shared {
  using Type = T;
  uint32_t address;

  /// The same place seen as another type; the address must be aligned for it.
  template <typename U>
  Q1M_HOST_DEVICE Shared<U> as() const {
    return {address};
  }
};
template <typename T, size_t kSize>
struct Shared<T[kSize]> {
  using Type = T[kSize];
  uint32_t address;

  Q1M_HOST_DEVICE Shared<T> operator[](int index) const {
    return {address + static_cast<uint32_t>(index) * static_cast<uint32_t>(sizeof(T))};
  }
  template <typename U>
  Q1M_HOST_DEVICE Shared<U> as() const {
    return {address};
  }
};

/// Handle of a member of the struct behind a handle.
#define Q1M_SHARED_MEMBER(handle, member)                                                 \
  (::qwen1m::arch::Shared<decltype(std::remove_cvref_t<decltype(handle)>::Type::member)>{ \
      (handle).address + static_cast<uint32_t>(offsetof(                                  \
                             typename std::remove_cvref_t<decltype(handle)>::Type, member))})

/// 16 bytes, the unit of vectorised copies.
struct alignas(16) Vec16 {
  uint32_t word[4];
};

/// Start of the block's dynamic shared memory, aligned to 1,024 bytes (the atom of the 128-byte
/// swizzle). `Layout` is the kernel's plan of it.
template <typename Layout>
Q1M_DEVICE Shared<Layout> shared_memory();

/// ld.shared / st.shared (9.7.9.8, 9.7.9.11), T of 2, 4, 8 or 16 bytes, naturally aligned.
template <typename T>
Q1M_DEVICE T shared_load(Shared<T> from Q1M_SITE);
template <typename T>
Q1M_DEVICE void shared_store(Shared<T> to, T value Q1M_SITE);

// --- Identity --------------------------------------------------------------------------------

Q1M_DEVICE int thread_index();       // %tid.x
Q1M_DEVICE int lane_index();         // thread_index() % 32
Q1M_DEVICE int warp_index();         // thread_index() / 32, uniform in a warp
Q1M_DEVICE int64_t block_index();    // %ctaid.x
Q1M_DEVICE int64_t num_blocks();     // %nctaid.x
Q1M_DEVICE uint32_t cluster_rank();  // %cluster_ctarank; 0 without a cluster
Q1M_DEVICE uint32_t cluster_size();  // %cluster_nctarank; 1 without a cluster

// --- Global memory ---------------------------------------------------------------------------

/// ld.global.nc / st.global (9.7.9.8, 9.7.9.11), T of 1 to 16 bytes, naturally aligned.
/// global_load reads through the read-only path: for what no thread of the launch writes.
template <typename T>
Q1M_DEVICE T global_load(const T* from Q1M_SITE);
template <typename T>
Q1M_DEVICE void global_store(T* to, T value Q1M_SITE);
/// ld.acquire.gpu / st.release.gpu of a word, for flags between blocks.
Q1M_DEVICE uint32_t global_load_acquire(const uint32_t* from Q1M_SITE);
Q1M_DEVICE void global_store_release(uint32_t* to, uint32_t value Q1M_SITE);
/// Plain ld.global, for what another thread of the launch wrote and an acquire has ordered.
template <typename T>
Q1M_DEVICE T global_load_coherent(const T* from Q1M_SITE);
/// atom.acq_rel.gpu.add.u32 (9.7.13.5): returns the old value.
Q1M_DEVICE uint32_t atomic_add(uint32_t* at, uint32_t value Q1M_SITE);
/// red.relaxed.gpu.add.f32: the order of additions is not defined.
Q1M_DEVICE void reduce_add(float* at, float value Q1M_SITE);
/// fence.acq_rel.gpu (membar, 9.7.13.4): orders this thread's accesses for the whole device.
Q1M_DEVICE void fence_device(Q1M_ONLY_SITE);

// --- Warp ------------------------------------------------------------------------------------

Q1M_DEVICE void warp_sync(Q1M_ONLY_SITE);  // bar.warp.sync of all 32 lanes
/// elect.sync: true in exactly one lane of the converged warp (9.7.13.15).
Q1M_DEVICE bool elect_one(Q1M_ONLY_SITE);
/// shfl.sync.bfly / shfl.sync.idx over all 32 lanes (9.7.9.6); T is a 32-bit type.
template <typename T>
Q1M_DEVICE T shuffle_xor(T value, int lane_mask Q1M_SITE);
template <typename T>
Q1M_DEVICE T shuffle(T value, int source_lane Q1M_SITE);

// --- Barriers of threads ---------------------------------------------------------------------

Q1M_DEVICE void block_sync(Q1M_ONLY_SITE);  // bar.sync 0 of the whole block (9.7.13.1)
/// bar.sync / bar.arrive of a named barrier, id 1 to 15; `threads` (a multiple of 32) counts those
/// who sync and those who arrive, and is the same at every call of one phase.
template <int kId>
Q1M_DEVICE void named_barrier_sync(int threads Q1M_SITE);
template <int kId>
Q1M_DEVICE void named_barrier_arrive(int threads Q1M_SITE);
/// barrier.cluster.arrive.release / wait.acquire of all threads of the cluster (9.7.13.3).
Q1M_DEVICE void cluster_arrive(Q1M_ONLY_SITE);
Q1M_DEVICE void cluster_wait(Q1M_ONLY_SITE);

// --- mbarrier (9.7.13.16) --------------------------------------------------------------------

/// A barrier object in shared memory. A phase ends when `count` arrivals are in and as many bytes
/// have landed as were expected; the next phase begins at once with the same count.
struct alignas(8) Mbarrier {
  uint64_t state;
};

/// mbarrier.init: by one thread, then fence_mbarrier_init and a barrier before anybody uses it.
Q1M_DEVICE void mbarrier_init(Shared<Mbarrier> bar, int count Q1M_SITE);
/// fence.mbarrier_init.release.cluster: makes inits visible to the async proxy and to the cluster.
Q1M_DEVICE void fence_mbarrier_init(Q1M_ONLY_SITE);
/// mbarrier.arrive: release. The second form also raises the number of bytes to wait for, which
/// has to happen in the phase in which they land.
Q1M_DEVICE void mbarrier_arrive(Shared<Mbarrier> bar Q1M_SITE);
Q1M_DEVICE void mbarrier_arrive_expect_tx(Shared<Mbarrier> bar, uint32_t bytes Q1M_SITE);
/// mbarrier.arrive.shared::cluster on a barrier of another block of the cluster (map_to_rank).
Q1M_DEVICE void mbarrier_arrive_remote(Shared<Mbarrier> bar Q1M_SITE);
/// mbarrier.try_wait.parity: true when the phase of that parity has ended (then: acquire). May be
/// false for no reason. A fresh barrier is in phase 0, so parity 1 passes: "the one before".
Q1M_DEVICE bool mbarrier_try_wait(Shared<Mbarrier> bar, uint32_t parity Q1M_SITE);
/// Waits until the phase of that parity has ended.
Q1M_DEVICE void mbarrier_wait(Shared<Mbarrier> bar, uint32_t parity Q1M_SITE);

/// mapa.shared::cluster: the same place in the shared memory of block `rank` of the cluster.
template <typename T>
Q1M_DEVICE Shared<T> map_to_rank(Shared<T> at, uint32_t rank);

/// ld.shared::cluster of 4 or 8 bytes from another block of the cluster (map_to_rank).
/// cluster_arrive and cluster_wait order it behind what that block stored, and in front of its end.
template <typename T>
Q1M_DEVICE T shared_load_remote(Shared<T> from Q1M_SITE);

/// Blocks of a kernel struct's clusters: its kCluster, or 1.
template <typename Kernel>
constexpr int cluster_of() {
  if constexpr (requires { Kernel::kCluster; }) {
    return Kernel::kCluster;
  } else {
    return 1;
  }
}

// --- Proxies (8.6) ---------------------------------------------------------------------------

/// fence.proxy.async.shared::cta: what this thread wrote with shared_store or stmatrix becomes
/// visible to wgmma and TMA, once a barrier has ordered it. The writer executes it.
Q1M_DEVICE void fence_proxy_async(Q1M_ONLY_SITE);

// --- TMA: bulk asynchronous copies (9.7.9.25, 5.5) -------------------------------------------

/// Swizzle of 16-byte chunks inside rows of W bytes. 128: chunk ^= (address / 128) % 8.
enum class Swizzle : int { kNone = 0, k32 = 32, k64 = 64, k128 = 128 };

/// What a tensor map describes, always with five dimensions; dim 0 is the contiguous one. Host
/// side.
struct TensorMapSpec {
  void* base = nullptr;                         // 16-byte aligned
  int element_bytes = 2;                        // 2 (bf16) or 4 (fp32)
  uint64_t sizes[5] = {1, 1, 1, 1, 1};          // elements, 1 to 2^32; unused dims have 1
  uint64_t stride_bytes[4] = {16, 16, 16, 16};  // of dims 1 to 4; multiples of 16, < 2^40
  uint32_t box[5] = {1, 1, 1, 1, 1};  // elements of one copy, <= 256; box[0] elements: a multiple
                                      // of 16 bytes, at most the swizzle's width
  Swizzle swizzle = Swizzle::kNone;
};

/// CUtensorMap, or the emulator's counterpart. A kernel gets it inside its __grid_constant__
/// parameters and hands it to tma_load.
struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

struct Coordinates5 {
  int32_t c[5];
};

/// cp.async.bulk.tensor.5d, global to shared: one box at the coordinates, elements outside the
/// tensor are 0 and count as bytes too. `to` is 128-byte aligned (1,024 with Swizzle::k128). The
/// bytes of the box are taken off `bar`. One thread issues it.
Q1M_DEVICE void tma_load(Shared<void> to, const TensorMap& map, Shared<Mbarrier> bar,
                         Coordinates5 at Q1M_SITE);
/// The same to every block of the cluster whose bit is set in `mask`, at the same offsets of data
/// and barrier; each barrier gets the bytes of the whole box.
Q1M_DEVICE void tma_load_multicast(Shared<void> to, const TensorMap& map, Shared<Mbarrier> bar,
                                   Coordinates5 at, uint16_t mask Q1M_SITE);
/// cp.async.bulk.tensor.5d, shared to global: clipped at the tensor's bounds; then bulk_commit and
/// bulk_wait_read before the source is written again.
Q1M_DEVICE void tma_store(const TensorMap& map, Shared<void> from, Coordinates5 at Q1M_SITE);
/// cp.async.bulk: `bytes` (a multiple of 16) without a tensor map, all addresses 16-byte aligned.
Q1M_DEVICE void bulk_load(Shared<void> to, const void* from, uint32_t bytes,
                          Shared<Mbarrier> bar Q1M_SITE);
Q1M_DEVICE void bulk_store(void* to, Shared<void> from, uint32_t bytes Q1M_SITE);
/// cp.async.bulk.commit_group / wait_group(.read): at most kPending groups of this thread's stores
/// remain unfinished (with .read: unread).
Q1M_DEVICE void bulk_commit(Q1M_ONLY_SITE);
template <int kPending>
Q1M_DEVICE void bulk_wait_read(Q1M_ONLY_SITE);
template <int kPending>
Q1M_DEVICE void bulk_wait(Q1M_ONLY_SITE);

// --- cp.async, sm_80 (9.7.9.25.3) ------------------------------------------------------------

/// cp.async.cg 16 bytes; with `valid` false nothing is read and 16 zero bytes are written.
Q1M_DEVICE void cp_async_16(Shared<void> to, const void* from, bool valid Q1M_SITE);
Q1M_DEVICE void cp_async_commit(Q1M_ONLY_SITE);
template <int kPending>
Q1M_DEVICE void cp_async_wait(Q1M_ONLY_SITE);

// --- wgmma, sm_90a (9.7.15) ------------------------------------------------------------------

/// How an operand lies in shared memory: K-major rows run along the summed index (as A [m][k] or
/// B [n][k]), MN-major ones along the other (as V [key][dim], where key is summed).
enum class Major : int { kK = 0, kMN = 1 };

/// Matrix descriptor (9.7.15.5.1). All byte quantities are multiples of 16. Tiles with a swizzle
/// of W bytes are made of atoms of 8 rows of W bytes, aligned to 8 W.
///   K-major: `stride` from one 8-row group to the next; `leading` unused.
///   MN-major: `leading` from one group of W / 2 columns to the next, `stride` from one 8-row group
///   (of k) to the next.
Q1M_HOST_DEVICE uint64_t matrix_descriptor(uint32_t address, uint32_t leading_bytes,
                                           uint32_t stride_bytes, Swizzle swizzle) {
  const uint64_t code = swizzle == Swizzle::k128  ? 1
                        : swizzle == Swizzle::k64 ? 2
                        : swizzle == Swizzle::k32 ? 3
                                                  : 0;
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{(leading_bytes & 0x3ffff) >> 4} << 16 |
         uint64_t{(stride_bytes & 0x3ffff) >> 4} << 32 | code << 62;
}

/// Byte offset, in a tile of 128-byte rows with the 128-byte swizzle, of a byte of a row.
Q1M_HOST_DEVICE uint32_t swizzled_128(uint32_t row, uint32_t byte_in_row) {
  return row * 128 + (byte_in_row ^ ((row & 7) << 4));
}

/// The same of 64-byte rows with the 64-byte swizzle.
Q1M_HOST_DEVICE uint32_t swizzled_64(uint32_t row, uint32_t byte_in_row) {
  return row * 64 + (byte_in_row ^ ((row >> 1 & 3) << 4));
}

/// wgmma.mma_async.m64n<kN>k16.f32.bf16.bf16, kN 64 or 128: d = a b (+ d if accumulate), by the 128
/// threads of a warpgroup. d[4 j + 2 h + e] of thread t is row 16 (t / 32) + (t % 32) / 4 + 8 h,
/// column 8 j + 2 (t % 4) + e (figure of 9.7.15.5.1). a in registers: a[2 g + h] holds row
/// ... + 8 h, columns 8 g + 2 (t % 4) and the next.
/// From wgmma_fence until the wgmma_wait that covers it nobody touches d, a or the shared operands.
template <int kN, Major kMajorA, Major kMajorB>
Q1M_DEVICE void wgmma_ss(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate Q1M_SITE);
template <int kN, Major kMajorB>
Q1M_DEVICE void wgmma_rs(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b,
                         bool accumulate Q1M_SITE);
/// wgmma.fence: before the first wgmma of a batch, after the last write to the registers it uses.
/// All of them are listed: arrays of float or uint32_t, of one or two dimensions.
template <typename A>
Q1M_DEVICE void wgmma_fence(A& registers Q1M_SITE);
template <typename A, typename B>
Q1M_DEVICE void wgmma_fence(A& registers, B& more_registers Q1M_SITE);
/// wgmma.commit_group: closes a group.
Q1M_DEVICE void wgmma_commit(Q1M_ONLY_SITE);
/// wgmma.wait_group: all but the newest kPending groups are done. Their registers are listed.
template <int kPending, typename A>
Q1M_DEVICE void wgmma_wait(A& registers Q1M_SITE);
template <int kPending, typename A, typename B>
Q1M_DEVICE void wgmma_wait(A& registers, B& more_registers Q1M_SITE);

/// setmaxnreg.dec / inc (9.7.19.5): by all warps of a warpgroup; the total stays within what the
/// launch gave to the block; kCount is a multiple of 8 from 24 to 256.
template <int kCount>
Q1M_DEVICE void registers_decrease(Q1M_ONLY_SITE);
template <int kCount>
Q1M_DEVICE void registers_increase(Q1M_ONLY_SITE);

// --- Warp-level matrices ---------------------------------------------------------------------

/// ldmatrix.m8n8.x4(.trans) / stmatrix.m8n8.x4 (9.7.14.5.15, .16): lane l names the 16-byte row
/// l % 8 of matrix l / 8.
Q1M_DEVICE void ldmatrix_x4(uint32_t (&r)[4], Shared<Vec16> row Q1M_SITE);
Q1M_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], Shared<Vec16> row Q1M_SITE);
Q1M_DEVICE void stmatrix_x4(Shared<Vec16> row, uint32_t r0, uint32_t r1, uint32_t r2,
                            uint32_t r3 Q1M_SITE);
/// mma.sync.m16n8k16.row.col.f32.bf16.bf16.f32 (9.7.14.5.8): d += a b.
Q1M_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                             const uint32_t (&b)[2] Q1M_SITE);
/// The same of fp16 pairs.
Q1M_DEVICE void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4],
                                 const uint32_t (&b)[2] Q1M_SITE);

// --- Arithmetic ------------------------------------------------------------------------------

Q1M_DEVICE float exp2_approx(float x);        // ex2.approx.ftz.f32: 2 ulp; 2^-inf = 0
Q1M_DEVICE float log2_approx(float x);        // lg2.approx.ftz.f32
Q1M_DEVICE float reciprocal_approx(float x);  // rcp.approx.ftz.f32
/// mul.rn.f32: an addition behind it is not fused into it, so that the bits are those of a CPU.
Q1M_DEVICE float multiply(float a, float b);
Q1M_DEVICE uint32_t pack_bf16(float low, float high);  // cvt.rn.bf16x2.f32
Q1M_DEVICE float bf16_low(uint32_t pair);              // the lower half as fp32, exact
Q1M_DEVICE float bf16_high(uint32_t pair);
Q1M_DEVICE float as_float(uint32_t bits);
Q1M_DEVICE uint32_t pack_f16(float low, float high);  // cvt.rn.f16x2.f32
/// cvt.rn.f16x2.e4m3x2: the two e4m3 in the lower half of `pair` as fp16, exact. A NaN becomes some
/// number on sm_80, which has no such instruction.
Q1M_DEVICE uint32_t e4m3_to_f16(uint32_t pair);
/// cvt.rn.satfinite.e4m3x2.f32: to the nearest e4m3, ties to even, beyond 448 to 448; `low` in the
/// lowest byte, the upper half 0. Of a NaN the sign is not defined. In integers below sm_89.
Q1M_DEVICE uint32_t pack_e4m3(float low, float high);
/// prmt.b32: byte i of the result is byte (selector >> 4 i) % 8 of (a, b), a's being 0 to 3.
Q1M_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector);

/// The value itself, but the compiler does not know: what is computed from it stays in the loop
/// where it is needed instead of occupying registers across it.
Q1M_DEVICE int opaque(int value);

// --- Programmatic dependent launch (9.7.13.13) -----------------------------------------------

/// griddepcontrol.wait: until the grids this one depends on have finished and their writes show.
Q1M_DEVICE void wait_for_prior_grid(Q1M_ONLY_SITE);
/// griddepcontrol.launch_dependents: the next grid may start.
Q1M_DEVICE void launch_dependents(Q1M_ONLY_SITE);

}  // namespace qwen1m::arch

#ifdef __CUDACC__
#include "arch/cuda/arch_cuda.cuh"
#else
#include "arch/emu/arch_emu.h"
#endif
