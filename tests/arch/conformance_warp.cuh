#pragma once
/// Warps: shuffles, election, warp-level matrices, arithmetic, named barriers, registers.

#include <cmath>

#include "conformance_case.h"

namespace qwen1m::conformance {

using namespace arch;  // NOLINT: the kernels below read as kernels do

/// Who a thread is; and the primitives of programmatic dependent launch, without a launch in front.
struct IdentityProbe {
  static constexpr const char* kName = "identity";
  static constexpr int kThreads = 96;
  static constexpr int kBlocks = 6;
  static constexpr int kCluster = 2;
  struct Layout {
    uint32_t word;
  };

  static Q1M_DEVICE void run(const Params& p) {
    wait_for_prior_grid();
    uint32_t* out = p.out + (block_index() * kThreads + thread_index()) * 7;
    global_store(out, static_cast<uint32_t>(thread_index()));
    global_store(out + 1, static_cast<uint32_t>(lane_index()));
    global_store(out + 2, static_cast<uint32_t>(warp_index()));
    global_store(out + 3, static_cast<uint32_t>(block_index()));
    global_store(out + 4, static_cast<uint32_t>(num_blocks()));
    global_store(out + 5, cluster_rank());
    global_store(out + 6, cluster_size());
    launch_dependents();
  }

  static std::vector<Case> cases() {
    Case test;
    test.in = {0};
    for (uint32_t block = 0; block < kBlocks; ++block) {
      for (uint32_t t = 0; t < kThreads; ++t) {
        const uint32_t words[7] = {t, t % 32, t / 32, block, kBlocks, block % 2, 2};
        test.expected.insert(test.expected.end(), words, words + 7);
      }
    }
    return {test};
  }
};

/// ld/st.shared and global of every width.
struct WidthsProbe {
  static constexpr const char* kName = "shared and global, 1 to 16 bytes";
  static constexpr int kThreads = 32;
  static constexpr int kBlocks = 1;
  static constexpr int kCluster = 1;
  struct Layout {
    alignas(16) unsigned char bytes[4][32][16];
  };

  template <typename T>
  static Q1M_DEVICE void pass_on(const Params& p, int width_index) {
    const auto bytes = Q1M_SHARED_MEMBER(shared_memory<Layout>(), bytes);
    const int t = thread_index();
    const auto* in = reinterpret_cast<const T*>(p.in);
    auto* out = reinterpret_cast<T*>(p.out + 128 * width_index);
    shared_store(bytes[width_index][t].template as<T>(), global_load(in + t));
    warp_sync();
    global_store(out + t, shared_load(bytes[width_index][t ^ 1].template as<T>()));
  }
  static Q1M_DEVICE void run(const Params& p) {
    pass_on<uint16_t>(p, 0);
    pass_on<uint32_t>(p, 1);
    pass_on<uint64_t>(p, 2);
    pass_on<Vec16>(p, 3);
    const auto* in = reinterpret_cast<const unsigned char*>(p.in);
    global_store(reinterpret_cast<unsigned char*>(p.out + 512) + thread_index(),
                 global_load(in + (thread_index() ^ 1)));
  }

  static std::vector<Case> cases() {
    Case test;
    for (uint32_t i = 0; i < 128; ++i) test.in.push_back(i * 2654435761U);
    test.expected.assign(520, kUntouched);
    const auto* in = reinterpret_cast<const unsigned char*>(test.in.data());
    const size_t widths[5] = {2, 4, 8, 16, 1};
    for (size_t i = 0; i < 5; ++i) {
      for (size_t t = 0; t < 32; ++t) {
        put_bytes(test.expected, 512 * i + t * widths[i], in + (t ^ 1) * widths[i], widths[i]);
      }
    }
    return {test};
  }
};

/// shfl.sync.bfly, .idx and elect.sync.
struct ShuffleProbe {
  static constexpr const char* kName = "shuffle, shuffle_xor, elect_one";
  static constexpr int kThreads = 64;
  static constexpr int kBlocks = 1;
  static constexpr int kCluster = 1;
  struct Layout {
    uint32_t word;
  };

