#pragma once
/// The rules of embedding's arguments, for every backend.

#include <string>

#include "common/check.h"
#include "qwen1m/embedding.h"

namespace qwen1m {

/// Shapes, dtypes and strides.
inline void check_embedding_layout(const EmbeddingParams& p) {
  ArgCheck args("embedding");
  args.shape("out", p.out, {"tokens", "hidden"});
  args.dense_from(1, "out", p.out);
  args.separate_rows("out", p.out);
  args.shape("weight", p.weight, {"vocab", "hidden"});
  args.same_dtype("weight", p.weight, "out", p.out);
  args.dense_from(1, "weight", p.weight);
  args.shape("token_ids", p.token_ids, {"tokens"});
}

/// The ids lie on the host.
inline void check_embedding_values(const EmbeddingParams& p) {
  for (int64_t t = 0; t < p.token_ids.size(0); ++t) {
    const int64_t id = *p.token_ids.at(t), vocab = p.weight.size(0);
    if (id >= 0 && id < vocab) continue;
    ArgCheck("embedding")
        .fail("token_ids[" + std::to_string(t) + "]",
              "an id in [0, vocab=" + std::to_string(vocab) + ")", std::to_string(id));
  }
}

}  // namespace qwen1m
