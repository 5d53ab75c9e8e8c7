// Rules inside a block and between blocks that need no copies and no wgmma.

#include "emulator_test.h"

namespace qwen1m::arch {
namespace {

struct Layout {
  uint32_t words[256];
  Vec16 rows[32];
};

struct Output {
  explicit Output(size_t words_in_it = 1024)
      : words(static_cast<uint32_t*>(emu::allocate_global(words_in_it * 4, "out"))) {
    for (size_t i = 0; i < words_in_it; ++i) words[i] = 0;
  }
  ~Output() { emu::free_global(words); }
  uint32_t* words;
};

emu::LaunchShape shape(int64_t blocks, int threads) {
  return {.blocks = blocks, .threads = threads, .shared_bytes = sizeof(Layout)};
}
Shared<uint32_t> word(int i) {
  const auto smem = shared_memory<Layout>();
  return Q1M_SHARED_MEMBER(smem, words)[i];
}

Q1M_TEST(neighbours_exchange) {
  const auto kernel = [](bool barrier) {
    shared_store(word(thread_index()), 1U);
    if (barrier) block_sync();
    shared_load(word((thread_index() + 33) % 128));
  };
  EXPECT_CLEAN(shape(2, 128), [&] { kernel(true); });
  EXPECT_CAUGHT("race-read-after-write|race-write-after-read|uninitialised", shape(1, 128),
                [&] { kernel(false); });
}

Q1M_TEST(uninitialised_shared_memory) {
  EXPECT_CAUGHT("uninitialised", shape(1, 32), [] { shared_load(word(0)); });
}

Q1M_TEST(misaligned_access) {
  EXPECT_CAUGHT("alignment", shape(1, 32), [] { shared_load(word(1).as<Vec16>()); });
}

Q1M_TEST(divergent_warp) {
  const auto kernel = [](bool divergent) {
    float x = static_cast<float>(thread_index());
    if (!divergent || lane_index() < 16) {
      x += shuffle_xor(x, 1);
    } else {
      x += shuffle_xor(x, 2);
    }
  };
  EXPECT_CLEAN(shape(1, 64), [&] { kernel(false); });
  EXPECT_CAUGHT("divergence", shape(1, 64), [&] { kernel(true); });
  EXPECT_CAUGHT("deadlock", shape(1, 64), [] {
    if (lane_index() < 16) warp_sync();
  });
}

Q1M_TEST(named_barriers) {
  const auto kernel = [](int threads_of_second, bool twice) {
    if (warp_index() == 0) {
      shared_store(word(lane_index()), 7U);
      named_barrier_arrive<1>(64);
      if (twice) named_barrier_arrive<1>(64);
    } else {
      named_barrier_sync<1>(threads_of_second);
      shared_load(word(lane_index()));
    }
  };
  EXPECT_CLEAN(shape(1, 64), [&] { kernel(64, false); });
  EXPECT_CAUGHT("named-barrier", shape(1, 64), [&] { kernel(32, false); });
  EXPECT_CAUGHT("named-barrier", shape(1, 64), [&] { kernel(64, true); });
}

Q1M_TEST(register_pool) {
  // 384 threads: 168 registers each at launch.
  EXPECT_CLEAN(shape(1, 384), [] {
    if (warp_index() < 4) {
      registers_decrease<40>();
    } else {
      registers_increase<232>();
    }
  });
  EXPECT_CAUGHT("deadlock", shape(1, 384), [] {
    if (warp_index() < 4) {
      registers_decrease<48>();
    } else {
      registers_increase<232>();
    }
  });
  EXPECT_CAUGHT("registers", shape(1, 384), [] { registers_increase<40>(); });
  EXPECT_CAUGHT("registers", shape(1, 384), [] {
    if (warp_index() < 3) registers_decrease<40>();
  });
}

Q1M_TEST(cp_async) {
  Output out;
  const auto kernel = [&](bool wait, bool barrier) {
    const auto rows = Q1M_SHARED_MEMBER(shared_memory<Layout>(), rows);
    cp_async_16(rows[lane_index()].as<void>(), out.words + 4 * lane_index(), true);
    cp_async_commit();
    if (wait) cp_async_wait<0>();
    if (barrier) block_sync();
    shared_load(rows[lane_index() ^ 1]);
    if (!wait) cp_async_wait<0>();
  };
  EXPECT_CLEAN(shape(1, 32), [&] { kernel(true, true); });
  EXPECT_CAUGHT("race-read-after-write", shape(1, 32), [&] { kernel(false, true); });
  EXPECT_CAUGHT("race-read-after-write|uninitialised", shape(1, 32), [&] { kernel(true, false); });
  EXPECT_CAUGHT("exit-in-flight", shape(1, 32), [&] {
    const auto rows = Q1M_SHARED_MEMBER(shared_memory<Layout>(), rows);
    cp_async_16(rows[lane_index()].as<void>(), nullptr, false);
    cp_async_commit();
  });
}

Q1M_TEST(two_blocks_store_one_word) {
  Output out;
  const auto kernel = [&](int64_t stride) {
    global_store(out.words + block_index() * stride + thread_index(), 1U);
  };
  EXPECT_CLEAN(shape(8, 32), [&] { kernel(32); });
  EXPECT_CAUGHT("global-race", shape(8, 32), [&] { kernel(31); });
}

enum class Merge { kAtomic, kPlainCounter, kNoBarrier, kReadOnlyPath };

/// The block that finishes last adds up what all blocks wrote.
void merge(uint32_t* out, Merge how) {
  const int64_t blocks = num_blocks();
  const int t = thread_index();
  uint32_t* parts = out + 64;
  uint32_t* counter = out + 32;
  global_store(parts + block_index() * 64 + t, static_cast<uint32_t>(block_index()) + 1);
  if (how != Merge::kNoBarrier) block_sync();
  if (t == 0) {
    uint32_t before = 0;
    if (how == Merge::kPlainCounter) {
      before = global_load_coherent(counter);
      global_store(counter, before + 1);
    } else {
      fence_device();
      before = atomic_add(counter, 1);
    }
    shared_store(word(0), before);
  }
  block_sync();
  if (shared_load(word(0)) != static_cast<uint32_t>(blocks) - 1) return;
  uint32_t sum = 0;
  for (int64_t i = 0; i < blocks; ++i) {
    const uint32_t* part = parts + i * 64 + (63 - t);
    sum += how == Merge::kReadOnlyPath ? global_load(part) : global_load_coherent(part);
  }
  if (t < 32) global_store(out + t, sum);
  if (t == 0 && how == Merge::kAtomic) global_store(counter, 0U);
}

Q1M_TEST(last_block_merges) {
  Output out;
  const auto run = [&](uint64_t seed, Merge how) {
    out.words[32] = 0;  // the counter
    return emu::launch(shape(10, 64), [&] { merge(out.words, how); }, test::options_of_seed(seed));
  };
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const emu::Report clean = run(seed, Merge::kAtomic);
    test::report_case(clean.ok(), __FILE__, __LINE__, seed, "a clean run", clean);
    EXPECT_EQ(out.words[0], 55U);
    EXPECT(run(seed, Merge::kPlainCounter).has("global-race"));
    EXPECT(run(seed, Merge::kNoBarrier).has("global-race"));
    EXPECT(run(seed, Merge::kReadOnlyPath).has("global-read-only"));
  }
}

Q1M_TEST(flag_between_blocks) {
  Output out;
  const auto kernel = [&](bool release, bool acquire) {
    uint32_t* data = out.words;
    uint32_t* flag = out.words + 64;
    if (block_index() == 0) {
      global_store(data + thread_index(), 5U);
      block_sync();
      if (thread_index() == 0) {
        if (release) {
          global_store_release(flag, 1);
        } else {
          global_store(flag, 1U);
        }
      }
    } else {
      if (thread_index() == 0) {
        while (acquire && global_load_acquire(flag) == 0) {
        }
      }
      block_sync();
      global_load_coherent(data + thread_index());
    }
  };
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const auto options = test::options_of_seed(seed);
    const auto run = [&](bool release, bool acquire) {
      out.words[64] = 0;
      return emu::launch(shape(2, 64), [&] { kernel(release, acquire); }, options);
    };
    const emu::Report clean = run(true, true);
    test::report_case(clean.ok(), __FILE__, __LINE__, seed, "a clean run", clean);
    EXPECT(run(false, true).has("global-race"));
    EXPECT(run(true, false).has("global-race"));
  }
}

