#pragma once
/// How tests call an emulated kernel: a C interface that ctypes can fill in, the same for every op.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <set>
#include <string>

#include "arch/emu/emulator.h"
#include "qwen1m/error.h"
#include "qwen1m/tensor_view.h"

/// In front of an entry point: found by its name, although all else is hidden.
#define Q1M_EMULATED_CALL extern "C" __attribute__((visibility("default")))

namespace qwen1m {

/// A tensor of the caller's. `storage` is what a kernel may touch, gaps included.
struct EmulatedTensor {
  void* data;
  int64_t dtype;  // 0 bfloat16, 1 float32, 2 float8_e4m3fn; looked at for tensors of any of them
  int64_t sizes[4];
  int64_t strides[4];  // in elements
  const void* storage;
  int64_t storage_bytes;

  template <typename T, int Rank>
  TensorView<T, Rank> typed() const {
    TensorView<T, Rank> view{.data = static_cast<T*>(data)};
    std::copy_n(sizes, Rank, view.sizes.begin());
    std::copy_n(strides, Rank, view.strides.begin());
    return view;
  }
  template <int Rank>
  AnyView<Rank> any() const {
    const auto view = typed<char, Rank>();
    return {data,
            dtype == 1   ? DType::kFloat32
            : dtype == 2 ? DType::kFloat8E4M3
                         : DType::kBFloat16,
            view.sizes, view.strides};
  }
};

struct EmulatedCall {
  int64_t architecture;  // 80 or 90
  int64_t seed;
  char* text;  // receives issues, one a line, or the error
  int64_t text_bytes;
};

/// Runs body(options) with all tensors known to the emulator, those in `written` writable. Returns
/// 0 when the report is clean, 1 with issues, 2 after an Error.
template <typename Body>
int run_emulated(const EmulatedCall& call, const EmulatedTensor* tensors, int count,
                 std::initializer_list<int> written, const Body& body) {
  std::set<const void*> registered;
  std::string text;
  int result = 0;
  try {
    for (int i = 0; i < count; ++i) {
      const EmulatedTensor& t = tensors[i];
      if (t.storage == nullptr || t.storage_bytes == 0 || !registered.insert(t.storage).second) {
        continue;
      }
      arch::emu::register_global(t.storage, static_cast<size_t>(t.storage_bytes),
                                 "argument " + std::to_string(i),
                                 std::find(written.begin(), written.end(), i) != written.end());
    }
    const arch::emu::Report report = body({.seed = static_cast<uint64_t>(call.seed)});
    text = report.text();
    result = report.ok() ? 0 : 1;
  } catch (const Error& error) {
    text = error.what();
    result = 2;
  }
  for (const void* storage : registered) arch::emu::unregister_global(storage);
  if (call.text_bytes > 0) {
    const size_t length = std::min(text.size(), static_cast<size_t>(call.text_bytes) - 1);
    memcpy(call.text, text.data(), length);
    call.text[length] = '\0';
  }
  return result;
}

/// Runs a kernel struct that says its own shape, as arch::launch_after_prior_grid does on a GPU.
template <typename Kernel>
arch::emu::Report emulate_kernel(const typename Kernel::Params& params,
                                 const arch::emu::Options& options) {
  if (Kernel::blocks(params) == 0) {  // nothing is launched
    arch::emu::Report nothing_to_do;
    nothing_to_do.completed = true;
    return nothing_to_do;
  }
  return arch::emu::launch(
      {.blocks = Kernel::blocks(params),
       .threads = Kernel::threads(params),
       .cluster_size = arch::cluster_of<Kernel>(),
       .shared_bytes = sizeof(typename Kernel::Smem)},
      [&] { Kernel::run(params); }, options);
}

}  // namespace qwen1m
