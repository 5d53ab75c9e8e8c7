#pragma once
/// The queue that a GPU function puts its work into.

namespace qwen1m {

/// A cudaStream_t, without its header. The work belongs to the device of the stream, which the
/// caller has made current; null is CUDA's default stream.
using Stream = void*;

}  // namespace qwen1m
