#pragma once
/// wgmma: layouts of operands in shared memory and of fragments, accumulation. Small integers, so
/// that every sum is exact.

#include "conformance_case.h"
#include "conformance_copy.cuh"

namespace qwen1m::conformance {

/// How an operand of 32 summed elements lies in shared memory (9.7.15.5.1 of the PTX manual).
struct OperandLayout {
  int rows;     // of A, or columns of B
  int swizzle;  // 0, 32, 64, 128
  Major major;

  size_t width() const { return swizzle == 0 ? 16 : static_cast<size_t>(swizzle); }
  size_t columns() const { return width() / 2; }  // elements of a row of the atom

  /// Strides with gaps, so that a wrong one is seen. Atoms stay aligned to 8 rows.
  size_t stride() const { return 8 * width() + (swizzle == 0 ? 16 : 8 * width()); }
  size_t leading() const {
    if (major == Major::kK) return swizzle == 0 ? groups_of_8() * stride() + 32 : 16;
    return 4 * stride() + 8 * width();  // past the 4 8-row groups of k
  }
  size_t groups_of_8() const { return static_cast<size_t>(rows) / 8; }
  /// K-major: from the atoms of the first columns() summed elements to those of the next.
  size_t slab() const { return groups_of_8() * stride(); }

  size_t byte(size_t mn, size_t k) const {
    if (swizzle == 0) {  // core matrices of 8 rows of 16 bytes
      return mn / 8 * stride() + k / 8 * leading() + mn % 8 * 16 + k % 8 * 2;
    }
    if (major == Major::kK) {
      const size_t start = k / columns() * slab() + mn / 8 * stride();
      return start + tile_byte(swizzle, width(), mn % 8, k % columns() * 2);
    }
    const size_t start = mn / columns() * leading() + k / 8 * stride();
    return start + tile_byte(swizzle, width(), k % 8, mn % columns() * 2);
  }
  /// Where the descriptor of summed elements k, ..., k + 15 starts.
  size_t start(size_t k) const {
    if (swizzle == 0) return k / 8 * leading();
    if (major == Major::kMN) return k / 8 * stride();
    return k / columns() * slab() + k % columns() * 2;
  }
  size_t bytes() const { return byte(static_cast<size_t>(rows) - 1, 31) + 128; }
};

inline constexpr int kOperandBytes = 48 * 1024;  // A, and B after it

Q1M_HOST_DEVICE int a_value(int m, int k) { return (3 * m + 5 * k + m * k) % 9 - 4; }
inline int b_value(int n, int k) { return (7 * n + 2 * k + n * k) % 7 - 3; }

template <int kN, Major kMajorA, Major kMajorB>
struct WgmmaProbe {
  static constexpr const char* kName = "wgmma_ss";
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 1;
  static constexpr int kCluster = 1;
  struct Layout {
    alignas(1024) uint32_t operands[2][kOperandBytes / 4];
  };

  static Q1M_DEVICE void run(const Params& p) {
    const auto operands = Q1M_SHARED_MEMBER(shared_memory<Layout>(), operands);
    const int t = thread_index();
    for (int i = t; i < 2 * kOperandBytes / 4; i += kThreads) {
      shared_store(operands[0][i], global_load(p.in + i));
    }
    fence_proxy_async();
    block_sync();
    const auto swizzle = static_cast<Swizzle>(p.argument[0]);
    const auto descriptor = [&](int operand, int start) {
      return matrix_descriptor(operands[operand].address + static_cast<uint32_t>(start),
                               static_cast<uint32_t>(p.argument[1 + operand]),
                               static_cast<uint32_t>(p.argument[3 + operand]), swizzle);
    };
    float d[kN / 2];
    Q1M_UNROLL
    for (float& x : d) x = 1000;  // must not count
    wgmma_fence(d);
    wgmma_ss<kN, kMajorA, kMajorB>(d, descriptor(0, 0), descriptor(1, 0), false);
    wgmma_ss<kN, kMajorA, kMajorB>(d, descriptor(0, p.argument[5]), descriptor(1, p.argument[6]),
                                   true);
    wgmma_commit();
    wgmma_wait<0>(d);
    store_fragment(p.out, d);
  }

  static Q1M_DEVICE void store_fragment(uint32_t* out, const float (&d)[kN / 2]) {
    const int t = thread_index();
    Q1M_UNROLL
    for (int i = 0; i < kN / 2; ++i) {
      const int row = 16 * (t / 32) + (t % 32) / 4 + 8 * (i / 2 % 2);
      const int column = 8 * (i / 4) + 2 * (t % 4) + i % 2;
      global_store(reinterpret_cast<float*>(out) + row * kN + column, d[i]);
    }
  }

