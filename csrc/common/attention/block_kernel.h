#pragma once
/// The seam between the walk over the paged cache (query_tile.h, compiled once, for any machine)
/// and the arithmetic on one page of keys (block_kernel_<isa>.cpp, one per instruction set).
///
/// Everything is computed transposed: S^T = K Q^T, O^T += V^T P^T. A vector register holds one key
/// (or one output dimension) of several *query rows*, its lanes. So the running maximum, the mask
/// and the sum are per lane, nothing is ever reduced across lanes, and a row's result cannot depend
/// on its neighbours: all instruction sequences are the same for every lane.
///
/// A step is one page (128 keys on the absolute grid), or the part of it that belongs to one Dual
/// Chunk stage. Per step and row, with s_j = <q, k_j>, m the running maximum of s and c > 0 the
/// row's factor from s to log2 units:
///   m' = max(m, max_j s_j)     p_j = 2^(c (s_j - m'))     f = 2^(c (m - m'))
///   l' = f l + sum_j p_j       O' = f O + sum_j p_j v_j
/// A step whose keys are all masked for a row gives f = 1 and adds zeros, which is exact: that is
/// why the bits of a row do not depend on which other rows walk with it.

#include <cstdint>

#include "common/cpu_features.h"
#include "qwen1m/dtypes.h"
#include "qwen1m/dual_chunk.h"

namespace qwen1m {

/// The keys [lo, hi) of one page, ready for `attend`.
struct PageTile {
  const void* k = nullptr;  // [128] rows of k_row_words words
  const void* v = nullptr;  // as the kernel's pack_page leaves it
  int64_t k_row_words = 0;
  int64_t begin = 0;  // token of the page's row 0
  int lo = 0, hi = 0;
  // Hints, fetched towards the L2 cache while keys (next_k) and values (next_v) are read: what
  // comes after them, null if nothing, page_bytes each; 0 if there is nothing to fetch.
  const char *next_k = nullptr, *next_v = nullptr;
  int64_t page_bytes = 0;
};

/// Query rows of one KV head that are attended together, one per lane; rows are in token order.
/// Memory belongs to the caller, 64-byte aligned. A word is 4 bytes: a float or a pair of bf16.
struct LaneBlock {
  float* q = nullptr;               // rotated queries, as the kernel's pack_queries leaves them
  float* o = nullptr;               // unnormalised output, see OutputLayout
  float* m = nullptr;               // [lanes] running maximum of <q, k>; -inf: no key seen
  float* l = nullptr;               // [lanes] running sum
  float* log2_scale = nullptr;      // [lanes] > 0: turns <q, k> into log2 units
  int32_t* token_offset = nullptr;  // [lanes] token of the lane's row minus first_token, ascending
  int64_t first_token = 0;          // token of lane 0
  int lanes = 0;                    // of the kernel
  int rows = 0;                     // lanes in use, from lane 0

  /// The keys of `page` to compute with, in register tiles of `step` keys: [first, last), of which
  /// no row may see those outside [page.lo, hi). Empty if hi <= page.lo.
  struct Keys {
    int first, last, hi;
    bool some_masked;  // some row may not see some key of [first, last)
  };
  Keys keys(const PageTile& page, int step) const {
    const int64_t seen_by_last = first_token + token_offset[lanes - 1] + 1 - page.begin;
    const int hi = seen_by_last >= page.hi ? page.hi : static_cast<int>(seen_by_last);
    const int first = page.lo / step * step, last = (hi + step - 1) / step * step;
    const int64_t seen_by_first = first_token + 1 - page.begin;
    return {first, last, hi, first < page.lo || last > hi || seen_by_first < hi};
  }
};

/// Where value d of lane i of LaneBlock::o lies.
enum class OutputLayout : uint8_t {
  kDimLane,  // o[d * lanes + i]
  kLaneDim,  // o[i * D + d]
};

struct BlockKernel {
  CpuIsa isa;   // what the machine must have
  DType dtype;  // element type of the cache
  int lanes;    // rows of a LaneBlock
  OutputLayout output;

