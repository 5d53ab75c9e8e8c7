#pragma once
/// Everything the kernel library offers.

#include "qwen1m/decode_attention.h"
#include "qwen1m/dtypes.h"
#include "qwen1m/dual_chunk.h"
#include "qwen1m/embedding.h"
#include "qwen1m/error.h"
#include "qwen1m/parallel_for.h"
#include "qwen1m/prefill_attention.h"
#include "qwen1m/qkv_rope_append.h"
#include "qwen1m/rms_norm.h"
#include "qwen1m/sample.h"
#include "qwen1m/sparse_estimate.h"
#include "qwen1m/sparse_plan.h"
#include "qwen1m/sparse_prefill.h"
#include "qwen1m/stream.h"
#include "qwen1m/swiglu.h"
#include "qwen1m/tensor_view.h"
