#pragma once
/// embedding on sm_80 and later, fp32 and bf16 alike: a block copies a piece of one row. Compiled
/// and emulated, not yet run on a GPU.

#include "arch/arch.h"
#include "common/vectors.h"
#include "ops/embedding/embedding_check.h"

namespace qwen1m {

struct EmbeddingKernel {
  static constexpr int kThreads = 128;
  static constexpr int kVectors = 4;  // per thread
  static constexpr int kPiece = kThreads * kVectors;

  struct Params {
    EmbeddingParams args;
    int64_t elem_bytes;
    int vectors;      // of a row
    uint32_t pieces;  // of a row
  };
  struct Smem {};

  static Params params_of(const EmbeddingParams& p) {
    const int64_t elem_bytes = element_size(p.out.dtype);
    const auto vectors = static_cast<int>(p.out.size(1) * elem_bytes / 16);
    return {p, elem_bytes, vectors, static_cast<uint32_t>((vectors + kPiece - 1) / kPiece)};
  }
  static int64_t blocks(const Params& p) { return p.args.out.size(0) * p.pieces; }
  static int threads(const Params&) { return kThreads; }

  static Q1M_DEVICE void run(const Params& p) {
    arch::wait_for_prior_grid();
    arch::launch_dependents();
    const auto block = static_cast<uint32_t>(arch::block_index());
    const int64_t token = block / p.pieces;
    const int first = static_cast<int>(block % p.pieces) * kPiece + arch::thread_index();
    const int64_t id = arch::global_load(p.args.token_ids.at(token));
    const bool exists = id >= 0 && id < p.args.weight.size(0);
    const char* from = static_cast<const char*>(p.args.weight.data) +
                       (exists ? id : 0) * p.args.weight.stride(0) * p.elem_bytes;
    char* to = static_cast<char*>(p.args.out.data) + token * p.args.out.stride(0) * p.elem_bytes;
    arch::Vec16 row[kVectors];
    Q1M_UNROLL
    for (int i = 0; i < kVectors; ++i) {  // the words are NaN in fp32 and in bf16
      row[i] = {{0x7fc07fc0, 0x7fc07fc0, 0x7fc07fc0, 0x7fc07fc0}};
      if (const int at = first + i * kThreads; exists && at < p.vectors) {
        row[i] = arch::global_load(vector_at(from, at));
      }
    }
    Q1M_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      if (const int at = first + i * kThreads; at < p.vectors) {
        arch::global_store(vector_at(to, at), row[i]);
      }
    }
  }
};

/// What the kernel demands beyond the op's contract; ids are not read.
inline void check_embedding_gpu(const EmbeddingParams& p) {
  check_embedding_layout(p);
  const ArgCheck args("embedding");
  require_aligned_rows(args, "out", p.out);
  require_aligned_rows(args, "weight", p.weight);
  const int64_t row_bytes = p.out.size(1) * element_size(p.out.dtype);
  args.require(row_bytes % 16 == 0, "out", "rows of a multiple of 16 bytes on a GPU", row_bytes);
}

}  // namespace qwen1m
