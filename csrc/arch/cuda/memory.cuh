#pragma once
/// Shared and global memory: loads and stores by size, flags and additions between blocks.
///
/// All of it is volatile: the compiler keeps the order of these accesses and of the barriers
/// between them. ptxas still schedules them freely where the memory model allows it.

#include "arch/arch.h"

namespace qwen1m::arch {
namespace detail {

/// The bits of a T as 16-, 32- or 64-bit words, which is what a PTX register holds.
template <typename To, typename From>
Q1M_DEVICE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From) && std::is_trivially_copyable_v<To>);
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

struct alignas(8) Words2 {
  uint32_t word[2];
};

}  // namespace detail

template <typename Layout>
Q1M_DEVICE Shared<Layout> shared_memory() {
  extern __shared__ __align__(1024) unsigned char q1m_dynamic_shared[];
  return {static_cast<uint32_t>(__cvta_generic_to_shared(q1m_dynamic_shared))};
}

template <typename T>
Q1M_DEVICE T shared_load(Shared<T> from) {
  using detail::bits_as;
  if constexpr (sizeof(T) == 2) {
    uint16_t v;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(v) : "r"(from.address) : "memory");
    return bits_as<T>(v);
  } else if constexpr (sizeof(T) == 4) {
    uint32_t v;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(from.address) : "memory");
    return bits_as<T>(v);
  } else if constexpr (sizeof(T) == 8) {
    detail::Words2 v;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                 : "=r"(v.word[0]), "=r"(v.word[1])
                 : "r"(from.address)
                 : "memory");
    return bits_as<T>(v);
  } else {
    static_assert(sizeof(T) == 16, "shared_load: T of 2, 4, 8 or 16 bytes");
    Vec16 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "r"(from.address)
                 : "memory");
    return bits_as<T>(v);
  }
}

template <typename T>
Q1M_DEVICE T shared_load_remote(Shared<T> from) {
  using detail::bits_as;
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if constexpr (sizeof(T) == 4) {
    uint32_t v;
    asm volatile("ld.shared::cluster.b32 %0, [%1];" : "=r"(v) : "r"(from.address) : "memory");
    return bits_as<T>(v);
  } else {
    uint64_t v;
    asm volatile("ld.shared::cluster.b64 %0, [%1];" : "=l"(v) : "r"(from.address) : "memory");
    return bits_as<T>(v);
  }
}

template <typename T>
Q1M_DEVICE void shared_store(Shared<T> to, T value) {
  using detail::bits_as;
  if constexpr (sizeof(T) == 2) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(to.address), "h"(bits_as<uint16_t>(value))
                 : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to.address), "r"(bits_as<uint32_t>(value))
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    const auto v = bits_as<detail::Words2>(value);
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to.address), "r"(v.word[0]),
                 "r"(v.word[1])
                 : "memory");
  } else {
    static_assert(sizeof(T) == 16, "shared_store: T of 2, 4, 8 or 16 bytes");
    const auto v = bits_as<Vec16>(value);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to.address), "r"(v.word[0]),
                 "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
                 : "memory");
  }
}

namespace detail {

/// Address in the .global window, for the forms of an instruction that name the state space.
Q1M_DEVICE uint64_t global_address(const void* pointer) {
  return static_cast<uint64_t>(__cvta_generic_to_global(pointer));
}

}  // namespace detail

// ld.global<kind> of T by size.
#define Q1M_GLOBAL_LOAD(kind, T, from)                                                \
  const uint64_t at = detail::global_address(from);                                   \
  if constexpr (sizeof(T) == 1) {                                                     \
    uint32_t v; /* a register may be wider than the access */                         \
    asm volatile("ld.global" kind ".u8 %0, [%1];" : "=r"(v) : "l"(at) : "memory");    \
    return detail::bits_as<T>(static_cast<uint8_t>(v));                               \
  } else if constexpr (sizeof(T) == 2) {                                              \
    uint16_t v;                                                                       \
    asm volatile("ld.global" kind ".b16 %0, [%1];" : "=h"(v) : "l"(at) : "memory");   \
    return detail::bits_as<T>(v);                                                     \
  } else if constexpr (sizeof(T) == 4) {                                              \
    uint32_t v;                                                                       \
    asm volatile("ld.global" kind ".b32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");   \
    return detail::bits_as<T>(v);                                                     \
  } else if constexpr (sizeof(T) == 8) {                                              \
    detail::Words2 v;                                                                 \
    asm volatile("ld.global" kind ".v2.b32 {%0, %1}, [%2];"                           \
                 : "=r"(v.word[0]), "=r"(v.word[1])                                   \
                 : "l"(at)                                                            \
                 : "memory");                                                         \
    return detail::bits_as<T>(v);                                                     \
  } else {                                                                            \
    static_assert(sizeof(T) == 16, "global load: T of 1, 2, 4, 8 or 16 bytes");       \
    Vec16 v;                                                                          \
    asm volatile("ld.global" kind ".v4.b32 {%0, %1, %2, %3}, [%4];"                   \
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) \
                 : "l"(at)                                                            \
                 : "memory");                                                         \
    return detail::bits_as<T>(v);                                                     \
  }

template <typename T>
Q1M_DEVICE T global_load(const T* from) {
  Q1M_GLOBAL_LOAD(".nc", T, from)
}
template <typename T>
Q1M_DEVICE T global_load_coherent(const T* from) {
  Q1M_GLOBAL_LOAD("", T, from)
}
#undef Q1M_GLOBAL_LOAD

template <typename T>
Q1M_DEVICE void global_store(T* to, T value) {
  using detail::bits_as;
  const uint64_t at = detail::global_address(to);
  if constexpr (sizeof(T) == 1) {
    asm volatile("st.global.u8 [%0], %1;" ::"l"(at), "r"(uint32_t{bits_as<uint8_t>(value)})
                 : "memory");
  } else if constexpr (sizeof(T) == 2) {
    asm volatile("st.global.b16 [%0], %1;" ::"l"(at), "h"(bits_as<uint16_t>(value)) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.global.b32 [%0], %1;" ::"l"(at), "r"(bits_as<uint32_t>(value)) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    const auto v = bits_as<detail::Words2>(value);
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(at), "r"(v.word[0]), "r"(v.word[1])
                 : "memory");
  } else {
    static_assert(sizeof(T) == 16, "global_store: T of 1, 2, 4, 8 or 16 bytes");
    const auto v = bits_as<Vec16>(value);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.word[0]),
                 "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
                 : "memory");
  }
}

Q1M_DEVICE uint32_t global_load_acquire(const uint32_t* from) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(v)
               : "l"(detail::global_address(from))
               : "memory");
  return v;
}

Q1M_DEVICE void global_store_release(uint32_t* to, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(detail::global_address(to)), "r"(value)
               : "memory");
}

Q1M_DEVICE uint32_t atomic_add(uint32_t* at, uint32_t value) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(detail::global_address(at)), "r"(value)
               : "memory");
  return old;
}

Q1M_DEVICE void reduce_add(float* at, float value) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(detail::global_address(at)),
               "f"(value)
               : "memory");
}

Q1M_DEVICE void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// --- cp.async, sm_80 ---------------------------------------------------------------------------

Q1M_DEVICE void cp_async_16(Shared<void> to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address),
               "l"(detail::global_address(from)), "r"(valid ? 16 : 0)
               : "memory");
}

Q1M_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
Q1M_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace qwen1m::arch
