#pragma once

#include "qwen1m/sparse_plan.h"

namespace qwen1m {

/// Throws qwen1m::Error on the first argument that does not fit the contract; nothing has been
/// written then.
void check_sparse_plan(const SparsePlanParams&);
/// The part that reads no tensor: for arguments whose data lie on a GPU.
void check_sparse_plan_layout(const SparsePlanParams&);

}  // namespace qwen1m
