#pragma once
/// Timing of kernels without torch: buffers, cold L2, percentiles, one line and one JSON row a
/// case.
///
///   bench --json FILE [--ceiling TFLOPS] [--runs N]
///
/// Each run is timed by two events around it; before it a buffer larger than the L2 cache is
/// overwritten, so that inputs come from memory as in a model, where other layers ran in between.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "arch/cuda/host.h"
#include "qwen1m/dtypes.h"
#include "qwen1m/error.h"

namespace qwen1m::bench {

/// Device memory, uninitialised.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : count_(count) {
    Q1M_CUDA_CHECK(cudaMalloc(&data_, static_cast<size_t>(bytes())));
  }
  explicit Buffer(const std::vector<T>& values) : Buffer(static_cast<int64_t>(values.size())) {
    Q1M_CUDA_CHECK(
        cudaMemcpy(data_, values.data(), static_cast<size_t>(bytes()), cudaMemcpyHostToDevice));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }

  T* data() const { return static_cast<T*>(data_); }
  int64_t count() const { return count_; }
  int64_t bytes() const { return count_ * static_cast<int64_t>(sizeof(T)); }

 private:
  void* data_ = nullptr;
  int64_t count_;
};

/// Normally distributed bf16 (zeros run at higher clocks): one random megabyte, again and again.
inline void fill_normal(const Buffer<bf16>& buffer, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<bf16> block(512 * 1024);
  for (bf16& value : block) value = bf16(normal(generator));
  const auto block_count = static_cast<int64_t>(block.size());
  for (int64_t done = 0; done < buffer.count(); done += block_count) {
    const int64_t count = std::min(block_count, buffer.count() - done);
    Q1M_CUDA_CHECK(cudaMemcpy(buffer.data() + done, block.data(),
                              static_cast<size_t>(count) * sizeof(bf16), cudaMemcpyHostToDevice));
  }
}

struct Microseconds {
  double p10, p50, p90;
  int runs;
};

/// Times `work(stream)`: 3 runs to warm up, then `runs` of them with a cold L2 cache.
template <typename Work>
Microseconds time_cold(const Work& work, int runs) {
  constexpr int64_t kFlushBytes = int64_t{256} << 20;
  static Buffer<uint8_t> flush(kFlushBytes);
  cudaStream_t stream;
  Q1M_CUDA_CHECK(cudaStreamCreate(&stream));
  cudaEvent_t begin, end;
  Q1M_CUDA_CHECK(cudaEventCreate(&begin));
  Q1M_CUDA_CHECK(cudaEventCreate(&end));
  for (int i = 0; i < 3; ++i) work(stream);
  std::vector<double> times;
  for (int i = 0; i < runs; ++i) {
    Q1M_CUDA_CHECK(cudaMemsetAsync(flush.data(), i, kFlushBytes, stream));
    Q1M_CUDA_CHECK(cudaEventRecord(begin, stream));
    work(stream);
    Q1M_CUDA_CHECK(cudaEventRecord(end, stream));
    Q1M_CUDA_CHECK(cudaEventSynchronize(end));
    float milliseconds = 0;
    Q1M_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    times.push_back(1e3 * static_cast<double>(milliseconds));
  }
  Q1M_CUDA_CHECK(cudaEventDestroy(begin));
  Q1M_CUDA_CHECK(cudaEventDestroy(end));
  Q1M_CUDA_CHECK(cudaStreamDestroy(stream));
  std::sort(times.begin(), times.end());
  const auto at = [&](double share) {
    return times[static_cast<size_t>(share * static_cast<double>(times.size() - 1) + 0.5)];
  };
  return {at(0.1), at(0.5), at(0.9), runs};
}

