#pragma once

#include "qwen1m/parallel_for.h"
#include "qwen1m/stream.h"
#include "qwen1m/tensor_view.h"

namespace qwen1m {

/// Rows of a table: out[t] = weight[token_ids[t]], copied bit for bit.
struct EmbeddingParams {
  AnyView<2> out;                          // [tokens, hidden] fp32 or bf16, last dim contiguous
  AnyView<2> weight;                       // [vocab, hidden] as out
  TensorView<const int64_t, 1> token_ids;  // [tokens], in [0, vocab)
};

/// Throws qwen1m::Error on a shape, dtype or stride that does not fit, and on an id outside of the
/// table before anything is written.
void embedding_cpu(const EmbeddingParams&, const ParallelFor&);

/// sm_80 and later: rows of a multiple of 16 bytes, aligned to 16 bytes. All data lie on the
/// current device; ids are not checked, because that would stop the stream: the row of an id
/// outside of the table becomes NaN. Asynchronous. Throws as above, and on a launch that fails.
void embedding_cuda(const EmbeddingParams&, Stream);

}  // namespace qwen1m
