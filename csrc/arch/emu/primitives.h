#pragma once
/// The engine as arch_emu.h calls it: the primitives of arch.h without templates and handles.
/// Comes with arch.h, whose types it needs, and only so.

#include <cstddef>
#include <cstdint>

namespace qwen1m::arch::emu {

// shared_memory.cpp's callers
uint32_t shared_base();
void shared_load(void* to, uint32_t address, uint32_t bytes, Site site);
void shared_store(uint32_t address, const void* from, uint32_t bytes, Site site);
uint32_t map_to_rank(uint32_t address, uint32_t rank);
void shared_load_remote(void* to, uint32_t address, uint32_t bytes, Site site);
void fence_proxy_async(Site site);

// identity
int thread_index();
int64_t block_index();
int64_t num_blocks();
uint32_t cluster_rank();
uint32_t cluster_size();

// global memory
enum class GlobalRead { kReadOnly, kCoherent };
void global_load(void* to, const void* from, uint32_t bytes, GlobalRead path, Site site);
void global_store(void* to, const void* from, uint32_t bytes, Site site);
uint32_t global_load_acquire(const uint32_t* from, Site site);
void global_store_release(uint32_t* to, uint32_t value, Site site);
uint32_t atomic_add(uint32_t* at, uint32_t value, Site site);
void reduce_add(float* at, float value, Site site);
void fence_device(Site site);

// warps
void warp_sync(Site site);
bool elect_one(Site site);
uint32_t shuffle(uint32_t value, int source_lane, const char* primitive, Site site);
void registers_decrease(int count, Site site);
void registers_increase(int count, Site site);

// barriers
void block_sync(Site site);
void named_barrier_sync(int id, int threads, const char* primitive, Site site);
void named_barrier_arrive(int id, int threads, Site site);
void cluster_arrive(Site site);
void cluster_wait(Site site);

// mbarriers
void mbarrier_init(uint32_t address, int count, Site site);
void fence_mbarrier_init(Site site);
void mbarrier_arrive(uint32_t address, uint32_t expected_bytes, Site site);
void mbarrier_arrive_remote(uint32_t address, Site site);
bool mbarrier_try_wait(uint32_t address, uint32_t parity, Site site);
void mbarrier_wait(uint32_t address, uint32_t parity, Site site);

// copies; `mask` 0: to the own block only
void tma_load(uint32_t to, const TensorMap& map, uint32_t bar, Coordinates5 at, bool multicast,
              uint16_t mask, Site site);
void tma_store(const TensorMap& map, uint32_t from, Coordinates5 at, Site site);
void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t bar, Site site);
void bulk_store(void* to, uint32_t from, uint32_t bytes, Site site);
void bulk_commit();
void bulk_wait(int pending, bool read_only);
void cp_async_16(uint32_t to, const void* from, bool valid, Site site);
void cp_async_commit();
void cp_async_wait(int pending);

// wgmma
struct WgmmaCall {
  float* d;
  int n;
  const uint32_t* a_registers;  // null: A is in shared memory
  uint64_t a;
  uint64_t b;
  Major major_a;
  Major major_b;
  bool accumulate;
};
void wgmma(const WgmmaCall& call, Site site);
void wgmma_fence(const void* registers, size_t bytes, Site site);
void wgmma_commit();
void wgmma_wait(int pending, const void* const* registers, const size_t* bytes, int count,
                Site site);

// warp-level matrices
void ldmatrix_x4(uint32_t* r, uint32_t row, bool transposed, Site site);
void stmatrix_x4(uint32_t row, const uint32_t* r, Site site);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Site site);
void mma_m16n8k16_f16(float* d, const uint32_t* a, const uint32_t* b, Site site);
/// Conversions of fp16: the value of a number, and the number nearest to a value.
float f16_to_float(uint16_t bits);
uint16_t float_to_f16(float value);

// arithmetic
float exp2_approx(float x);
float log2_approx(float x);
float reciprocal_approx(float x);

}  // namespace qwen1m::arch::emu
