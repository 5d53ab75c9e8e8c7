#include "arch/emu/clock.h"

#include <algorithm>

namespace qwen1m::arch::emu {
namespace {

void raise_to(uint32_t* to, const uint32_t* from, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] = to[i] > from[i] ? to[i] : from[i];
}

OtherClusters::Clocks join(const OtherClusters::Clocks& a, const OtherClusters::Clocks& b) {
  if (a == b) return a;
  auto both = std::make_shared<std::vector<uint32_t>>(*a);
  raise_to(both->data(), b->data(), both->size());
  return both;
}

}  // namespace

const std::vector<uint32_t>* OtherClusters::find(int64_t cluster) const {
  const auto at = std::lower_bound(known.begin(), known.end(), cluster,
                                   [](const auto& entry, int64_t c) { return entry.first < c; });
  return at != known.end() && at->first == cluster ? at->second.get() : nullptr;
}

OtherClustersPtr join(const OtherClustersPtr& a, const OtherClustersPtr& b) {
  if (a == b || !b) return a;
  if (!a) return b;
  auto both = std::make_shared<OtherClusters>();
  auto i = a->known.begin();
  auto j = b->known.begin();
  while (i != a->known.end() || j != b->known.end()) {
    if (j == b->known.end() || (i != a->known.end() && i->first < j->first)) {
      both->known.push_back(*i++);
    } else if (i == a->known.end() || j->first < i->first) {
      both->known.push_back(*j++);
    } else {
      both->known.emplace_back(i->first, join(i->second, j->second));
      ++i;
      ++j;
    }
  }
  return both;
}

void Knowledge::join(const Knowledge& other) {
  raise_to(values_.data(), other.values_.data(), values_.size());
  if (other.others) others = emu::join(others, other.others);
}

void Knowledge::meet(const Knowledge& other) {
  for (size_t i = 0; i < values_.size(); ++i) values_[i] = std::min(values_[i], other.values_[i]);
}

void Knowledge::clear() {
  std::fill(values_.begin(), values_.end(), 0);
  others.reset();
}

}  // namespace qwen1m::arch::emu
