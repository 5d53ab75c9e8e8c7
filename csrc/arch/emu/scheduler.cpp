// Who runs next, and what is said when nobody can.

#include <bit>
#include <cstdio>
#include <exception>
#include <map>

#include "arch/emu/simulation.h"

namespace qwen1m::arch::emu {
namespace {

// A kernel that polls this often while nothing else happens will poll forever.
constexpr uint64_t kMaxPolls = 100'000;

std::string blocked_text(const Blocked& blocked) {
  char detail[160];
  std::snprintf(detail, sizeof(detail), blocked.detail, static_cast<long long>(blocked.first),
                static_cast<long long>(blocked.second));
  return std::string(blocked.primitive) + " at " + site_text(blocked.site) + detail;
}

/// "threads 0-31, 40"
std::string ranges_text(const std::vector<int>& sorted) {
  std::string text = sorted.size() == 1 ? "thread " : "threads ";
  for (size_t i = 0; i < sorted.size();) {
    size_t end = i + 1;
    while (end < sorted.size() && sorted[end] == sorted[end - 1] + 1) ++end;
    if (i != 0) text += ", ";
    text += std::to_string(sorted[i]);
    if (end > i + 1) text += "-" + std::to_string(sorted[end - 1]);
    i = end;
  }
  return text;
}

std::string stuck_text(const Block& block) {
  std::string text;
  std::map<std::string, std::vector<int>> groups;
  for (const auto& thread : block.threads) {
    if (thread->state == Thread::State::kDone) continue;
    groups[blocked_text(thread->blocked)].push_back(thread->index);
  }
  const std::string prefix = "\n    block " + std::to_string(block.index) + ": ";
  for (const auto& [reason, threads] : groups) {
    text += prefix + ranges_text(threads) + " in " + reason;
  }
  std::map<uint32_t, const MbarrierState*> by_offset;
  for (const auto& [offset, bar] : block.mbarriers) by_offset[offset] = &bar;
  for (const auto& [offset, bar] : by_offset) {
    if (bar->pending == bar->count && bar->tx_bytes == 0) continue;
    text += prefix + "mbarrier " + shared_text(offset) + " (init at " + site_text(bar->init_site) +
            "), phase " + std::to_string(bar->phase) + ": " + std::to_string(bar->pending) +
            " of " + std::to_string(bar->count) + " arrivals missing, " +
            std::to_string(bar->tx_bytes) + " bytes missing";
  }
  return text;
}

}  // namespace

void Simulation::wake(Thread& thread) {
  if (thread.state != Thread::State::kBlocked) return;
  thread.state = Thread::State::kReady;
  thread.warp->ready |= 1U << thread.lane;
}

void Simulation::block_running(const Blocked& why) {
  Thread& thread = *running;
  thread.state = Thread::State::kBlocked;
  thread.blocked = why;
  fiber_switch(thread.fiber, scheduler_);
  if (aborting) throw Aborted{};
}

void Simulation::yield_running() {
  Thread& thread = *running;
  if (polled_at_progress_ != progress) {
    polled_at_progress_ = progress;
    polls_ = 0;
  }
  ++polls_;
  // A warp that polls comes last, or it would keep those away that it polls for.
  thread.warp->priority = --lowest_priority_;
  thread.state = Thread::State::kBlocked;
  wake(thread);
  fiber_switch(thread.fiber, scheduler_);
  if (aborting) throw Aborted{};
}

Thread* Simulation::pick() {
  Warp* chosen = nullptr;
  if (options.schedule == Schedule::kPriority) {
    if (random.one_in(256)) {
      warps_[random.below(static_cast<uint32_t>(warps_.size()))]->priority =
          (UINT64_C(1) << 62) + random.next();
    }
    for (Warp* warp : warps_) {
      if (warp->ready != 0 && (chosen == nullptr || warp->priority > chosen->priority)) {
        chosen = warp;
      }
    }
  } else {
    size_t start = round_robin_;
    if (options.schedule == Schedule::kRandom)
      start = random.below(static_cast<uint32_t>(warps_.size()));
    for (size_t i = 0; i < warps_.size() && chosen == nullptr; ++i) {
      const size_t at = (start + i) % warps_.size();
      if (warps_[at]->ready == 0) continue;
      chosen = warps_[at];
      round_robin_ = at + 1;
    }
  }
  if (chosen == nullptr) return nullptr;
  int first = 0;
  if (options.schedule != Schedule::kFifo) first = static_cast<int>(random.below(32));
  const int lane = (first + std::countr_zero(std::rotr(chosen->ready, first))) % 32;
  chosen->ready &= ~(1U << lane);
  return chosen->block->threads[static_cast<size_t>(chosen->index * 32 + lane)].get();
}

void Simulation::resume(Thread& thread) {
  running = &thread;
  ++report.context_switches;
  fiber_switch(scheduler_, thread.fiber);
  running = nullptr;
}

bool Simulation::wake_those_who_may_give_up() {
  if (gave_up_at_progress_ == progress) return false;  // they did, and nothing came of it
  gave_up_at_progress_ = progress;
  bool any = false;
  for (const auto& cluster : resident_) {
    for (const auto& block : cluster->blocks) {
      for (const auto& thread : block->threads) {
        if (thread->state != Thread::State::kBlocked || !thread->may_give_up) continue;
        wake(*thread);
        any = true;
      }
    }
  }
  return any;
}

void Simulation::report_deadlock(const char* reason) {
  std::string text = reason;
  Site site{"(deadlock)", 0};
  for (const auto& cluster : resident_) {
    for (const auto& block : cluster->blocks) {
      text += stuck_text(*block);
      for (const auto& thread : block->threads) {
        if (site.line == 0 && thread->state == Thread::State::kBlocked) site = thread->blocked.site;
      }
    }
  }
  report_fatal("deadlock", site, text);
}

void Simulation::run() {
  try {
    while (!waiting_clusters_.empty() || !resident_.empty()) {
      while (static_cast<int>(resident_.size()) < options.concurrent_clusters &&
             !waiting_clusters_.empty()) {
        start_cluster();
      }
      if (!in_flight.empty() && options.landing == Landing::kRandom && random.one_in(24)) {
        step_copy(random.below(static_cast<uint32_t>(in_flight.size())));
      }
      if (Thread* thread = pick()) {
        resume(*thread);
        if (aborting) throw Aborted{};
        if (thread->state == Thread::State::kDone) retire_finished_clusters();
        if (polls_ > kMaxPolls && polled_at_progress_ == progress) {
          report_deadlock("threads poll and nothing happens:");
        }
      } else if (!in_flight.empty()) {
        step_copy(random.below(static_cast<uint32_t>(in_flight.size())));
      } else if (!wake_those_who_may_give_up()) {
        report_deadlock("no thread can go on and no copy is in flight:");
      }
    }
    // Stores that were waited for with .read only may still be under way.
    while (!in_flight.empty()) step_copy(in_flight.size() - 1);
    report.completed = true;
  } catch (const Aborted&) {
    unwind_all();
  }
}

void Simulation::unwind_all() {
  aborting = true;
  for (const auto& cluster : resident_) {
    for (const auto& block : cluster->blocks) {
      for (const auto& thread : block->threads) {
        if (thread->state != Thread::State::kDone) resume(*thread);
      }
    }
  }
}

void fiber_main() {
  fiber_entered();
  Simulation& sim = simulation();
  Thread& thread = *sim.running;
  try {
    if (sim.aborting) throw Aborted{};
    sim.kernel();
    check_wgmma_at_exit(thread);
    check_copies_at_exit(thread);
  } catch (const Aborted&) {  // the launch is over
  } catch (...) {
    sim.kernel_exception = std::current_exception();
    sim.aborting = true;
  }
  sim.end_thread();
}

void Simulation::end_thread() {
  Thread& thread = *running;
  thread.state = Thread::State::kDone;
  ++progress;
  fiber_switch(thread.fiber, scheduler_, true);
  std::terminate();  // nobody resumes a thread that is done
}

}  // namespace qwen1m::arch::emu
