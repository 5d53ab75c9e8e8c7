#pragma once
/// Happens-before by vector clocks.
///
/// Whoever accesses memory is an agent: a thread, the wgmma unit of a warpgroup, an mbarrier (for
/// the copies it counts), a bulk-store slot. An agent's accesses carry its clock. A thread knows,
/// for every agent of its cluster, up to which clock that agent's accesses are ordered before its
/// own next one, and up to which of those a proxy fence was executed by the writer.

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace qwen1m::arch::emu {

/// A clock that no thread ever reaches: an access that nothing orders yet.
inline constexpr uint32_t kNotYetOrdered = UINT32_MAX;

/// What is known of the agents of other clusters: immutable, shared, usually absent (only global
/// release/acquire makes it).
struct OtherClusters {
  using Clocks = std::shared_ptr<const std::vector<uint32_t>>;
  std::vector<std::pair<int64_t, Clocks>> known;  // sorted by cluster

  const std::vector<uint32_t>* find(int64_t cluster) const;
};
using OtherClustersPtr = std::shared_ptr<const OtherClusters>;
OtherClustersPtr join(const OtherClustersPtr& a, const OtherClustersPtr& b);

class Knowledge {
 public:
  Knowledge() = default;
  explicit Knowledge(int num_agents) : values_(static_cast<size_t>(num_agents) * 2) {}

  uint32_t* ordered() { return values_.data(); }
  const uint32_t* ordered() const { return values_.data(); }
  uint32_t* fenced() { return values_.data() + values_.size() / 2; }
  const uint32_t* fenced() const { return values_.data() + values_.size() / 2; }
  int num_agents() const { return static_cast<int>(values_.size() / 2); }

  void join(const Knowledge& other);
  /// Knows only what both know.
  void meet(const Knowledge& other);
  void clear();

  OtherClustersPtr others;

 private:
  std::vector<uint32_t> values_;  // ordered, then fenced
};

/// Who accesses memory, and what had to be ordered before.
struct Actor {
  uint16_t agent;
  uint32_t clock;
  const Knowledge* knowledge;
  bool async;  // through the async proxy (TMA, wgmma)
};

}  // namespace qwen1m::arch::emu
