// The conformance tests under the emulator: every probe with several seeds.

#include "conformance.cuh"
#include "emulator_test.h"

namespace qwen1m::conformance {
namespace {

constexpr uint64_t kSeeds = 6;

std::string hex(uint32_t word) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%08x", word);
  return text;
}

template <typename Probe>
void run_case(const Case& test, uint64_t seed) {
  const size_t in_bytes = test.in.size() * 4;
  const size_t out_bytes = test.expected.size() * 4;
  auto* in = static_cast<uint32_t*>(emu::allocate_global(in_bytes, "in"));
  auto* out = static_cast<uint32_t*>(emu::allocate_global(out_bytes, "out"));
  std::memcpy(in, test.in.data(), in_bytes);
  if (!test.out_start.empty()) std::memcpy(out, test.out_start.data(), out_bytes);
  Params params{};
  params.in = in;
  params.out = out;
  std::copy(test.argument.begin(), test.argument.end(), params.argument);
  if (test.has_map) {
    TensorMapSpec spec = test.map;
    spec.base = test.map_is_of_out ? out : in;
    params.map = emu::make_tensor_map(spec);
  }
  const emu::Report report = emu::launch(
      {.blocks = Probe::kBlocks,
       .threads = Probe::kThreads,
       .cluster_size = Probe::kCluster,
       .shared_bytes = sizeof(typename Probe::Layout)},
      [&] { Probe::run(params); }, test::options_of_seed(seed));
  const std::string where =
      std::string(Probe::kName) + " (" + test.name + "), seed " + std::to_string(seed) + ": ";
  test::report(report.ok(), __FILE__, __LINE__, where + report.text());
  const std::vector<uint32_t> got(out, out + test.expected.size());
  const int64_t at = first_difference(test, got);
  if (at >= 0) {
    const auto i = static_cast<size_t>(at);
    test::report(false, __FILE__, __LINE__,
                 where + "word " + std::to_string(at) + ": expected " + hex(test.expected[i]) +
                     ", got " + hex(got[i]));
  }
  emu::free_global(in);
  emu::free_global(out);
}

Q1M_TEST(primitives_conform) {
  for_each_probe([](auto tag) {
    using Probe = typename decltype(tag)::Type;
    const std::vector<Case> cases = Probe::cases();
    EXPECT(!cases.empty());
    const int failures_before = test::failures;
    for (const Case& test : cases) {
      for (uint64_t seed = 1; seed <= kSeeds; ++seed) run_case<Probe>(test, seed);
    }
    std::printf("%s: %s (%zu cases)\n", Probe::kName,
                test::failures == failures_before ? "ok" : "FAILED", cases.size());
  });
}

}  // namespace
}  // namespace qwen1m::conformance