  static std::vector<Case> cases() {
    std::vector<Case> all;
    for (const int swizzle : {0, 32, 64, 128}) {
      if (swizzle == 0 && (kMajorA == Major::kMN || kMajorB == Major::kMN)) continue;
      const OperandLayout a{64, swizzle, kMajorA};
      const OperandLayout b{kN, swizzle, kMajorB};
      Case test;
      test.name = "n " + std::to_string(kN) + ", swizzle " + std::to_string(swizzle) +
                  (kMajorA == Major::kK ? ", A K-major" : ", A MN-major") +
                  (kMajorB == Major::kK ? ", B K-major" : ", B MN-major");
      test.in.assign(2 * kOperandBytes / 4, 0x7fc07fc0);  // NaN where no operand is
      for (int k = 0; k < 32; ++k) {
        const auto put = [&](const OperandLayout& layout, int operand, int mn, int value) {
          const uint16_t bits = exact_bf16(static_cast<float>(value));
          put_bytes(test.in,
                    static_cast<size_t>(operand * kOperandBytes) +
                        layout.byte(static_cast<size_t>(mn), static_cast<size_t>(k)),
                    &bits, 2);
        };
        for (int m = 0; m < 64; ++m) put(a, 0, m, a_value(m, k));
        for (int n = 0; n < kN; ++n) put(b, 1, n, b_value(n, k));
      }
      for (int m = 0; m < 64; ++m) {
        for (int n = 0; n < kN; ++n) {
          int sum = 0;
          for (int k = 0; k < 32; ++k) sum += a_value(m, k) * b_value(n, k);
          test.expected.push_back(float_bits(static_cast<float>(sum)));
        }
      }
      const auto word = [](size_t x) { return static_cast<int32_t>(x); };
      test.argument = {swizzle,          word(a.leading()), word(b.leading()), word(a.stride()),
                       word(b.stride()), word(a.start(16)), word(b.start(16))};
      all.push_back(test);
    }
    return all;
  }
};

/// A in registers; and an accumulator that goes on from what the registers held.
template <int kN, Major kMajorB>
struct WgmmaRegistersProbe {
  static constexpr const char* kName = "wgmma_rs";
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 1;
  static constexpr int kCluster = 1;
  using Base = WgmmaProbe<kN, Major::kK, kMajorB>;
  using Layout = typename Base::Layout;

  static Q1M_DEVICE void run(const Params& p) {
    const auto operands = Q1M_SHARED_MEMBER(shared_memory<Layout>(), operands);
    const int t = thread_index();
    for (int i = t; i < kOperandBytes / 4; i += kThreads) {
      shared_store(operands[1][i], global_load(p.in + kOperandBytes / 4 + i));
    }
    fence_proxy_async();
    block_sync();
    const int row = 16 * (t / 32) + (t % 32) / 4;
    uint32_t a[2][4];
    Q1M_UNROLL
    for (int step = 0; step < 2; ++step) {
      Q1M_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int k = 16 * step + 8 * (i / 2) + 2 * (t % 4);
        const int m = row + 8 * (i % 2);
        a[step][i] =
            pack_bf16(static_cast<float>(a_value(m, k)), static_cast<float>(a_value(m, k + 1)));
      }
    }
    float d[kN / 2];
    Q1M_UNROLL
    for (float& x : d) x = 1000;
    const auto descriptor = [&](int start) {
      return matrix_descriptor(
          operands[1].address + static_cast<uint32_t>(start), static_cast<uint32_t>(p.argument[2]),
          static_cast<uint32_t>(p.argument[4]), static_cast<Swizzle>(p.argument[0]));
    };
    wgmma_fence(d, a);
    wgmma_rs<kN, kMajorB>(d, a[0], descriptor(0), true);
    wgmma_commit();
    wgmma_rs<kN, kMajorB>(d, a[1], descriptor(p.argument[6]), true);
    wgmma_commit();
    wgmma_wait<0>(d, a);
    Base::store_fragment(p.out, d);
  }

  static std::vector<Case> cases() {
    std::vector<Case> all = Base::cases();
    for (Case& test : all) {
      for (uint32_t& word : test.expected) {
        float sum;
        std::memcpy(&sum, &word, 4);
        word = float_bits(sum + 1000);
      }
    }
    return all;
  }
};

}  // namespace qwen1m::conformance
