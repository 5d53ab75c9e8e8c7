#pragma once
/// mbarriers and copies.

#include "conformance_case.h"

namespace qwen1m::conformance {

using namespace arch;  // NOLINT: the kernels below read as kernels do

/// mbarrier.init/arrive/expect_tx/try_wait: the sequence of phases and parities, with a bulk copy.
struct MbarrierProbe {
  static constexpr const char* kName = "mbarrier";
  static constexpr int kThreads = 32;
  static constexpr int kBlocks = 1;
  static constexpr int kCluster = 1;
  struct Layout {
    uint32_t data[64];
    Mbarrier bar;
  };

  static Q1M_DEVICE void run(const Params& p) {
    const auto shared = shared_memory<Layout>();
    const auto data = Q1M_SHARED_MEMBER(shared, data);
    const auto bar = Q1M_SHARED_MEMBER(shared, bar);
    if (thread_index() == 0) {
      mbarrier_init(bar, 2);
      fence_mbarrier_init();
    }
    block_sync();
    if (thread_index() != 0) return;
    const auto note = [&](int i, bool ended) { global_store(p.out + i, ended ? 1U : 0U); };
    mbarrier_wait(bar, 1);  // "the phase before" has ended
    note(0, mbarrier_try_wait(bar, 0));
    mbarrier_arrive(bar);
    note(1, mbarrier_try_wait(bar, 0));
    mbarrier_arrive(bar);
    mbarrier_wait(bar, 0);
    note(2, mbarrier_try_wait(bar, 1));
    mbarrier_arrive_expect_tx(bar, 256);
    bulk_load(data.as<void>(), p.in, 256, bar);
    note(3, mbarrier_try_wait(bar, 1));  // one arrival is missing
    mbarrier_arrive(bar);
    mbarrier_wait(bar, 1);
    for (int i = 0; i < 64; ++i) global_store(p.out + 4 + i, shared_load(data[i]));
    mbarrier_arrive(bar);
    mbarrier_arrive(bar);
    mbarrier_wait(bar, 0);
    note(68, mbarrier_try_wait(bar, 1));
  }

  static std::vector<Case> cases() {
    Case test;
    test.expected = {0, 0, 0, 0};
    for (uint32_t i = 0; i < 64; ++i) test.in.push_back(i * 2654435761U);
    test.expected.insert(test.expected.end(), test.in.begin(), test.in.end());
    test.expected.push_back(0);
    return {test};
  }
};

/// A tensor of rank 5 with gaps between its rows, and the value of an element.
struct Tensor5 {
  int element_bytes;
  int64_t sizes[5] = {40, 6, 3, 2, 2};
  int64_t strides[5] = {};  // bytes
  int64_t bytes = 0;

  explicit Tensor5(int bytes_of_element) : element_bytes(bytes_of_element) {
    strides[0] = element_bytes;
    strides[1] = (sizes[0] * element_bytes + 15) / 16 * 16 + 16;
    for (int i = 2; i < 5; ++i) strides[i] = strides[i - 1] * sizes[i - 1] + 16;
    bytes = strides[4] * sizes[4];
  }
  bool holds(const int64_t (&at)[5]) const {
    for (int i = 0; i < 5; ++i) {
      if (at[i] < 0 || at[i] >= sizes[i]) return false;
    }
    return true;
  }
  int64_t offset(const int64_t (&at)[5]) const {
    int64_t offset = 0;
    for (int i = 0; i < 5; ++i) offset += at[i] * strides[i];
    return offset;
  }
  TensorMapSpec spec(Swizzle swizzle, const uint32_t (&box)[5]) const {
    TensorMapSpec spec;
    spec.element_bytes = element_bytes;
    spec.swizzle = swizzle;
    for (int i = 0; i < 5; ++i) {
      spec.sizes[i] = static_cast<uint64_t>(sizes[i]);
      spec.box[i] = box[i];
      if (i > 0) spec.stride_bytes[i - 1] = static_cast<uint64_t>(strides[i]);
    }
    return spec;
  }
};

/// Byte of a tile of rows of `width` bytes: the swizzle exchanges 16-byte chunks inside 8 rows of
/// 128 bytes, 4 pairs of rows of 64 bytes, 2 quadruples of rows of 32 bytes.
inline size_t tile_byte(int swizzle, size_t width, size_t row, size_t byte) {
  const size_t chunk = byte / 16;
  size_t moved = chunk;
  if (swizzle == 128) moved = chunk ^ (row % 8);
  if (swizzle == 64) moved = chunk ^ (row / 2 % 4);
  if (swizzle == 32) moved = chunk ^ (row / 4 % 2);
  return row * width + moved * 16 + byte % 16;
}

/// Calls f(row in the box, element in the row, coordinates).
template <typename Function>
void for_each_element(const uint32_t (&box)[5], const int32_t (&at)[5], const Function& f) {
  size_t row = 0;
  for (uint32_t e = 0; e < box[4]; ++e) {
    for (uint32_t d = 0; d < box[3]; ++d) {
      for (uint32_t c = 0; c < box[2]; ++c) {
        for (uint32_t b = 0; b < box[1]; ++b, ++row) {
          for (uint32_t a = 0; a < box[0]; ++a) {
            const int64_t element[5] = {at[0] + int64_t{a}, at[1] + int64_t{b}, at[2] + int64_t{c},
                                        at[3] + int64_t{d}, at[4] + int64_t{e}};
            f(row, size_t{a}, element);
          }
        }
      }
    }
  }
}

inline constexpr int32_t kPositions[5][5] = {{0, 0, 0, 0, 0},     // inside
                                             {8, 3, 1, 1, 0},     // some past the end
                                             {-3, -2, 0, 0, 0},   // some before the start
                                             {33, 4, 2, -1, 1},   // only the end of a row
                                             {100, 0, 0, 0, 0}};  // nothing inside

inline std::string position_name(int swizzle, int element_bytes, int position) {
  return "swizzle " + std::to_string(swizzle) + ", " + std::to_string(element_bytes) +
         "-byte elements, position " + std::to_string(position);
}

/// TMA load: the four swizzles, elements outside the tensor.
struct TmaLoadProbe {
  static constexpr const char* kName = "tma_load";
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 1;
  static constexpr int kCluster = 1;
  static constexpr uint32_t kRows = 16;
  struct Layout {
    alignas(1024) uint32_t tile[kRows * 32];
    Mbarrier bar;
  };

