#pragma once
/// One function, compiled for the baseline and for AVX-512: the body is a Q1M_INLINE function, and
/// two callers differ by Q1M_TARGET_AVX512 only. For loops the compiler vectorises; code written in
/// intrinsics has source files of its own (q1m_isa_sources in CMakeLists.txt).

#define Q1M_INLINE inline __attribute__((always_inline))

#if Q1M_HAVE_AVX512
#define Q1M_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#else
#define Q1M_TARGET_AVX512
#endif
