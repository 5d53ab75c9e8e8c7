// The conformance tests on a GPU of sm_90a. Prints "<primitive>: ok" or "FAILED" lines, and JSON
// with
// --json FILE. The exit code is the number of primitives that failed; 77 without such a GPU.

#include <cuda_runtime.h>

#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "arch/cuda/host.h"
#include "conformance.cuh"
#include "qwen1m/error.h"

namespace qwen1m::conformance {
namespace {

template <typename Probe>
__global__ void __launch_bounds__(Probe::kThreads, 1) entry(const __grid_constant__ Params p) {
  Probe::run(p);
}

/// Device memory of some words.
class Buffer {
 public:
  explicit Buffer(size_t words) : words_(words) { Q1M_CUDA_CHECK(cudaMalloc(&data_, words * 4)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }

  uint32_t* data() const { return static_cast<uint32_t*>(data_); }
  void put(const std::vector<uint32_t>& from) {
    Q1M_CUDA_CHECK(cudaMemcpy(data_, from.data(), from.size() * 4, cudaMemcpyHostToDevice));
  }
  std::vector<uint32_t> get() const {
    std::vector<uint32_t> to(words_);
    Q1M_CUDA_CHECK(cudaMemcpy(to.data(), data_, words_ * 4, cudaMemcpyDeviceToHost));
    return to;
  }

 private:
  void* data_ = nullptr;
  size_t words_;
};

/// Empty if the case is as expected.
template <typename Probe>
std::string run_case(const Case& test) {
  Buffer in(test.in.size());
  Buffer out(test.expected.size());
  in.put(test.in);
  out.put(test.out_start.empty() ? std::vector<uint32_t>(test.expected.size(), kUntouched)
                                 : test.out_start);
  Params params{};
  params.in = in.data();
  params.out = out.data();
  for (size_t i = 0; i < test.argument.size(); ++i) params.argument[i] = test.argument[i];
  if (test.has_map) {
    TensorMapSpec spec = test.map;
    spec.base = test.map_is_of_out ? out.data() : in.data();
    params.map = make_tensor_map(spec);
  }
  LaunchConfig config;
  config.name = Probe::kName;
  config.blocks = Probe::kBlocks;
  config.threads = Probe::kThreads;
  // shared_memory() begins at a multiple of 1,024 bytes.
  config.shared_bytes = sizeof(typename Probe::Layout);
  config.cluster = Probe::kCluster;
  launch(entry<Probe>, config, params);
  Q1M_CUDA_CHECK(cudaDeviceSynchronize());
  const std::vector<uint32_t> got = out.get();
  const int64_t at = first_difference(test, got);
  if (at < 0) return "";
  char text[128];
  std::snprintf(text, sizeof(text), "word %lld: expected 0x%08x, got 0x%08x",
                static_cast<long long>(at), test.expected[static_cast<size_t>(at)],
                got[static_cast<size_t>(at)]);
  return test.name + (test.name.empty() ? "" : ": ") + text;
}

constexpr int kMaxFailed = 76;  // as an exit code

int run_all(const char* json_path) {
  int failed = 0;
  std::string json;
  for_each_probe([&](auto tag) {
    using Probe = typename decltype(tag)::Type;
    std::string error;
    size_t count = 0;
    try {
      for (const Case& test : Probe::cases()) {
        ++count;
        error = run_case<Probe>(test);
        if (!error.empty()) break;
      }
    } catch (const std::exception& exception) {
      error = exception.what();
    }
    if (error.empty() && count == 0) error = "no cases";
    failed += error.empty() ? 0 : 1;
    std::printf("%s: %s\n", Probe::kName, error.empty() ? "ok" : ("FAILED " + error).c_str());
    std::fflush(stdout);
    json += std::string(json.empty() ? "" : ",\n") + "    {\"primitive\": \"" + Probe::kName +
            "\", \"cases\": " + std::to_string(count) + ", \"error\": \"" + error + "\"}";
  });
  if (json_path != nullptr) {
    cudaDeviceProp device{};
    Q1M_CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
    std::FILE* file = std::fopen(json_path, "w");
    if (file == nullptr) throw Error(std::string("--json: cannot write ") + json_path);
    std::fprintf(file, "{\n  \"device\": \"%s\",\n  \"primitives\": [\n%s\n  ]\n}\n", device.name,
                 json.c_str());
    std::fclose(file);
  }
  return failed < kMaxFailed ? failed : kMaxFailed;
}

}  // namespace
}  // namespace qwen1m::conformance

constexpr int kSkipped = 77;  // SKIP_RETURN_CODE in CMakeLists.txt

int main(int argc, char** argv) {
  const bool has_json = argc == 3 && std::string(argv[1]) == "--json";
  if (argc != 1 && !has_json) {
    std::fprintf(stderr, "usage: %s [--json FILE]\n", argv[0]);
    return 2;
  }
  try {
    const int capability = qwen1m::arch::device_facts().capability;
    if (capability != 90) throw qwen1m::Error("capability is " + std::to_string(capability));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "skipped: no GPU of sm_90 (%s)\n", error.what());
    return kSkipped;
  }
  try {
    return qwen1m::conformance::run_all(has_json ? argv[2] : nullptr);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