  static Q1M_DEVICE void run(const Params& p) {
    const int t = thread_index();
    const float mine = static_cast<float>(t) + 0.5F;
    global_store(reinterpret_cast<float*>(p.out) + t, shuffle_xor(mine, 5));
    global_store(p.out + 64 + t, shuffle(static_cast<uint32_t>(t), (lane_index() * 7 + 3) % 32));
    // One leader, and the same one each time.
    int leaders = elect_one() ? 1 : 0;
    const int again = elect_one() ? 1 : 0;
    int same = leaders == again ? 1 : 0;
    for (int mask = 1; mask < 32; mask *= 2) {
      leaders += shuffle_xor(leaders, mask);
      same += shuffle_xor(same, mask);
    }
    global_store(p.out + 128 + t, static_cast<uint32_t>(leaders * 100 + same));
  }

  static std::vector<Case> cases() {
    Case test;
    test.in = {0};
    for (int t = 0; t < 64; ++t)
      test.expected.push_back(float_bits(static_cast<float>(t ^ 5) + 0.5F));
    for (uint32_t t = 0; t < 64; ++t) test.expected.push_back(t / 32 * 32 + (t % 32 * 7 + 3) % 32);
    for (int t = 0; t < 64; ++t) test.expected.push_back(132);
    return {test};
  }
};

/// ldmatrix, ldmatrix.trans, stmatrix.
struct MatrixCopyProbe {
  static constexpr const char* kName = "ldmatrix_x4, ldmatrix_x4_transposed, stmatrix_x4";
  static constexpr int kThreads = 32;
  static constexpr int kBlocks = 1;
  static constexpr int kCluster = 1;
  struct Layout {
    Vec16 in[32];
    Vec16 out[32];
  };

  static Q1M_DEVICE void run(const Params& p) {
    const auto shared = shared_memory<Layout>();
    const auto in = Q1M_SHARED_MEMBER(shared, in);
    const auto out = Q1M_SHARED_MEMBER(shared, out);
    const int lane = lane_index();
    for (int i = 0; i < 4; ++i) {
      const int word = 4 * lane + i;
      shared_store(Shared<uint32_t>{in.address + static_cast<uint32_t>(word) * 4},
                   global_load(p.in + word));
    }
    block_sync();
    // The rows in another order than they lie: row l of the four matrices is row 31 - l there.
    uint32_t plain[4];
    uint32_t transposed[4];
    ldmatrix_x4(plain, in[31 - lane]);
    ldmatrix_x4_transposed(transposed, in[31 - lane]);
    for (int i = 0; i < 4; ++i) {
      global_store(p.out + 4 * lane + i, plain[i]);
      global_store(p.out + 128 + 4 * lane + i, transposed[i]);
    }
    stmatrix_x4(out[lane], plain[0], plain[1], plain[2], plain[3]);
    block_sync();
    for (int i = 0; i < 4; ++i) {
      const int word = 4 * lane + i;
      global_store(p.out + 256 + word,
                   shared_load(Shared<uint32_t>{out.address + static_cast<uint32_t>(word) * 4}));
    }
  }