Q1M_TEST(polling_forever) {
  Output out;
  const emu::Report report = emu::launch(shape(1, 32), [&] {
    while (global_load_acquire(out.words) == 0) {
    }
  });
  EXPECT(report.has("deadlock"));
}

Q1M_TEST(host_buffers) {
  uint32_t host[32] = {1};
  emu::register_global(host, sizeof(host), "host", false);
  EXPECT_CLEAN(shape(2, 32), [&] { global_load(host + lane_index()); });
  EXPECT_CAUGHT("global-read-only", shape(1, 32), [&] { global_store(host + lane_index(), 1U); });
  emu::unregister_global(host);
  EXPECT_CAUGHT("global-bounds", shape(1, 32), [&] { global_load(host + lane_index()); });
}

Q1M_TEST(huge_allocation) {
  const size_t elements = (size_t{1} << 32) + 64;
  auto* data = static_cast<uint32_t*>(emu::allocate_global_lazily(elements * 4, "huge"));
  EXPECT_CLEAN(shape(1, 32), [&] {
    uint32_t* at = data + (int64_t{1} << 32) + lane_index();
    global_store(at, 3U);
    global_load_coherent(at);
  });
  EXPECT_EQ(data[(size_t{1} << 32) + 31], 3U);
  emu::free_global(data);
}

