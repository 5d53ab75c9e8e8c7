#pragma once
/// Where an op on CUDA tensors runs: on their device, on torch's current stream of it.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "qwen1m/stream.h"

namespace qwen1m::binding {

/// Makes the device of a tensor current until the end of the scope.
class CudaScope {
 public:
  /// Throws qwen1m::Error if `tensor` is not a CUDA tensor, or if torch cannot name its stream:
  /// work never goes to the default stream instead, where it would race with torch's own.
  CudaScope(const char* op, const torch::stable::Tensor& tensor, const char* name);

  int device() const { return device_; }
  Stream stream() const { return stream_; }

 private:
  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_;
};

}  // namespace qwen1m::binding