  static std::vector<Case> cases() {
    Case test;
    test.in.resize(128);
    uint16_t elements[4][8][8];  // of the matrices, as the lanes name their rows
    for (int row = 0; row < 32; ++row) {
      for (int i = 0; i < 8; ++i) {
        const auto value = static_cast<uint16_t>(row * 256 + i);
        put_bytes(test.in, static_cast<size_t>(row * 16 + i * 2), &value, 2);
        elements[(31 - row) / 8][(31 - row) % 8][i] = value;
      }
    }
    for (const bool transposed : {false, true}) {
      for (int lane = 0; lane < 32; ++lane) {
        for (const auto& matrix : elements) {
          const int a = lane / 4;
          const int b = 2 * (lane % 4);
          const uint32_t low = transposed ? matrix[b][a] : matrix[a][b];
          const uint32_t high = transposed ? matrix[b + 1][a] : matrix[a][b + 1];
          test.expected.push_back(low | high << 16);
        }
      }
    }
    for (const auto& matrix : elements) {
      for (const auto& row : matrix) {
        for (int i = 0; i < 8; i += 2) {
          test.expected.push_back(row[i] | static_cast<uint32_t>(row[i + 1]) << 16);
        }
      }
    }
    return {test};
  }
};

/// mma.sync m16n8k16: fragments of A, B and D.
template <bool kF16>
struct MmaProbe {
  static constexpr const char* kName = kF16 ? "mma_m16n8k16_f16" : "mma_m16n8k16";
  static constexpr int kThreads = 32;
  static constexpr int kBlocks = 1;
  static constexpr int kCluster = 1;
  struct Layout {
    uint32_t word;
  };
  static Q1M_HOST_DEVICE float a(int m, int k) {
    return static_cast<float>((3 * m + 5 * k + m * k) % 9 - 4);
  }
  static Q1M_HOST_DEVICE float b(int k, int n) {
    return static_cast<float>((7 * n + 2 * k + n * k) % 7 - 3);
  }
  static Q1M_DEVICE uint32_t pack(float low, float high) {
    return kF16 ? pack_f16(low, high) : pack_bf16(low, high);
  }

  static Q1M_DEVICE void run(const Params& p) {
    const int group = lane_index() / 4;
    const int pair = 2 * (lane_index() % 4);
    uint32_t a_fragment[4];
    uint32_t b_fragment[2];
    float d[4];
    Q1M_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = group + 8 * (i % 2);
      const int column = pair + 8 * (i / 2);
      a_fragment[i] = pack(a(row, column), a(row, column + 1));
      d[i] = static_cast<float>(100 * (group + 8 * (i / 2)) + pair + i % 2);
    }
    Q1M_UNROLL
    for (int i = 0; i < 2; ++i) {
      b_fragment[i] = pack(b(pair + 8 * i, group), b(pair + 8 * i + 1, group));
    }
    if constexpr (kF16) {
      mma_m16n8k16_f16(d, a_fragment, b_fragment);
    } else {
      mma_m16n8k16(d, a_fragment, b_fragment);
    }
    Q1M_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int at = 8 * (group + 8 * (i / 2)) + pair + i % 2;
      global_store(reinterpret_cast<float*>(p.out) + at, d[i]);
    }
  }

  static std::vector<Case> cases() {
    Case test;
    test.in = {0};
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 8; ++n) {
        float sum = static_cast<float>(100 * m + n);
        for (int k = 0; k < 16; ++k) sum += a(m, k) * b(k, n);
        test.expected.push_back(float_bits(sum));
      }
    }
    return {test};
  }
};

/// cvt.rn.f16x2.e4m3x2 of all numbers, cvt.rn.f16x2.f32 at ties and ends, prmt.
struct F16Probe {
  static constexpr const char* kName = "e4m3_to_f16, pack_f16, permute_bytes";
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 1;
  static constexpr int kCluster = 1;
  struct Layout {
    uint32_t word;
  };

  static Q1M_DEVICE void run(const Params& p) {
    const int t = thread_index();
    const auto* floats = reinterpret_cast<const float*>(p.in);
    // Numbers t and t | 128; the two NaNs (127, 255) become zeros.
    const uint32_t code = t == 127 ? 0 : static_cast<uint32_t>(t);
    global_store(p.out + 3 * t, e4m3_to_f16(code | (code | 128) << 8 | 0xabcd0000));
    global_store(p.out + 3 * t + 1,
                 pack_f16(global_load(floats + t % 8), global_load(floats + (t + 3) % 8)));
    global_store(p.out + 3 * t + 2,
                 permute_bytes(0x33221100, 0x77665544, t % 2 == 0 ? 0x6420 : 0x1735));
  }