Q1M_TEST(exceptions_of_the_kernel_reach_the_host) {
  EXPECT_ERROR("from the kernel", emu::launch(shape(3, 64), [] {
                 if (thread_index() == 40) throw Error("from the kernel");
                 block_sync();
               }));
}

Q1M_TEST(tensor_map_arguments) {
  Output out;
  const auto spec = [&] {
    TensorMapSpec good;
    good.base = out.words;
    good.element_bytes = 4;
    good.sizes[0] = 32;
    good.sizes[1] = 8;
    good.stride_bytes[0] = 128;
    good.box[0] = 32;
    good.swizzle = Swizzle::k128;
    return good;
  };
  emu::make_tensor_map(spec());
  auto bad = spec();
  bad.element_bytes = 3;
  EXPECT_ERROR("make_tensor_map: element_bytes: expected 2 or 4, got 3", emu::make_tensor_map(bad));
  bad = spec();
  bad.stride_bytes[0] = 120;
  EXPECT_ERROR("make_tensor_map: stride_bytes[0]: expected a multiple of 16 below 2^40, got 120",
               emu::make_tensor_map(bad));
  bad = spec();
  bad.box[1] = 257;
  EXPECT_ERROR("make_tensor_map: box[1]: expected 1 to 256, got 257", emu::make_tensor_map(bad));
  bad = spec();
  bad.box[0] = 33;
  EXPECT_ERROR("make_tensor_map: box[0]: expected elements of a multiple of 16 bytes, got 33",
               emu::make_tensor_map(bad));
  bad = spec();
  bad.box[0] = 64;
  EXPECT_ERROR("make_tensor_map: box[0]: expected at most the bytes of the swizzle, got 64",
               emu::make_tensor_map(bad));
  bad = spec();
  bad.sizes[1] = 33;
  EXPECT_ERROR(
      "make_tensor_map: sizes and stride_bytes: expected at most the 4096 bytes left in "
      "'out', got 4224",
      emu::make_tensor_map(bad));
}

}  // namespace
}  // namespace qwen1m::arch