  /// Sizes of LaneBlock::q and of the buffers of pack_page, as functions of head_dim.
  int64_t (*q_floats)(int64_t head_dim);
  int64_t (*k_pack_floats)(int64_t head_dim);
  int64_t (*v_pack_floats)(int64_t head_dim);

  /// Rows `rows[0 .. count)` of D floats become lanes 0 .. count-1 of `q`, the rest zero.
  void (*pack_queries)(const float* rows, int count, int64_t head_dim, float* q);

  /// Readies the keys [lo, hi) of a page, k and v being its [128, D]. Reads rows [lo, hi) of v,
  /// which may be null where only `sum` and `spread` follow; of k also rows beside them, whose
  /// content does not matter.
  PageTile (*pack_page)(const void* k, const void* v, int64_t head_dim, int lo, int hi,
                        float* k_pack, float* v_pack);

  /// One step for one block. `scores` is scratch of 128 * lanes floats.
  void (*attend)(const LaneBlock&, const PageTile&, int64_t head_dim, float* scores);

  /// The two halves of `attend`, for callers that read the keys of several pages before their
  /// values; null in prefill kernels. `weigh` takes the scores that `score` left.
  void (*score)(const LaneBlock&, const PageTile&, int64_t head_dim, float* scores);
  void (*weigh)(const LaneBlock&, const PageTile&, int64_t head_dim, float* scores);

  /// The sparse estimate (sparse_estimate.h), in two walks; null in decode kernels. `sum`: the part
  /// of a step that updates m and l. `spread`: with m and 1 / l of all keys in the block's m and l,
  /// adds the probabilities of each key to column[key], and those of offset i - j to
  /// slash[i - j - (first_token - page.begin - 127)]. `scores` is scratch of
  /// 128 * (2 * lanes + 32) floats for both, all zero at first.
  void (*sum)(const LaneBlock&, const PageTile&, int64_t head_dim, float* scores);
  void (*spread)(const LaneBlock&, const PageTile&, int64_t head_dim, float* scores, float* column,
                 float* slash);

  /// Around the calls of one thread, where the processor has state to set up; else null.
  void (*begin)(void* saved);
  void (*end)(const void* saved);
};

/// Room for `begin` to save to.
inline constexpr int kSavedStateBytes = 64;

/// Kernels of one instruction set and dtype, widest block first.
struct BlockKernels {
  const BlockKernel* data = nullptr;
  int count = 0;
  const BlockKernel* begin() const { return data; }
  const BlockKernel* end() const { return data + count; }
};

/// For prefill: a row has the same bits with every kernel of a set. Empty: none for this dtype.
BlockKernels portable_kernels(DType);
BlockKernels avx512_kernels(DType);
BlockKernels avx512_bf16_kernels(DType);
BlockKernels amx_kernels(DType);
/// The source of the AMX kernels over the software tiles of amx_tiles.h, with plain and with
/// AVX-512 vectors; for tests.
BlockKernels amx_software_kernels(DType);
BlockKernels amx_software_avx512_kernels(DType);

/// For decode: few rows, bound by memory.
BlockKernels avx512_decode_kernels(DType);
BlockKernels avx512_bf16_decode_kernels(DType);

/// The kernels of `isa`, or of the best level below it that has kernels of its own for `dtype` in
/// this binary.
BlockKernels prefill_kernels(CpuIsa isa, DType dtype);
BlockKernels decode_kernels(CpuIsa isa, DType dtype);

/// Whether rows may be spread over several blocks of this kernel. Narrow ones are slower per lane.
bool may_take_several_blocks(const BlockKernel&);

/// The kernel of the set that leaves the fewest lanes empty, the widest of those; a narrow one only
/// if it holds all rows in one block.
const BlockKernel& choose_lanes(BlockKernels, int64_t rows);

}  // namespace qwen1m