  static std::vector<Case> cases() {
    // fp32 bits, and the fp16 nearest to it.
    const uint32_t table[8][2] = {{0x3f800000, 0x3c00}, {0x3f801000, 0x3c00}, {0x3f803000, 0x3c02},
                                  {0xbf801001, 0xbc01}, {0x477fefff, 0x7bff}, {0x477ff000, 0x7c00},
                                  {0x33800000, 0x0001}, {0x33000000, 0x0000}};
    Case test;
    for (const auto& row : table) test.in.push_back(row[0]);
    for (uint32_t t = 0; t < 128; ++t) {
      const uint32_t code = t == 127 ? 0 : t, exponent = code >> 3, mantissa = code & 7;
      // mantissa * 2^-9 or (8 + mantissa) * 2^(exponent - 10), as an fp16 with bias 15.
      uint32_t f16 = (exponent + 8) << 10 | mantissa << 7;
      if (exponent == 0) {
        uint32_t shift = 0, m = mantissa;
        while (m != 0 && m < 8) {
          m *= 2;
          ++shift;
        }
        f16 = mantissa == 0 ? 0 : (9 - shift) << 10 | (m & 7) << 7;
      }
      test.expected.push_back(f16 | (f16 | 0x8000) << 16);
      test.expected.push_back(table[t % 8][1] | table[(t + 3) % 8][1] << 16);
      test.expected.push_back(t % 2 == 0 ? 0x66442200 : 0x11773355);
    }
    return {test};
  }
};

/// cvt.rn.satfinite.e4m3x2.f32 at ties, ends and below the smallest normal number.
struct E4m3Probe {
  static constexpr const char* kName = "pack_e4m3";
  static constexpr int kThreads = 32;
  static constexpr int kBlocks = 1;
  static constexpr int kCluster = 1;
  struct Layout {
    uint32_t word;
  };

  static Q1M_DEVICE void run(const Params& p) {
    const int t = thread_index();
    const auto* in = reinterpret_cast<const float*>(p.in);
    uint32_t pair = pack_e4m3(global_load(in + 2 * t), global_load(in + 2 * t + 1));
    if ((pair & 0x7f) == 0x7f) pair &= ~0x80u;  // the sign of a NaN is not defined
    global_store(p.out + t, pair);
  }

  static std::vector<Case> cases() {
    // fp32 bits, and the e4m3 nearest to it: ties go to the even one.
    const uint32_t table[32][2] = {
        {0x3f800000, 0x38}, {0x3f880000, 0x38}, {0x3f880001, 0x39}, {0x3f980000, 0x3a},
        {0x3f97ffff, 0x39}, {0xbf880000, 0xb8}, {0xbf980000, 0xba}, {0x3ff80000, 0x40},
        {0x00000000, 0x00}, {0x80000000, 0x80}, {0x43e00000, 0x7e}, {0xc3e00000, 0xfe},
        {0x43e80000, 0x7e}, {0x43f00000, 0x7e}, {0x7f7fffff, 0x7e}, {0xff7fffff, 0xfe},
        {0x7f800000, 0x7e}, {0xff800000, 0xfe}, {0x3c800000, 0x08}, {0x3c700000, 0x08},
        {0x3c6fffff, 0x07}, {0x3b000000, 0x01}, {0x3a800000, 0x00}, {0x3a800001, 0x01},
        {0x3b400000, 0x02}, {0x3b3fffff, 0x01}, {0xbb400000, 0x82}, {0x00000001, 0x00},
        {0x80000001, 0x80}, {0x3c880000, 0x08}, {0x43d80000, 0x7e}, {0x43d7ffff, 0x7d}};
    Case test;
    for (uint32_t t = 0; t < 32; ++t) {
      const auto *low = table[t], *high = table[(5 * t + 3) % 32];
      test.in.push_back(low[0]);
      test.in.push_back(high[0]);
      test.expected.push_back(low[1] | high[1] << 8);
    }
    test.in[0] = 0x7fc00000;
    test.expected[0] = (test.expected[0] & 0xff00) | 0x7f;
    test.in[2] = 0xffc12345;
    test.expected[1] = (test.expected[1] & 0xff00) | 0x7f;
    return {test};
  }
};

/// mul.rn.f32 and an addition behind it: two roundings.
struct MultiplyProbe {
  static constexpr const char* kName = "multiply";
  static constexpr int kThreads = 32;
  static constexpr int kBlocks = 1;
  static constexpr int kCluster = 1;
  struct Layout {
    uint32_t word;
  };

