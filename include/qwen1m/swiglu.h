#pragma once

#include "qwen1m/parallel_for.h"
#include "qwen1m/stream.h"
#include "qwen1m/tensor_view.h"

namespace qwen1m {

/// Gated linear unit with SiLU: out = gate * sigmoid(gate) * up, computed in fp32, rounded once.
/// Source: arXiv:2002.05202.
struct SwigluParams {
  AnyView<2> out;      // [tokens, intermediate] fp32 or bf16, last dim contiguous
  AnyView<2> gate_up;  // [tokens, 2 * intermediate] as out: the gate columns, then the up columns
};

/// Throws qwen1m::Error on a shape, dtype or stride that does not fit.
void swiglu_cpu(const SwigluParams&, const ParallelFor&);

/// sm_80 and later: bf16, intermediate a multiple of 8, rows aligned to 16 bytes. All data lie on
/// the current device. Asynchronous. Throws as above, and on a launch that fails.
void swiglu_cuda(const SwigluParams&, Stream);

}  // namespace qwen1m
