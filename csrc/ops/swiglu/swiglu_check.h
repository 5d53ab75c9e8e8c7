#pragma once
/// The rules of swiglu's arguments, for every backend.

#include "common/check.h"
#include "qwen1m/swiglu.h"

namespace qwen1m {

inline void check_swiglu(const SwigluParams& p) {
  ArgCheck args("swiglu");
  args.shape("out", p.out, {"tokens", "intermediate"});
  args.dense_from(1, "out", p.out);
  args.separate_rows("out", p.out);
  args.shape("gate_up", p.gate_up, {"tokens", {"2 intermediate", 2 * args.size("intermediate")}});
  args.same_dtype("gate_up", p.gate_up, "out", p.out);
  args.dense_from(1, "gate_up", p.gate_up);
}

}  // namespace qwen1m