  static Q1M_DEVICE void run(const Params& p) {
    const int t = thread_index();
    const auto* in = reinterpret_cast<const float*>(p.in);
    const float x = global_load(in + 2 * t), y = global_load(in + 2 * t + 1);
    global_store(reinterpret_cast<float*>(p.out) + t, multiply(x, x) - y);
  }

  static std::vector<Case> cases() {
    Case test;
    for (uint32_t t = 0; t < 32; ++t) {
      // (1 + 2^-12)^2 2^2t - (1 + 2^-11) 2^2t: what is left, 2^-24, is lost unless it is fused.
      test.in.push_back(0x3f800800 + (t << 23));
      test.in.push_back(0x3f801000 + (t << 24));
      test.expected.push_back(0);
    }
    return {test};
  }
};

/// cvt.rn.bf16x2: ties to even, overflow, NaN; and back.
struct PackProbe {
  static constexpr const char* kName = "pack_bf16, bf16_low, bf16_high";
  static constexpr int kThreads = 32;
  static constexpr int kBlocks = 1;
  static constexpr int kCluster = 1;
  struct Layout {
    uint32_t word;
  };

  static Q1M_DEVICE void run(const Params& p) {
    const int t = thread_index();
    const auto* in = reinterpret_cast<const float*>(p.in);
    const uint32_t pair = pack_bf16(global_load(in + 2 * t), global_load(in + 2 * t + 1));
    global_store(p.out + 3 * t, pair);
    global_store(reinterpret_cast<float*>(p.out) + 3 * t + 1, bf16_low(pair));
    global_store(reinterpret_cast<float*>(p.out) + 3 * t + 2, bf16_high(pair));
  }

  static std::vector<Case> cases() {
    // fp32 bits, and the bf16 nearest to it: ties go to the even one.
    const uint32_t table[][2] = {
        {0x3f800000, 0x3f80}, {0x3f808000, 0x3f80}, {0x3f808001, 0x3f81}, {0x3f818000, 0x3f82},
        {0x3f817fff, 0x3f81}, {0xbf808000, 0xbf80}, {0xbf818000, 0xbf82}, {0x00000000, 0x0000},
        {0x80000000, 0x8000}, {0x7f800000, 0x7f80}, {0xff800000, 0xff80}, {0x7f7fffff, 0x7f80},
        {0x7fc00000, 0x7fff}, {0xffc12345, 0x7fff}, {0x00018000, 0x0002}, {0x40490fdb, 0x4049}};
    Case test;
    for (size_t t = 0; t < 32; ++t) {
      const uint32_t* low = table[t % 16];
      const uint32_t* high = table[(t * 5 + 3 + t / 16) % 16];
      test.in.push_back(low[0]);
      test.in.push_back(high[0]);
      test.expected.push_back(low[1] | high[1] << 16);
      test.expected.push_back(low[1] << 16);
      test.expected.push_back(high[1] << 16);
    }
    return {test};
  }
};

/// ex2.approx.ftz, lg2.approx.ftz, rcp.approx.ftz: near the true value, exact at the special ones.
struct ApproximationProbe {
  static constexpr const char* kName = "exp2_approx, log2_approx, reciprocal_approx";
  static constexpr int kThreads = 32;
  static constexpr int kBlocks = 1;
  static constexpr int kCluster = 1;
  struct Layout {
    uint32_t word;
  };

  static Q1M_DEVICE void run(const Params& p) {
    const int t = thread_index();
    const float x = global_load(reinterpret_cast<const float*>(p.in) + t);
    auto* out = reinterpret_cast<float*>(p.out) + 3 * t;
    global_store(out, exp2_approx(x));
    global_store(out + 1, log2_approx(x));
    global_store(out + 2, reciprocal_approx(x));
  }

