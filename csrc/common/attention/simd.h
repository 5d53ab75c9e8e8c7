#pragma once
/// Short vectors of floats, written in the vector extension of gcc and clang, so that the same
/// source compiles for SSE2, AVX-512, NEON or anything else. Intrinsics only where the extension
/// has no word for an instruction (fused multiply-add, max).
///
/// Everything here has internal linkage (hence the unnamed namespace in a header): the sources that
/// include it are compiled for different instruction sets, and the linker must never replace one's
/// copy of a function by another's.

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
// gcc 12 warns about the undefined pass-through operand in its own header (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define Q1M_SIMD inline __attribute__((always_inline))

namespace qwen1m {
namespace {  // NOLINT: see above

/// Vectors of N 32-bit lanes.
template <int N>
struct Simd {
  typedef float F __attribute__((vector_size(N * 4)));
  typedef uint32_t U __attribute__((vector_size(N * 4)));
  typedef int32_t I __attribute__((vector_size(N * 4)));
  typedef uint16_t H __attribute__((vector_size(N * 2)));

  template <typename V = F>
  static Q1M_SIMD V load(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  template <typename V>
  static Q1M_SIMD void store(void* p, V v) {
    memcpy(p, &v, sizeof v);
  }
  static Q1M_SIMD F splat(float x) { return x - F{}; }
  /// The 32 bits at p in every lane.
  static Q1M_SIMD F broadcast(const void* p) {
    float x;
    memcpy(&x, p, sizeof x);
#if defined(__AVX512F__)
    // Not `x - F{}`, which would quiet a signalling NaN: these bits may be a pair of bf16.
    if constexpr (N == 16) return (F)_mm512_set1_ps(x);
    if constexpr (N == 8) return (F)_mm256_set1_ps(x);
#endif
    return splat(x);
  }
  /// bfloat16 bits, widened.
  static Q1M_SIMD F load_bf16(const void* p) {
    return reinterpret_cast<F>(__builtin_convertvector(load<H>(p), U) << 16);
  }

  static Q1M_SIMD F fma(F a, F b, F c) {
#if defined(__AVX512F__)
    if constexpr (N == 16) return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
    if constexpr (N == 8) return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
    if constexpr (N == 4) return (F)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
#elif defined(__ARM_NEON)
    if constexpr (N == 4) return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#endif
    return a * b + c;
  }
  /// a > b ? a : b, so b where either is NaN.
  static Q1M_SIMD F max(F a, F b) {
#if defined(__AVX512F__)
    if constexpr (N == 16) return (F)_mm512_max_ps((__m512)a, (__m512)b);
    if constexpr (N == 8) return (F)_mm256_max_ps((__m256)a, (__m256)b);
#endif
#if defined(__SSE2__)
    if constexpr (N == 4) return (F)_mm_max_ps((__m128)a, (__m128)b);
#endif
    return a > b ? a : b;
  }

  /// The sum of the lanes.
  static Q1M_SIMD float sum(F x) {
#if defined(__AVX512F__)
    if constexpr (N == 16) return _mm512_reduce_add_ps((__m512)x);
#endif
    float lanes[N], total = 0;
    memcpy(lanes, &x, sizeof lanes);
    for (const float lane : lanes) total += lane;
    return total;
  }

  /// 2^x for x <= 0: relative error 9e-8 (Degree 5) or 1.0e-4 (Degree 3, for results that become
  /// bf16, whose own rounding is 2e-3). 2^0 is exactly 1; x <= -127 gives exactly 0; NaN stays NaN.
  ///
  /// x = n + f with n integer and |f| <= 1/2. The polynomial is minimax for 2^f with a constant
  /// term of exactly 1; n is added to its exponent. Clamping at -127 makes f = 0 there, hence the
  /// bits of 1.0f minus 127 << 23: zero.
  template <int Degree>
  static Q1M_SIMD F exp2(F x) {
    static_assert(Degree == 3 || Degree == 5);
    const F kRound = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    x = max(splat(-127.0f), x);
    const F n = x + kRound;
    const F f = x - (n - kRound);
    F p;
    if constexpr (Degree == 3) {
      p = fma(splat(0.0550089329f), f, splat(0.242210969f));
      p = fma(p, f, splat(0.693282902f));
    } else {
      p = fma(splat(0.00132647273f), f, splat(0.00967151299f));
      p = fma(p, f, splat(0.0555073358f));
      p = fma(p, f, splat(0.240222424f));
      p = fma(p, f, splat(0.693147004f));
    }
    p = fma(p, f, splat(1.0f));
    return reinterpret_cast<F>(reinterpret_cast<U>(p) + (reinterpret_cast<U>(n) << 23));
  }
};

/// acc + a * b on floats; a word is one float.
template <int N>
struct MultiplyFloats {
  using F = typename Simd<N>::F;
  static constexpr int kElemsPerWord = 1;
  static Q1M_SIMD F mac(F acc, F a, F b) { return Simd<N>::fma(a, b, acc); }
  static Q1M_SIMD F ones() { return Simd<N>::splat(1.0f); }
};

/// Fetches memory into L1 (kLocality 3) or towards L2 (2), from front to back, a little at each
/// call. Hardware prefetchers stop at 4 KB borders and do not follow many rows at once (decode
/// without this class: half the speed), and a core drops software prefetches beyond the few it can
/// have in flight (Zen 4: a burst of them "runs" at 180 GB/s), so decode strews them evenly over
/// its arithmetic.
template <int kLocality = 2>
class Prefetch {
 public:
  Prefetch(const char* p, int64_t bytes) : p_(p), end_(p == nullptr ? p : p + bytes) {}
  /// Of a range that is a multiple of kBytes; kBytes is one of 64, or less.
  template <int64_t kBytes>
  Q1M_SIMD void next_bytes() {
    if (p_ == end_) return;
#pragma GCC unroll 8
    for (int64_t line = 0; line < kBytes; line += 64) {
      __builtin_prefetch(p_ + line, /*rw=*/0, kLocality);
    }
    p_ += kBytes;
  }
  /// The same where the number is not known beforehand.
  Q1M_SIMD void next_bytes(int64_t bytes) {
    for (; bytes > 0; bytes -= 64) next_bytes<64>();
  }

 private:
  const char *p_, *end_;
};

}  // namespace
}  // namespace qwen1m