/// A device copy, against which shares are stated: bytes read and bytes written.
struct Copy {
  Microseconds us;
  int64_t bytes;
  double gb_per_s;
};
inline Copy time_copy(int runs) {
  const Buffer<bf16> from(int64_t{1} << 28), to(from.count());  // 512 MB each way
  fill_normal(from, 1);
  const Microseconds us = time_cold(
      [&](cudaStream_t stream) {
        Q1M_CUDA_CHECK(cudaMemcpyAsync(to.data(), from.data(), static_cast<size_t>(from.bytes()),
                                       cudaMemcpyDeviceToDevice, stream));
      },
      runs);
  return {us, 2 * from.bytes(), 2 * static_cast<double>(from.bytes()) / us.p50 * 1e-3};
}

struct Options {
  std::string json;
  double ceiling_tflops = 0;  // of a plain matrix product, measured elsewhere; 0: not known
  int runs = 20;
};

inline double parse_number(const std::string& name, const std::string& value) {
  try {
    size_t end = 0;
    const double number = std::stod(value, &end);
    if (end == value.size()) return number;
  } catch (const std::logic_error&) {  // no number, or none that a double holds
  }
  throw Error("options: expected a number for " + name + ", got " + value);
}

inline Options parse_options(int argc, char** argv) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i], value = argv[i + 1];
    if (name == "--json") {
      options.json = value;
    } else if (name == "--ceiling") {
      options.ceiling_tflops = parse_number(name, value);
    } else if (name == "--runs") {
      options.runs = static_cast<int>(std::clamp(parse_number(name, value), 1.0, 1e6));
    } else {
      throw Error("options: expected --json FILE, --ceiling TFLOPS or --runs N, got " + name);
    }
  }
  if (argc % 2 == 0) throw Error(std::string("options: no value for ") + argv[argc - 1]);
  return options;
}

/// The rows of one program and the GPU they are from, written at the end.
class Report {
 public:
  explicit Report(const Options& options) : options_(options) {
    int devices = 0;
    if (const cudaError_t error = cudaGetDeviceCount(&devices); error != cudaSuccess) {
      throw Error(std::string("needs a GPU: ") + cudaGetErrorString(error));
    }
    cudaDeviceProp properties;
    int device = 0;
    Q1M_CUDA_CHECK(cudaGetDevice(&device));
    Q1M_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    int driver = 0, runtime = 0;
    Q1M_CUDA_CHECK(cudaDriverGetVersion(&driver));
    Q1M_CUDA_CHECK(cudaRuntimeGetVersion(&runtime));
    environment_ = std::string("{\"gpu\": \"") + properties.name +
                   "\", \"sms\": " + std::to_string(properties.multiProcessorCount) +
                   ", \"driver\": " + std::to_string(driver) +
                   ", \"runtime\": " + std::to_string(runtime) +
                   ", \"ceiling_tflops\": " + std::to_string(options.ceiling_tflops) + "}";
  }

  /// `fields` is the inside of a JSON object: what was done.
  void add(const std::string& fields, const Microseconds& us, const char* rate_name, double rate) {
    char text[256];
    std::snprintf(text, sizeof(text),
                  ", \"us_p10\": %.2f, \"us_p50\": %.2f, \"us_p90\": %.2f, \"runs\": %d, "
                  "\"%s\": %.2f",
                  us.p10, us.p50, us.p90, us.runs, rate_name, rate);
    rows_.push_back("{" + fields + text + "}");
  }

  /// Returns the program's exit status.
  int write() const {
    if (options_.json.empty()) return 0;
    std::ofstream file(options_.json);
    file << "{\"environment\": " << environment_ << ",\n \"rows\": [";
    for (size_t i = 0; i < rows_.size(); ++i) file << (i == 0 ? "\n  " : ",\n  ") << rows_[i];
    file << "\n ]}\n";
    if (file.flush()) return 0;
    std::fprintf(stderr, "cannot write %s\n", options_.json.c_str());
    return 1;
  }

 private:
  Options options_;
  std::string environment_;
  std::vector<std::string> rows_;
};

/// main(): errors become one line and status 1.
template <typename Body>
int run(int argc, char** argv, const Body& body) {
  try {
    const Options options = parse_options(argc, argv);
    Report report(options);
    body(options, report);
    return report.write();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argv[0], error.what());
    return 1;
  }
}

}  // namespace qwen1m::bench