  static std::vector<Case> cases() {
    Case near;
    near.name = "near the true value";
    // ex2: 2 ulp, rcp: 1 ulp, lg2: 2^-22 of the result outside [0.5, 2]; the widest of these.
    near.relative_error = 1.0F / (1 << 21);
    for (int i = 0; i < 32; ++i) {
      const double x = 2.0 + 0.37 * i;
      near.in.push_back(float_bits(static_cast<float>(x)));
      const double exact = static_cast<double>(static_cast<float>(x));
      near.expected.push_back(float_bits(static_cast<float>(std::exp2(exact))));
      near.expected.push_back(float_bits(static_cast<float>(std::log2(exact))));
      near.expected.push_back(float_bits(static_cast<float>(1 / exact)));
    }
    Case special;
    special.name = "special values";
    const float infinity = INFINITY;
    // x, 2^x, log2(x), 1/x
    const float table[4][4] = {{infinity, infinity, infinity, 0.0F},
                               {1.0F, 2.0F, 0.0F, 1.0F},
                               {0.0F, 1.0F, -infinity, infinity},
                               {4.0F, 16.0F, 2.0F, 0.25F}};
    for (size_t t = 0; t < 32; ++t) {
      special.in.push_back(float_bits(table[t % 4][0]));
      for (size_t i = 1; i < 4; ++i) special.expected.push_back(float_bits(table[t % 4][i]));
    }
    return {near, special};
  }
};

/// bar.sync and bar.arrive: three warps hand a word on in a ring.
struct NamedBarrierProbe {
  static constexpr const char* kName = "named_barrier_sync, named_barrier_arrive, block_sync";
  static constexpr int kThreads = 96;
  static constexpr int kBlocks = 1;
  static constexpr int kCluster = 1;
  static constexpr int kRounds = 5;
  struct Layout {
    uint32_t words[32];
  };

  /// Barrier 1 + w says that it is warp w's turn.
  static Q1M_DEVICE void sync(int warp) {
    if (warp == 0) named_barrier_sync<1>(64);
    if (warp == 1) named_barrier_sync<2>(64);
    if (warp == 2) named_barrier_sync<3>(64);
  }
  static Q1M_DEVICE void arrive(int warp) {
    if (warp == 0) named_barrier_arrive<1>(64);
    if (warp == 1) named_barrier_arrive<2>(64);
    if (warp == 2) named_barrier_arrive<3>(64);
  }
  static Q1M_DEVICE void run(const Params& p) {
    const auto words = Q1M_SHARED_MEMBER(shared_memory<Layout>(), words);
    const int warp = warp_index();
    const int lane = lane_index();
    if (warp == 0) shared_store(words[lane], 1U);
    block_sync();
    if (warp == 2) arrive(0);
    for (int round = 0; round < kRounds; ++round) {
      sync(warp);
      const uint32_t value = shared_load(words[lane ^ 1]);
      warp_sync();
      shared_store(words[lane], value * 3 + static_cast<uint32_t>(warp));
      if (warp != 2 || round + 1 < kRounds) arrive((warp + 1) % 3);
    }
    block_sync();
    if (warp == 1) global_store(p.out + lane, shared_load(words[lane]));
  }

  static std::vector<Case> cases() {
    Case test;
    test.in = {0};
    uint32_t value = 1;  // the same in all lanes
    for (int round = 0; round < kRounds; ++round) {
      for (uint32_t warp = 0; warp < 3; ++warp) value = value * 3 + warp;
    }
    test.expected.assign(32, value);
    return {test};
  }
};

/// setmaxnreg: one warpgroup gives registers away, two take them.
struct RegisterProbe {
  static constexpr const char* kName = "registers_decrease, registers_increase";
  static constexpr int kThreads = 384;
  static constexpr int kBlocks = 2;
  static constexpr int kCluster = 1;
  struct Layout {
    uint32_t word;
  };

  static Q1M_DEVICE void run(const Params& p) {
    if (warp_index() < 4) {
      registers_decrease<40>();
    } else {
      registers_increase<232>();
    }
    const int64_t at = block_index() * kThreads + thread_index();
    global_store(p.out + at, static_cast<uint32_t>(at));
  }

  static std::vector<Case> cases() {
    Case test;
    test.in = {0};
    for (uint32_t i = 0; i < kBlocks * kThreads; ++i) test.expected.push_back(i);
    return {test};
  }
};

}  // namespace qwen1m::conformance
