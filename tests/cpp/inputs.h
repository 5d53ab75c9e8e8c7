#pragma once
/// Inputs and outputs of op tests: reproducible numbers, strided storage, threads.

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "qwen1m/parallel_for.h"
#include "qwen1m/tensor_view.h"

namespace qwen1m::test {

/// Numbers in [-1, 1), the same on every platform (Knuth's MMIX linear congruential generator).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) { next(); }
  float uniform() { return static_cast<float>(static_cast<int32_t>(next() >> 32)) * 0x1p-31f; }

 private:
  uint64_t next() { return state_ = state_ * 6364136223846793005u + 1442695040888963407u; }
  uint64_t state_;
};

/// `count` elements of T, uniform in [-scale, scale).
template <typename T>
std::vector<T> random_values(int64_t count, uint64_t seed, float scale = 1.0f) {
  Random random(seed);
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) value = T(scale * random.uniform());
  return values;
}

template <typename T>
constexpr DType dtype_of() {
  return sizeof(T) == 4 ? DType::kFloat32 : DType::kBFloat16;
}

/// A view of dense rows `row_stride` elements apart (0: no gap) over data.
template <typename T, size_t Rank>
AnyView<static_cast<int>(Rank)> view(std::vector<T>& data, const int64_t (&sizes)[Rank],
                                     int64_t row_stride = 0) {
  AnyView<static_cast<int>(Rank)> result;
  result.data = data.data();
  result.dtype = dtype_of<T>();
  int64_t stride = 1;
  for (size_t i = Rank; i-- > 0;) {
    result.sizes[i] = sizes[i];
    result.strides[i] = stride;
    stride *= sizes[i];
  }
  if (row_stride != 0) result.strides[0] = row_stride;
  return result;
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

/// FNV-1a of the bytes: pins results that must not depend on the instruction set or the platform.
template <typename T>
uint64_t fingerprint(const std::vector<T>& values, uint64_t hash = 14695981039346656037u) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  for (size_t i = 0; i < values.size() * sizeof(T); ++i) hash = (hash ^ bytes[i]) * 1099511628211u;
  return hash;
}

/// A pool that starts its threads anew for each call.
inline ParallelFor threads(int workers) {
  ParallelFor result;
  result.max_workers = workers;
  result.launch = [](int count, void (*body)(void*, int), void* context) {
    std::vector<std::thread> pool;
    for (int worker = 1; worker < count; ++worker) pool.emplace_back(body, context, worker);
    body(context, 0);
    for (std::thread& thread : pool) thread.join();
  };
  return result;
}

}  // namespace qwen1m::test
