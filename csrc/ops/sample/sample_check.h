#pragma once
/// The rules of sample's arguments, for every backend.

#include <cmath>
#include <string>

#include "common/check.h"
#include "ops/sample/sample_rule.h"
#include "qwen1m/sample.h"

namespace qwen1m {

/// Shapes, dtypes and strides.
inline void check_sample_layout(const SampleParams& p) {
  ArgCheck args("sample");
  args.shape("logits", p.logits, {"batch", "vocab"});
  args.dense_from(1, "logits", p.logits);
  const int64_t vocab = args.size("vocab");
  args.require(vocab >= 1 && vocab <= kMaxSampleVocab, "logits",
               "vocab from 1 to " + std::to_string(kMaxSampleVocab), vocab);
  args.shape("token_ids", p.token_ids, {"batch"});
  args.separate_rows("token_ids", p.token_ids);
  if (p.logprobs) {
    args.shape("logprobs", p.logprobs, {"batch"});
    args.separate_rows("logprobs", p.logprobs);
  }
  if (p.history) {
    args.shape("history", p.history, {"batch", "vocab"});
    args.dense_from(1, "history", p.history);
    args.separate_rows("history", p.history);
  }
  if (static_cast<bool>(p.history) != static_cast<bool>(p.penalties) && p.logits.size(0) > 0) {
    args.fail("penalties", "history and penalties, or neither",
              p.history ? "history alone" : "penalties alone");
  }
  if (p.penalties) args.shape("penalties", p.penalties, {"batch", 3});
  args.shape("temperature", p.temperature, {"batch"});
  args.shape("top_k", p.top_k, {"batch"});
  args.shape("top_p", p.top_p, {"batch"});
  args.shape("min_p", p.min_p, {"batch"});
  args.shape("seed", p.seed, {"batch"});
  args.shape("position", p.position, {"batch"});
}

/// The settings lie on the host.
inline void check_sample_values(const SampleParams& p) {
  const ArgCheck args("sample");
  for (int64_t b = 0; b < p.logits.size(0); ++b) {
    const auto require = [&](bool ok, const char* name, const char* expected, float got) {
      args.require(ok, std::string(name) + "[" + std::to_string(b) + "]", expected, got);
    };
    const float temperature = *p.temperature.at(b), top_p = *p.top_p.at(b), min_p = *p.min_p.at(b);
    require(temperature >= 0 && std::isfinite(temperature), "temperature", "a number >= 0",
            temperature);
    require(top_p > 0 && top_p <= 1, "top_p", "a number in (0, 1]", top_p);
    require(min_p >= 0 && min_p <= 1, "min_p", "a number in [0, 1]", min_p);
    if (!p.penalties) continue;
    const float repetition = *p.penalties.at(b, 0);
    require(repetition > 0 && std::isfinite(repetition), "penalties", "a repetition penalty > 0",
            repetition);
    for (const int i : {1, 2}) {
      require(std::isfinite(*p.penalties.at(b, i)), "penalties", "finite numbers",
              *p.penalties.at(b, i));
    }
  }
}

}  // namespace qwen1m