  static Q1M_DEVICE void run(const Params& p) {
    const auto shared = shared_memory<Layout>();
    const auto tile = Q1M_SHARED_MEMBER(shared, tile);
    const auto bar = Q1M_SHARED_MEMBER(shared, bar);
    const int words = p.argument[5];
    if (thread_index() == 0) {
      mbarrier_init(bar, 1);
      fence_mbarrier_init();
    }
    block_sync();
    if (thread_index() == 0) {
      mbarrier_arrive_expect_tx(bar, static_cast<uint32_t>(words) * 4);
      tma_load(tile.as<void>(), p.map, bar,
               {{p.argument[0], p.argument[1], p.argument[2], p.argument[3], p.argument[4]}});
    }
    mbarrier_wait(bar, 0);
    for (int i = thread_index(); i < words; i += kThreads) {
      global_store(p.out + i, shared_load(tile[i]));
    }
  }

  static std::vector<Case> cases() {
    std::vector<Case> all;
    for (const int element_bytes : {2, 4}) {
      const Tensor5 tensor(element_bytes);
      for (const int swizzle : {0, 32, 64, 128}) {
        const size_t width = swizzle == 0 ? 64 : static_cast<size_t>(swizzle);
        const uint32_t box[5] = {
            static_cast<uint32_t>(width) / static_cast<uint32_t>(element_bytes), 4, 2, 1, 2};
        for (int position = 0; position < 5; ++position) {
          Case test;
          test.name = position_name(swizzle, element_bytes, position);
          test.in.resize(static_cast<size_t>(tensor.bytes / 4));
          for (size_t i = 0; i < test.in.size(); ++i) {
            test.in[i] = static_cast<uint32_t>(i) * 2654435761U | 0x10001;
          }
          test.has_map = true;
          test.map = tensor.spec(static_cast<Swizzle>(swizzle), box);
          test.expected.assign(kRows * width / 4, 0);
          for_each_element(
              box, kPositions[position], [&](size_t row, size_t element, const int64_t (&at)[5]) {
                if (!tensor.holds(at)) return;
                const auto bytes = static_cast<size_t>(element_bytes);
                put_bytes(
                    test.expected, tile_byte(swizzle, width, row, element * bytes),
                    reinterpret_cast<const unsigned char*>(test.in.data()) + tensor.offset(at),
                    bytes);
              });
          test.argument.assign(kPositions[position], kPositions[position] + 5);
          test.argument.push_back(static_cast<int32_t>(test.expected.size()));
          all.push_back(test);
        }
      }
    }
    return all;
  }
};

/// TMA store: elements outside the tensor are not written, nor are the gaps between rows.
struct TmaStoreProbe {
  static constexpr const char* kName = "tma_store";
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 1;
  static constexpr int kCluster = 1;
  using Layout = TmaLoadProbe::Layout;

  static Q1M_DEVICE void run(const Params& p) {
    const auto tile = Q1M_SHARED_MEMBER(shared_memory<Layout>(), tile);
    for (int i = thread_index(); i < p.argument[5]; i += kThreads) {
      shared_store(tile[i], global_load(p.in + i));
    }
    fence_proxy_async();
    block_sync();
    if (thread_index() == 0) {
      tma_store(p.map, tile.as<void>(),
                {{p.argument[0], p.argument[1], p.argument[2], p.argument[3], p.argument[4]}});
      bulk_commit();
      bulk_wait_read<0>();
    }
  }

