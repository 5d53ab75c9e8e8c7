// CPU backend of embedding: a copy of whole rows.
#include <cstring>

#include "common/rows.h"
#include "ops/embedding/embedding_check.h"

namespace qwen1m {

void embedding_cpu(const EmbeddingParams& p, const ParallelFor& parallel_for) {
  check_embedding_layout(p);
  check_embedding_values(p);
  const int64_t elem = element_size(p.out.dtype);
  const auto bytes = static_cast<size_t>(p.out.size(1) * elem);
  auto* const out = static_cast<char*>(p.out.data);
  const auto* const weight = static_cast<const char*>(p.weight.data);
  for_each_row(parallel_for, p.out.size(0), p.out.size(1), [&](int64_t t) {
    std::memcpy(out + t * p.out.stride(0) * elem,
                weight + *p.token_ids.at(t) * p.weight.stride(0) * elem, bytes);
  });
}

}  // namespace qwen1m
