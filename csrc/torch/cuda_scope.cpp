#include "cuda_scope.h"

#include <dlfcn.h>

#include <string>

#include "common/check.h"
#include "qwen1m/error.h"

// Only torch built with CUDA has this function (libtorch_cuda.so), and the library has to load into
// a CPU torch too: the reference is weak, null where torch has no CUDA.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                            void** ret_stream);

namespace qwen1m::binding {
namespace {

using StreamFunction = int32_t (*)(int32_t, void**);

/// Null if no CUDA torch is in the process.
StreamFunction stream_function() {
  if (StreamFunction function = &aoti_torch_get_current_cuda_stream) return function;
  // The dynamic linker looked among the libraries known when ours was loaded; ask for the one.
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  return reinterpret_cast<StreamFunction>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

int device_of(const char* op, const torch::stable::Tensor& tensor, const char* name) {
  if (!tensor.is_cuda()) fail_argument(op, name, "a CUDA tensor", "a tensor of another device");
  return tensor.get_device_index();
}

Stream current_stream(const char* op, int device) {
  const StreamFunction function = stream_function();
  if (function == nullptr) {
    throw Error(std::string(op) +
                ": expected a torch that was built with CUDA, got one without "
                "aoti_torch_get_current_cuda_stream: its current stream is not known");
  }
  Stream stream = nullptr;
  if (function(device, &stream) != 0) {
    throw Error(std::string(op) +
                ": torch does not tell its current stream of cuda:" + std::to_string(device));
  }
  return stream;
}

}  // namespace

CudaScope::CudaScope(const char* op, const torch::stable::Tensor& tensor, const char* name)
    : device_(device_of(op, tensor, name)), guard_(device_), stream_(current_stream(op, device_)) {}

}  // namespace qwen1m::binding
