#pragma once

#include "qwen1m/parallel_for.h"
#include "qwen1m/stream.h"
#include "qwen1m/tensor_view.h"

namespace qwen1m {

/// The next token of every sequence of a batch, from its logits, in one launch:
///   a = logits; where the token is in the prompt or the output and repetition != 1:
///       a = a > 0 ? a / repetition : a repetition
///   where it is in the output `count` times: a = a - (frequency count + presence)
///   temperature 0: the token of the largest a, the lowest id of several
///   else a draw from softmax(a / temperature), of which stay, in this order and as in vLLM,
///     min_p: tokens of at least min_p times the largest probability;
///     top_k: the first k in descending order of a, lower ids first among equals;
///     top_p: of these the fewest, in that order, whose share of their sum reaches top_p.
/// logprobs: log softmax of the logits as they came (no penalties, no temperature).
///
/// The draw is a function of (seed, position) and the row alone: Philox4x32-10 (Salmon et al.,
/// "Parallel random numbers: as easy as 1, 2, 3", SC11), counted by position. Weights are integers,
/// so sums do not depend on their order and every backend draws the same token from the same
/// logits. A weight is a softmax numerator rounded to 2^-44 of the largest and exact to 4e-6 of
/// itself (docs/numerics.md): tokens e^-30 times as likely as the likeliest are never drawn.
///
/// A row with a NaN, or whose largest a is infinite, yields token -1 and logprob NaN.
struct SampleParams {
  TensorView<int64_t, 1> token_ids;  // [batch] written
  TensorView<float, 1> logprobs;     // [batch] written; data null: not wanted
  TensorView<int32_t, 2> history;  // [batch, vocab] 2 count + (1 if in the prompt); the token's is
                                   // raised by 2; last dim contiguous; data null: no penalties
  AnyView<2> logits;               // [batch, vocab] fp32 or bf16, last dim contiguous
  TensorView<const float, 1> temperature;  // [batch], >= 0
  TensorView<const int64_t, 1> top_k;      // [batch]; <= 0 or >= vocab: all
  TensorView<const float, 1> top_p;        // [batch], in (0, 1]
  TensorView<const float, 1> min_p;        // [batch], in [0, 1]
  TensorView<const float, 2> penalties;    // [batch, 3] repetition > 0, presence, frequency; with
                                           // history
  TensorView<const int64_t, 1> seed;       // [batch]
  TensorView<const int64_t, 1> position;  // [batch] index of the token to be drawn; any number that
                                          // is another one for each draw of a seed
};

/// Throws qwen1m::Error on a shape, dtype or stride that does not fit, vocab above 2^19 and values
/// outside of the ranges above; nothing is written then.
void sample_cpu(const SampleParams&, const ParallelFor&);

/// sm_80 and later: rows of logits and history aligned to 16 bytes. All data lie on the current
/// device; values are not checked, because that would stop the stream: a temperature <= 0 is
/// greedy, top_p and min_p beyond their ranges are taken as the nearer end. Asynchronous; nothing
/// is allocated. Throws as above, and on a launch that fails.
void sample_cuda(const SampleParams&, Stream);

}  // namespace qwen1m
