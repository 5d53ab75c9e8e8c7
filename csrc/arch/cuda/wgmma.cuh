#pragma once
/// Asynchronous matrix products of a warpgroup and the registers they work on.

#include "arch/arch.h"

namespace qwen1m::arch {
namespace detail {

/// An empty assembly statement that claims to rewrite the registers: no use of them moves across
/// it. wgmma reads and writes registers behind the compiler's back, so this stands where it starts
/// and where it has ended.
Q1M_DEVICE void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }
Q1M_DEVICE void pin(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
template <typename T, size_t kSize>
Q1M_DEVICE void pin(T (&registers)[kSize]) {
  Q1M_UNROLL
  for (size_t i = 0; i < kSize; ++i) pin(registers[i]);
}

}  // namespace detail

template <typename A>
Q1M_DEVICE void wgmma_fence(A& registers) {
  detail::pin(registers);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
template <typename A, typename B>
Q1M_DEVICE void wgmma_fence(A& registers, B& more_registers) {
  detail::pin(registers);
  detail::pin(more_registers);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

Q1M_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending, typename A>
Q1M_DEVICE void wgmma_wait(A& registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  detail::pin(registers);
}
template <int kPending, typename A, typename B>
Q1M_DEVICE void wgmma_wait(A& registers, B& more_registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  detail::pin(registers);
  detail::pin(more_registers);
}

// PTX names registers by operand number: d is %0 to %31 (kN = 64) or %63 (kN = 128), and the other
// operands follow. Q1M_D<count> lists the numbers, Q1M_OUT<count> the operands.
#define Q1M_D32                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, " \
  "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, " \
  "%26, %27, %28, %29, %30, %31"
#define Q1M_D64                                                       \
  Q1M_D32                                                             \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "    \
  "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, " \
  "%57, %58, %59, %60, %61, %62, %63"
#define Q1M_OUT4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define Q1M_OUT16(i) Q1M_OUT4(i), Q1M_OUT4(i + 4), Q1M_OUT4(i + 8), Q1M_OUT4(i + 12)
#define Q1M_OUT32 Q1M_OUT16(0), Q1M_OUT16(16)
#define Q1M_OUT64 Q1M_OUT32, Q1M_OUT16(32), Q1M_OUT16(48)

// scale-d is a predicate; imm-scale-a and -b stay 1.
#define Q1M_WGMMA(shape, d_numbers, a_text, b_text, accumulate_text, majors_text)             \
  "{\n"                                                                                       \
  ".reg .pred p;\n"                                                                           \
  "setp.ne.b32 p, " accumulate_text                                                           \
  ", 0;\n"                                                                                    \
  "wgmma.mma_async.sync.aligned." shape ".f32.bf16.bf16 {" d_numbers "}, " a_text ", " b_text \
  ", p, 1, 1, " majors_text                                                                   \
  ";\n"                                                                                       \
  "}"

template <int kN, Major kMajorA, Major kMajorB>
Q1M_DEVICE void wgmma_ss(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kN == 64 || kN == 128, "wgmma_ss: kN is 64 or 128");
  constexpr int kA = static_cast<int>(kMajorA), kB = static_cast<int>(kMajorB);
  const int add = accumulate ? 1 : 0;
  if constexpr (kN == 64) {
    asm volatile(Q1M_WGMMA("m64n64k16", Q1M_D32, "%32", "%33", "%34", "%35, %36")
                 : Q1M_OUT32
                 : "l"(a), "l"(b), "r"(add), "n"(kA), "n"(kB));
  } else {
    asm volatile(Q1M_WGMMA("m64n128k16", Q1M_D64, "%64", "%65", "%66", "%67, %68")
                 : Q1M_OUT64
                 : "l"(a), "l"(b), "r"(add), "n"(kA), "n"(kB));
  }
}

template <int kN, Major kMajorB>
Q1M_DEVICE void wgmma_rs(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(kN == 64 || kN == 128, "wgmma_rs: kN is 64 or 128");
  constexpr int kB = static_cast<int>(kMajorB);
  const int add = accumulate ? 1 : 0;
  if constexpr (kN == 64) {
    asm volatile(Q1M_WGMMA("m64n64k16", Q1M_D32, "{%32, %33, %34, %35}", "%36", "%37", "%38")
                 : Q1M_OUT32
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(kB));
  } else {
    asm volatile(Q1M_WGMMA("m64n128k16", Q1M_D64, "{%64, %65, %66, %67}", "%68", "%69", "%70")
                 : Q1M_OUT64
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(kB));
  }
}

#undef Q1M_WGMMA
#undef Q1M_OUT64
#undef Q1M_OUT32
#undef Q1M_OUT16
#undef Q1M_OUT4
#undef Q1M_D64
#undef Q1M_D32

template <int kCount>
Q1M_DEVICE void registers_decrease() {
  static_assert(24 <= kCount && kCount <= 256 && kCount % 8 == 0);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
Q1M_DEVICE void registers_increase() {
  static_assert(24 <= kCount && kCount <= 256 && kCount % 8 == 0);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace qwen1m::arch
