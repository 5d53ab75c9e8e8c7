#include "tensor_match.h"

#include <torch/headeronly/core/ScalarType.h>

#include <span>

namespace qwen1m::binding {

std::string scalar_type_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(type);
  }
}

void TensorMatch::check(const torch::stable::Tensor& tensor, const char* name, const char* dims,
                        int rank) const {
  if (cuda_device_ == kCpu) {
    if (!tensor.is_cpu()) fail_argument(op_, name, "a CPU tensor", "a tensor of another device");
  } else if (!tensor.is_cuda() || tensor.get_device_index() != cuda_device_) {
    fail_argument(op_, name, "a tensor on cuda:" + std::to_string(cuda_device_),
                  tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index())
                                   : "a tensor of another device");
  }
  const auto sizes = tensor.sizes();
  if (tensor.dim() != rank) {
    fail_argument(op_, name, std::string("shape ") + dims,
                  shape_text(std::span<const int64_t>(sizes.data(), sizes.size())));
  }
}

}  // namespace qwen1m::binding