  static std::vector<Case> cases() {
    std::vector<Case> all = TmaLoadProbe::cases();
    for (Case& test : all) {
      const int element_bytes = test.map.element_bytes;
      const int swizzle = static_cast<int>(test.map.swizzle);
      const size_t width = test.map.box[0] * static_cast<size_t>(element_bytes);
      const Tensor5 tensor(element_bytes);
      const size_t tile_words = test.expected.size();
      test.in.resize(tile_words);
      for (size_t i = 0; i < tile_words; ++i) test.in[i] = static_cast<uint32_t>(i) * 40503U + 1;
      test.map_is_of_out = true;
      test.expected.assign(static_cast<size_t>(tensor.bytes / 4), kUntouched);
      int32_t position[5];
      for (size_t i = 0; i < 5; ++i) position[i] = test.argument[i];
      for_each_element(
          test.map.box, position, [&](size_t row, size_t element, const int64_t (&at)[5]) {
            if (!tensor.holds(at)) return;
            const auto bytes = static_cast<size_t>(element_bytes);
            const size_t from = tile_byte(swizzle, width, row, element * bytes);
            put_bytes(test.expected, static_cast<size_t>(tensor.offset(at)),
                      reinterpret_cast<const unsigned char*>(test.in.data()) + from, bytes);
          });
    }
    return all;
  }
};

/// Bulk copies without a tensor map, in and out.
struct BulkProbe {
  static constexpr const char* kName = "bulk_load, bulk_store";
  static constexpr int kThreads = 32;
  static constexpr int kBlocks = 2;
  static constexpr int kCluster = 1;
  struct Layout {
    alignas(16) uint32_t data[260];
    Mbarrier bar;
  };

  static Q1M_DEVICE void run(const Params& p) {
    const auto shared = shared_memory<Layout>();
    const auto data = Q1M_SHARED_MEMBER(shared, data);
    const auto bar = Q1M_SHARED_MEMBER(shared, bar);
    if (thread_index() != 0) return;
    mbarrier_init(bar, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(bar, 1040);
    const uint32_t* from = p.in + block_index() * 260;
    bulk_load(data.as<void>(), from, 16, bar);
    bulk_load(data[4].as<void>(), from + 4, 1024, bar);
    mbarrier_wait(bar, 0);
    shared_store(data[259], shared_load(data[0]) + 1);
    fence_proxy_async();
    uint32_t* to = p.out + block_index() * 264;
    bulk_store(to, data.as<void>(), 512);
    bulk_commit();
    bulk_store(to + 132, data[128].as<void>(), 528);
    bulk_commit();
    bulk_wait_read<1>();
    shared_store(data[0], 0U);  // the first group has been read
    bulk_wait<0>();
  }

  static std::vector<Case> cases() {
    Case test;
    for (uint32_t i = 0; i < 520; ++i) test.in.push_back(i + 1000);
    test.expected.assign(528, kUntouched);
    for (size_t block = 0; block < 2; ++block) {
      const uint32_t* in = test.in.data() + block * 260;
      uint32_t* out = test.expected.data() + block * 264;
      for (size_t i = 0; i < 128; ++i) out[i] = in[i];
      for (size_t i = 128; i < 260; ++i) out[i + 4] = in[i];
      out[263] = in[0] + 1;
    }
    return {test};
  }
};

/// cp.async: groups, and zeros where `valid` is false.
struct CpAsyncProbe {
  static constexpr const char* kName = "cp_async_16";
  static constexpr int kThreads = 64;
  static constexpr int kBlocks = 1;
  static constexpr int kCluster = 1;
  struct Layout {
    Vec16 rows[2][kThreads];
  };

  static Q1M_DEVICE void run(const Params& p) {
    const auto rows = Q1M_SHARED_MEMBER(shared_memory<Layout>(), rows);
    const int t = thread_index();
    for (int i = 0; i < 2; ++i) {
      cp_async_16(rows[i][t].as<void>(), p.in + 4 * (t + i * kThreads), t % 3 != i);
      cp_async_commit();
    }
    cp_async_wait<1>();
    block_sync();
    const int other = kThreads - 1 - t;
    store(p.out + 4 * t, shared_load(rows[0][other]));
    cp_async_wait<0>();
    block_sync();
    store(p.out + 4 * (t + kThreads), shared_load(rows[1][other]));
  }
  static Q1M_DEVICE void store(uint32_t* to, Vec16 value) {
    for (int i = 0; i < 4; ++i) global_store(to + i, value.word[i]);
  }

  static std::vector<Case> cases() {
    Case test;
    for (uint32_t i = 0; i < 8 * kThreads; ++i) test.in.push_back(i + 7);
    test.expected.assign(8 * kThreads, 0);
    for (int i = 0; i < 2; ++i) {
      for (int t = 0; t < kThreads; ++t) {
        const int other = kThreads - 1 - t;
        for (int j = 0; j < 4 && other % 3 != i; ++j) {
          test.expected[static_cast<size_t>(4 * (t + i * kThreads) + j)] =
              test.in[static_cast<size_t>(4 * (other + i * kThreads) + j)];
        }
      }
    }
    return {test};
  }
};

}  // namespace qwen1m::conformance
