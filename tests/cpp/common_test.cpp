// csrc/common: the choice of the instruction set, the texts of argument errors, exp.
#include <cmath>
#include <limits>

#include "common/check.h"
#include "common/cpu_features.h"
#include "common/math.h"
#include "inputs.h"
#include "test.h"

namespace qwen1m {
namespace {

Q1M_TEST(isa_names_round_trip) {
  for (const CpuIsa isa : {CpuIsa::kPortable, CpuIsa::kAvx512, CpuIsa::kAvx512Bf16, CpuIsa::kAmx}) {
    EXPECT(parse_cpu_isa(cpu_isa_name(isa)) == isa);
  }
  EXPECT(!parse_cpu_isa("AVX512"));
}

Q1M_TEST(the_environment_only_lowers_the_isa) {
  EXPECT(choose_cpu_isa(CpuIsa::kAvx512, nullptr) == CpuIsa::kAvx512);
  EXPECT(choose_cpu_isa(CpuIsa::kAvx512, "") == CpuIsa::kAvx512);
  EXPECT(choose_cpu_isa(CpuIsa::kAmx, "portable") == CpuIsa::kPortable);
  EXPECT(choose_cpu_isa(CpuIsa::kAvx512, "avx512") == CpuIsa::kAvx512);
  EXPECT_ERROR(
      "QWEN1M_CPU_ISA: amx is not available here: this machine and this build go up to "
      "avx512; unset it or lower it",
      choose_cpu_isa(CpuIsa::kAvx512, "amx"));
  EXPECT_ERROR("QWEN1M_CPU_ISA: expected portable, avx512, avx512_bf16 or amx, got 'sse'",
               choose_cpu_isa(CpuIsa::kAmx, "sse"));
  EXPECT(cpu_isa() <= machine_cpu_isa() && cpu_isa() <= compiled_cpu_isa());
}

Q1M_TEST(shapes_bind_names) {
  std::vector<float> data(64);
  ArgCheck args("op");
  args.shape("a", test::view(data, {2, 3}), {"rows", "D"});
  EXPECT_EQ(args.size("rows"), 2);
  args.shape("b", test::view(data, {3, 4, 2}), {"D", 4, {"D - 1", 2}});
  EXPECT_ERROR("op: c: expected shape [pages, D=3, 128], got [5, 4, 1]",
               args.shape("c", test::view(data, {5, 4, 1}), {"pages", "D", 128}));
  EXPECT_ERROR("op: c: expected shape [n, n], got [2, 3]",
               args.shape("c", test::view(data, {2, 3}), {"n", "n"}));
  EXPECT_ERROR("op: c: expected shape [2 D=6], got [5]",
               args.shape("c", test::view(data, {5}), {{"2 D", 6}}));
}

Q1M_TEST(strides_are_checked_where_they_matter) {
  std::vector<float> data(64);
  const ArgCheck args("op");
  auto rows = test::view(data, {4, 3}, 5);
  args.dense_from(1, "a", rows);
  args.separate_rows("a", rows);
  EXPECT_ERROR("op: a: expected a contiguous tensor, got shape [4, 3] with strides [5, 1]",
               args.dense_from(0, "a", rows));
  rows.strides = {2, 1};
  EXPECT_ERROR(
      "op: a: expected rows that do not overlap, because they are written, got shape [4, 3] with "
      "strides [2, 1]",
      args.separate_rows("a", rows));
  rows.strides = {1, 4};
  EXPECT_ERROR("op: a: expected a contiguous last dimension, got shape [4, 3] with strides [1, 4]",
               args.dense_from(1, "a", rows));
  rows.sizes = {4, 1};  // a stride nobody steps along is free
  args.dense_from(1, "a", rows);
  rows.sizes = {0, 3};
  args.dense_from(0, "a", rows);
}

Q1M_TEST(exp_is_within_2_ulp) {
  double worst = 0;
  for (uint32_t bits = 0; bits <= std::bit_cast<uint32_t>(87.3f); bits += 997) {
    const float x = -std::bit_cast<float>(bits);
    const float value = exp_nonpositive(x);
    const float ulp = std::nextafter(value, 2.0f) - value;
    worst = std::max(worst, std::abs(value - std::exp(static_cast<double>(x))) / ulp);
  }
  std::printf("     worst error of exp: %.2f ulp\n", worst);
  EXPECT(worst <= 2.0);
  EXPECT(exp_nonpositive(0.0f) == 1.0f);
  EXPECT(exp_nonpositive(-std::numeric_limits<float>::infinity()) == 0.0f);
  EXPECT(exp_nonpositive(-1e30f) == 0.0f);
  EXPECT(std::abs(exp_nonpositive(-100.0f) - std::exp(-100.0)) <= 2e-45);  // subnormal
  EXPECT(std::isnan(exp_nonpositive(std::numeric_limits<float>::quiet_NaN())));
  EXPECT(sigmoid(-std::numeric_limits<float>::infinity()) == 0.0f);
  EXPECT(sigmoid(std::numeric_limits<float>::infinity()) == 1.0f);
  EXPECT(sigmoid(0.0f) == 0.5f);
}

}  // namespace
}  // namespace qwen1m
