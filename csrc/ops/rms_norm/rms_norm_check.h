#pragma once
/// The rules of rms_norm's arguments, for every backend.

#include "common/check.h"
#include "qwen1m/rms_norm.h"

namespace qwen1m {

inline void check_rms_norm(const RmsNormParams& p) {
  ArgCheck args("rms_norm");
  args.shape("x", p.x, {"tokens", "hidden"});
  args.dense_from(1, "x", p.x);
  args.shape("out", p.out, {"tokens", "hidden"});
  args.same_dtype("out", p.out, "x", p.x);
  args.dense_from(1, "out", p.out);
  args.separate_rows("out", p.out);
  args.shape("weight", p.weight, {"hidden"});
  args.same_dtype("weight", p.weight, "x", p.x);
  args.dense_from(0, "weight", p.weight);
  if (p.residual) {
    args.shape("residual", p.residual, {"tokens", "hidden"});
    args.same_dtype("residual", p.residual, "x", p.x);
    args.dense_from(1, "residual", p.residual);
    args.separate_rows("residual", p.residual);
  }
  args.require(p.eps > 0, "eps", "a number > 0", p.eps);
}

}  // namespace qwen1m
