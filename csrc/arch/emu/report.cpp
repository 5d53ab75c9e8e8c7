#include "arch/emu/report.h"

#include <cstring>

#include "arch/emu/simulation.h"

namespace qwen1m::arch::emu {

bool Report::has(const std::string& kind) const {
  for (const Issue& issue : issues) {
    if (issue.kind == kind) return true;
  }
  return false;
}

std::string Report::text() const {
  std::string text;
  for (const Issue& issue : issues) text += "[" + issue.kind + "] " + issue.message + "\n";
  if (!completed) text += "the launch did not complete\n";
  return text;
}

std::string site_text(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash != nullptr ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string shared_text(uint32_t offset) { return "shared+" + std::to_string(offset); }

uint16_t site_index(Site site) { return simulation().sites.index(site); }
Site site_of(uint16_t index) { return simulation().sites.site(index); }

uint16_t SiteTable::index(Site site) {
  // Kernels pass the same literal for a file, so its address tells it.
  const auto key = reinterpret_cast<uintptr_t>(site.file) * 31 + static_cast<uintptr_t>(site.line);
  Recent& recent = recent_[(key ^ (key >> 9)) % kRecent];
  if (recent.key == key) return recent.index;
  const auto [at, is_new] = indices_.emplace(key, static_cast<uint16_t>(sites_.size()));
  if (is_new) sites_.push_back(site);
  recent = {key, at->second};
  return at->second;
}

std::string thread_text(const Thread& thread) {
  return "block " + std::to_string(thread.block->index) + ", thread " +
         std::to_string(thread.index) + " (warp " + std::to_string(thread.warp->index) + ", lane " +
         std::to_string(thread.lane) + ")";
}

std::string agent_text(const Cluster& cluster, int agent) {
  const AgentLayout& layout = cluster.agents;
  const Block& block = *cluster.blocks[static_cast<size_t>(agent / layout.per_block)];
  const int local = agent % layout.per_block;
  const std::string in_block = "block " + std::to_string(block.index) + ", ";
  if (local < layout.warpgroup(0)) return thread_text(*block.threads[static_cast<size_t>(local)]);
  if (local < layout.mbarrier(0)) {
    return in_block + "wgmma of warpgroup " + std::to_string(local - layout.warpgroup(0));
  }
  if (local < layout.bulk_read(0)) {
    return in_block + "an asynchronous copy counted by mbarrier number " +
           std::to_string(local - layout.mbarrier(0));
  }
  return in_block + "a bulk store";
}

void report_issue(const char* kind, Site site, const std::string& message,
                  const std::string& other) {
  Simulation& sim = simulation();
  if (!sim.reported.insert(kind + ("|" + site_text(site)) + "|" + other).second) return;
  if (static_cast<int>(sim.report.issues.size()) >= sim.options.max_issues) return;
  std::string text = site_text(site);
  if (sim.running != nullptr) text += ", " + thread_text(*sim.running);
  sim.report.issues.push_back({kind, text + ": " + message});
}

void report_fatal(const char* kind, Site site, const std::string& message) {
  report_issue(kind, site, message);
  simulation().aborting = true;
  throw Aborted{};
}

}  // namespace qwen1m::arch::emu
