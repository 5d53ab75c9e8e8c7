// What one core of this machine can do, to read bench/results/cpu/attention_*.json against: fused
// multiply-adds in fp32, dot products of bf16 pairs, bytes read from memory.
//
//   g++ -O2 -std=c++20 -mavx512f -mavx512bf16 bench/cpu_peak.cpp -o cpu_peak -pthread && ./cpu_peak
//
// Best of 7 runs each. With other load on the machine, believe the largest figure of several calls.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

template <typename F>
double best_seconds(F&& f) {
  double best = 1e9;
  for (int run = 0; run < 7; ++run) {
    const auto start = std::chrono::steady_clock::now();
    f();
    best = std::min(
        best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

volatile float sink;

/// 24 independent chains: more than the latency of any unit needs.
template <typename Step>
double steps_per_second(Step&& step) {
  constexpr int kChains = 24, kRounds = 2'000'000;
  const double seconds = best_seconds([&] {
    __m512 chains[kChains];
    // Unknown and different starts, or the compiler would compute one chain for all.
    for (__m512& chain : chains) chain = _mm512_set1_ps(static_cast<float>(std::rand()));
    for (int round = 0; round < kRounds; ++round) {
#pragma GCC unroll 24
      for (__m512& chain : chains) chain = step(chain);
    }
    for (const __m512& chain : chains) sink = chain[0];
  });
  return double{kChains} * kRounds / seconds;
}

double read_bytes_per_second(int threads) {
  constexpr size_t kFloats = size_t{1} << 28;  // 1 GiB, beyond any cache
  static std::vector<float> memory(kFloats, 1.0f);
  const double seconds = best_seconds([&] {
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t) {
      pool.emplace_back([&, t] {
        const size_t n = kFloats / static_cast<size_t>(threads);
        const float* p = memory.data() + n * static_cast<size_t>(t);
        __m512 sums[4] = {};
        for (size_t i = 0; i < n; i += 64) {
          for (size_t j = 0; j < 4; ++j) {
            sums[j] = _mm512_add_ps(sums[j], _mm512_loadu_ps(p + i + 16 * j));
          }
        }
        const __m512 sum = sums[0] + sums[1] + sums[2] + sums[3];
        sink = sum[0];
      });
    }
    for (std::thread& thread : pool) thread.join();
  });
  return 4.0 * kFloats / seconds;
}

}  // namespace

int main() {
  const __m512 x = _mm512_set1_ps(static_cast<float>(std::rand()) * 0.0f);
  std::printf("fp32 fused multiply-add: %.0f GFLOP/s per core\n",
              32e-9 * steps_per_second([&](__m512 c) { return _mm512_fmadd_ps(x, x, c); }));
  std::printf("bf16 pair dot product:   %.0f GFLOP/s per core\n",
              64e-9 * steps_per_second(
                          [&](__m512 c) { return _mm512_dpbf16_ps(c, (__m512bh)x, (__m512bh)x); }));
  for (int threads = 1; threads <= static_cast<int>(std::thread::hardware_concurrency());
       threads *= 2) {
    std::printf("memory read, %d threads:  %.1f GB/s\n", threads,
                1e-9 * read_bytes_per_second(threads));
  }
}
