// One warpgroup: operands written by the threads, wgmma, and the result stored by a bulk copy.

#include "emulator_test.h"

namespace qwen1m::arch {
namespace {

constexpr int kN = 64;

struct Layout {
  alignas(1024) unsigned char a[64 * 128];  // 64 x 64, K-major, 128-byte swizzle
  alignas(1024) unsigned char b[kN * 128];  // kN x 64, the same
  alignas(1024) float d[64 * kN];
};

enum class Bug {
  kNone,
  kNoProxyFence,
  kProxyFenceOfReader,
  kNoBarrier,
  kNoWgmmaFence,
  kNotListed,
  kWrittenAfterFence,
  kNoCommit,
  kNoWait,
  kWeakWait,
  kWaitDoesNotList,
  kAccumulatorReadInFlight,
  kAccumulatorScaledInFlight,
  kARepacked,
  kOperandOverwritten,
  kOtherOperands,
  kDescriptorOffTheAtom,
  kDescriptorOutOfBounds,
  kStoreNotFenced,
  kStoreNotWaited,
  kStoreSourceOverwritten,
};

/// d = a b + rs b, where a[m][k] = (m + k) % 4, b[n][k] = (n - k) % 3, and rs is 1 everywhere.
void kernel(float* out, Bug bug) {
  const auto smem = shared_memory<Layout>();
  const auto a = Q1M_SHARED_MEMBER(smem, a);
  const auto b = Q1M_SHARED_MEMBER(smem, b);
  const int t = thread_index();
  for (int i = t; i < 64 * 32; i += 128) {
    const int row = i / 32;
    const int k = i % 32 * 2;
    const uint32_t at = swizzled_128(static_cast<uint32_t>(row), static_cast<uint32_t>(k) * 2);
    const auto value = [&](int x, int y) {
      return pack_bf16(static_cast<float>(x), static_cast<float>(y));
    };
    shared_store(Shared<uint32_t>{a.address + at}, value((row + k) % 4, (row + k + 1) % 4));
    shared_store(Shared<uint32_t>{b.address + at}, value((row + 64 - k) % 3, (row + 63 - k) % 3));
  }
  if (bug != Bug::kNoProxyFence && bug != Bug::kProxyFenceOfReader) fence_proxy_async();
  if (bug != Bug::kNoBarrier) block_sync();
  if (bug == Bug::kProxyFenceOfReader) fence_proxy_async();

  float d[kN / 2];
  float other[kN / 2] = {};
  uint32_t rs[4];
  for (uint32_t& pair : rs) pair = pack_bf16(1, 1);
  if (bug == Bug::kNotListed) {
    wgmma_fence(other, rs);
  } else if (bug != Bug::kNoWgmmaFence) {
    wgmma_fence(d, rs);
  }
  if (bug == Bug::kWrittenAfterFence) rs[0] = pack_bf16(1, 2);
  uint32_t start = 0;
  if (bug == Bug::kDescriptorOffTheAtom) start = 128;
  if (bug == Bug::kDescriptorOutOfBounds) start = sizeof(Layout) - 1024;
  if (bug == Bug::kOtherOperands && t == 77) start = 32;
  const auto descriptor = [](uint32_t address) {
    return matrix_descriptor(address, 16, 1024, Swizzle::k128);
  };
  for (uint32_t k = 0; k < 4; ++k) {
    wgmma_ss<kN, Major::kK, Major::kK>(d, descriptor(a.address + start + 32 * k),
                                       descriptor(b.address + 32 * k), k > 0);
  }
  wgmma_rs<kN, Major::kK>(d, rs, descriptor(b.address), true);
  if (bug != Bug::kNoCommit) wgmma_commit();
  if (bug == Bug::kAccumulatorScaledInFlight) d[5] *= 2;
  if (bug == Bug::kAccumulatorReadInFlight) other[0] = d[0];
  if (bug == Bug::kARepacked) rs[2] = 0;
  if (bug == Bug::kOperandOverwritten) {
    shared_store(Shared<uint32_t>{b.address + 4 * static_cast<uint32_t>(t)}, 0U);
  }
  if (bug == Bug::kWeakWait) {
    wgmma_wait<1>(d);
  } else if (bug == Bug::kWaitDoesNotList) {
    wgmma_wait<0>(other);
  } else if (bug != Bug::kNoWait) {
    wgmma_wait<0>(d);
  }

  const auto staged = Q1M_SHARED_MEMBER(smem, d);
  const int row = 16 * (t / 32) + t % 32 / 4;
  for (int i = 0; i < kN / 2; ++i) {
    const int column = 8 * (i / 4) + 2 * (t % 4) + i % 2;
    shared_store(staged[(row + 8 * (i / 2 % 2)) * kN + column], d[i] + other[0]);
  }
  if (bug != Bug::kStoreNotFenced) fence_proxy_async();
  block_sync();
  if (t == 0) {
    bulk_store(out, staged.as<void>(), sizeof(Layout::d));
    bulk_commit();
    if (bug != Bug::kStoreNotWaited && bug != Bug::kStoreSourceOverwritten) bulk_wait_read<0>();
    if (bug == Bug::kStoreSourceOverwritten) {
      shared_store(staged[0], 0.0F);
      bulk_wait_read<0>();
    }
  }
}

const emu::LaunchShape kShape{.blocks = 1, .threads = 128, .shared_bytes = sizeof(Layout)};

struct Output {
  Output() : data(static_cast<float*>(emu::allocate_global(sizeof(Layout::d), "out"))) {}
  ~Output() { emu::free_global(data); }
  float* data;
};

Q1M_TEST(wgmma_is_clean) {
  Output out;
  EXPECT_CLEAN(kShape, [&] { kernel(out.data, Bug::kNone); });
  for (int m = 0; m < 64; ++m) {
    for (int n = 0; n < kN; ++n) {
      int sum = 0;
      for (int k = 0; k < 64; ++k) sum += ((m + k) % 4 + (k < 16)) * ((n + 64 - k) % 3);
      EXPECT_EQ(out.data[m * kN + n], static_cast<float>(sum));
    }
  }
}

void caught(const std::string& kinds, Bug bug) {
  Output out;
  EXPECT_CAUGHT(kinds, kShape, [&] { kernel(out.data, bug); });
}

Q1M_TEST(missing_proxy_fence) { caught("proxy-fence", Bug::kNoProxyFence); }
Q1M_TEST(proxy_fence_of_the_reader_is_none) { caught("proxy-fence", Bug::kProxyFenceOfReader); }
Q1M_TEST(missing_barrier) { caught("race-read-after-write|uninitialised", Bug::kNoBarrier); }
Q1M_TEST(missing_wgmma_fence) { caught("wgmma-fence", Bug::kNoWgmmaFence); }
Q1M_TEST(registers_not_listed) { caught("wgmma-fence", Bug::kNotListed); }
Q1M_TEST(written_after_fence) { caught("wgmma-fence", Bug::kWrittenAfterFence); }
Q1M_TEST(missing_commit) { caught("wgmma-accumulator", Bug::kNoCommit); }
Q1M_TEST(missing_wait) { caught("exit-in-flight", Bug::kNoWait); }
Q1M_TEST(weak_wait) { caught("wgmma-accumulator", Bug::kWeakWait); }
Q1M_TEST(wait_does_not_list) { caught("wgmma-wait-list", Bug::kWaitDoesNotList); }
Q1M_TEST(accumulator_scaled) { caught("wgmma-accumulator", Bug::kAccumulatorScaledInFlight); }
Q1M_TEST(a_registers_repacked) { caught("wgmma-a-registers", Bug::kARepacked); }
Q1M_TEST(operand_overwritten) { caught("race-write-after-read", Bug::kOperandOverwritten); }
Q1M_TEST(operands_differ) { caught("divergence", Bug::kOtherOperands); }
Q1M_TEST(descriptor_off_the_atom) { caught("wgmma-descriptor", Bug::kDescriptorOffTheAtom); }
Q1M_TEST(descriptor_out_of_bounds) { caught("shared-bounds", Bug::kDescriptorOutOfBounds); }
Q1M_TEST(store_not_fenced) { caught("proxy-fence", Bug::kStoreNotFenced); }
Q1M_TEST(store_not_waited_for) { caught("exit-in-flight", Bug::kStoreNotWaited); }
Q1M_TEST(store_source_overwritten) {
  caught("race-write-after-read", Bug::kStoreSourceOverwritten);
}

Q1M_TEST(accumulator_read_in_flight_is_nan) {
  // A mere read of a register cannot be observed: it gives NaN.
  Output out;
  const emu::Report report =
      emu::launch(kShape, [&] { kernel(out.data, Bug::kAccumulatorReadInFlight); });
  EXPECT(report.ok());
  EXPECT(out.data[0] != out.data[0]);
}

}  // namespace
}  // namespace qwen1m::arch
