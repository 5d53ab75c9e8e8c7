#include "arch/emu/async_copy.h"

#include <algorithm>
#include <cstring>

#include "arch/arch.h"
#include "arch/emu/global_memory.h"
#include "arch/emu/simulation.h"

namespace qwen1m::arch::emu {
namespace {

/// Calls f(shared address, global address or null, bytes) for runs of at most 16 bytes in which
/// both are contiguous; null stands for elements outside the tensor.
template <typename Function>
void for_each_chunk(const CopyOperation& copy, uint32_t first_row, uint32_t end_row,
                    const Function& f) {
  const EncodedMap& map = copy.map;
  const uint32_t row_bytes = map.row_bytes();
  for (uint32_t row = first_row; row < end_row; ++row) {
    const BoxRow inside = box_row(map, copy.at, row);
    const uint32_t end = inside.skipped_bytes + inside.bytes;
    for (uint32_t byte = 0; byte < row_bytes;) {
      // A chunk ends at 16 bytes and where the row enters or leaves the tensor.
      uint32_t next = std::min((byte / 16 + 1) * 16, row_bytes);
      const bool is_inside = byte >= inside.skipped_bytes && byte < end;
      if (byte < inside.skipped_bytes) next = std::min(next, inside.skipped_bytes);
      if (is_inside) next = std::min(next, end);
      const uint32_t address = kSharedBase + copy.offset + row * row_bytes + byte;
      f(swizzled(address, map.swizzle) - kSharedBase,
        is_inside ? inside.global + (byte - inside.skipped_bytes) : nullptr, next - byte);
      byte = next;
    }
  }
}

void remove_from_flight(size_t index) {
  auto& in_flight = simulation().in_flight;
  in_flight[index]->state = CopyOperation::State::kDone;
  std::swap(in_flight[index], in_flight.back());
  in_flight.pop_back();
}

void land_load(size_t index) {
  Simulation& sim = simulation();
  const std::shared_ptr<CopyOperation> copy = sim.in_flight[index];
  SharedMemory& shared = copy->block->shared;
  uint32_t bytes = copy->bytes;
  bool is_last = true;
  if (copy->is_tensor) {
    const uint32_t rows = copy->map.rows();
    uint32_t end = rows;
    if (sim.options.landing == Landing::kRandom && copy->rows_done == 0 && rows > 1 &&
        sim.random.one_in(2)) {
      end = 1 + sim.random.below(rows - 1);
    }
    for_each_chunk(*copy, copy->rows_done, end, [&](uint32_t to, const uint8_t* from, uint32_t n) {
      if (from != nullptr) {
        std::memcpy(shared.at(to), from, n);
      } else {
        std::memset(shared.at(to), 0, n);
      }
    });
    bytes = (end - copy->rows_done) * copy->map.row_bytes();
    copy->rows_done = end;
    is_last = end == rows;
  } else {
    std::memcpy(shared.at(copy->offset), copy->global, bytes);
  }
  if (is_last) remove_from_flight(index);
  complete_transaction(*copy->block, copy->bar_offset, copy->bar_phase, bytes, copy->site);
}

void step_store(size_t index) {
  const std::shared_ptr<CopyOperation> copy = simulation().in_flight[index];
  SharedMemory& shared = copy->block->shared;
  if (copy->state == CopyOperation::State::kIssued) {
    copy->data.assign(shared.at(copy->offset), shared.at(copy->offset) + copy->bytes);
    copy->state = CopyOperation::State::kSourceRead;
    return;
  }
  if (copy->is_tensor) {
    for_each_chunk(*copy, 0, copy->map.rows(), [&](uint32_t from, uint8_t* to, uint32_t n) {
      if (to != nullptr) std::memcpy(to, copy->data.data() + (from - copy->offset), n);
    });
  } else {
    std::memcpy(copy->global, copy->data.data(), copy->bytes);
  }
  ++simulation().progress;
  remove_from_flight(index);
}

/// Steps one copy until it has reached `state`.
void finish(const std::shared_ptr<CopyOperation>& copy, CopyOperation::State state) {
  auto& in_flight = simulation().in_flight;
  while (copy->state < state) {
    const auto at = std::find(in_flight.begin(), in_flight.end(), copy);
    step_copy(static_cast<size_t>(at - in_flight.begin()));
  }
}

void put_in_flight(std::shared_ptr<CopyOperation> copy) {
  Simulation& sim = simulation();
  ++sim.report.copies;
  sim.report.copied_bytes += copy->bytes;
  sim.in_flight.push_back(copy);
  if (sim.options.landing == Landing::kEager) finish(copy, CopyOperation::State::kDone);
}

/// Notes that a tensor copy touches the part of its box that lies inside the tensor.
void note_tensor_global(const CopyOperation& copy, GlobalAccess access, int64_t cluster,
                        const Actor& actor, const char* what) {
  for (uint32_t row = 0; row < copy.map.rows(); ++row) {
    const BoxRow inside = box_row(copy.map, copy.at, row);
    if (inside.bytes == 0) continue;
    GlobalAllocation& allocation =
        GlobalMemory::instance().check(inside.global, inside.bytes, 1, copy.site, what);
    note_global(allocation, inside.global, inside.bytes, access, cluster, actor, copy.site, what);
  }
}

/// The rest of a load: checks, poison in the destination, under way.
void issue_load(CopyOperation load, uint32_t bar_offset, const char* what) {
  Thread& thread = *simulation().running;
  Block& block = *load.block;
  const bool remote = &block != thread.block;
  if (remote && block.exited) {
    report_fatal("cluster-exit", load.site,
                 std::string(what) + " to block " + std::to_string(block.index) +
                     " of the cluster, which has exited");
  }
  const MbarrierState& bar = find_mbarrier(block, bar_offset, load.site, MbarrierUse::kAsync);
  load.bar_offset = bar_offset;
  load.bar_phase = bar.phase;
  // What lands is ordered for those who see the end of this phase of the barrier.
  const Actor actor{bar.agent, static_cast<uint32_t>(bar.phase + 1), &thread.knowledge, true};
  block.shared.note_write(load.offset, load.bytes, actor, load.site, what);
  std::memset(block.shared.at(load.offset), 0xff, load.bytes);
  if (remote) block.note_remote_access(thread);
  block.loads.push_back({bar.agent, actor.clock, load.site});
  const int64_t cluster = block.cluster->index;
  if (load.is_tensor) {
    note_tensor_global(load, GlobalAccess::kRead, cluster, actor, what);
  } else {
    GlobalAllocation& allocation =
        GlobalMemory::instance().check(load.global, load.bytes, 16, load.site, what);
    note_global(allocation, load.global, load.bytes, GlobalAccess::kRead, cluster, actor, load.site,
                what);
  }
  put_in_flight(std::make_shared<CopyOperation>(std::move(load)));
}

CopyOperation tensor_copy(const TensorMap& map, uint32_t address, const Coordinates5& at, Site site,
                          const char* what) {
  CopyOperation copy;
  copy.is_tensor = true;
  copy.site = site;
  copy.map = decode_tensor_map(map, site);
  copy.at = at;
  copy.bytes = copy.map.box_bytes();
  copy.offset = own_offset(address, site, what);
  copy.block = simulation().running->block;
  // The hardware asks for 128 bytes; arch.h wants 128-byte swizzle atoms whole, so that the layout
  // of a tile does not depend on where it lies.
  const uint32_t alignment = copy.map.swizzle == 128 ? 1024 : 128;
  copy.block->shared.check_range(copy.offset, copy.bytes, alignment, site, what);
  return copy;
}

void check_bulk(uint32_t bytes, Site site, const char* what) {
  if (bytes == 0 || bytes % 16 != 0) {
    report_fatal("alignment", site,
                 std::string(what) + ": bytes is " + std::to_string(bytes) +
                     "; expected a positive multiple of 16");
  }
}

/// The rest of a store: the source must be fenced; the destination counts as written now.
void issue_store(CopyOperation store, const char* what) {
  Thread& thread = *simulation().running;
  Block& block = *thread.block;
  CopyThread& copies = thread.copies;
  if (copies.bulk_slot < 0) copies.bulk_slot = block.bulk_slots_used++ % kBulkSlots;
  store.is_store = true;
  store.cluster = block.cluster->index;
  store.clock = ++block.bulk_clocks[copies.bulk_slot];
  const AgentLayout& agents = block.cluster->agents;
  const auto agent = [&](int local) { return static_cast<uint16_t>(block.agent_base + local); };
  const Actor reader{agent(agents.bulk_read(copies.bulk_slot)), store.clock, &thread.knowledge,
                     true};
  const Actor writer{agent(agents.bulk_write(copies.bulk_slot)), store.clock, &thread.knowledge,
                     true};
  block.shared.note_read(store.offset, store.bytes, reader, store.site, what);
  if (store.is_tensor) {
    note_tensor_global(store, GlobalAccess::kWrite, store.cluster, writer, what);
  } else {
    GlobalAllocation& allocation =
        GlobalMemory::instance().check(store.global, store.bytes, 16, store.site, what);
    note_global(allocation, store.global, store.bytes, GlobalAccess::kWrite, store.cluster, writer,
                store.site, what);
  }
  auto copy = std::make_shared<CopyOperation>(std::move(store));
  copies.open_stores.push_back(copy);
  put_in_flight(std::move(copy));
}

}  // namespace

void step_copy(size_t index_in_flight) {
  if (simulation().in_flight[index_in_flight]->is_store) {
    step_store(index_in_flight);
  } else {
    land_load(index_in_flight);
  }
}

void tma_load(uint32_t to, const TensorMap& map, uint32_t bar, Coordinates5 at, bool multicast,
              uint16_t mask, Site site) {
  const char* what = multicast ? "tma_load_multicast" : "tma_load";
  const CopyOperation load = tensor_copy(map, to, at, site, what);
  const uint32_t bar_offset = own_offset(bar, site, what);
  if (!multicast) return issue_load(load, bar_offset, what);
  const Cluster& cluster = *load.block->cluster;
  if (mask == 0 || mask >> cluster.blocks.size() != 0) {
    report_fatal("multicast", site,
                 "mask is " + std::to_string(mask) + "; expected bits of the " +
                     std::to_string(cluster.blocks.size()) +
                     " blocks of the cluster, at least one");
  }
  for (const auto& block : cluster.blocks) {
    if ((mask >> block->rank & 1) == 0) continue;
    CopyOperation part = load;
    part.block = block.get();
    issue_load(std::move(part), bar_offset, what);
  }
}

void tma_store(const TensorMap& map, uint32_t from, Coordinates5 at, Site site) {
  issue_store(tensor_copy(map, from, at, site, "tma_store"), "tma_store");
}

void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t bar, Site site) {
  check_bulk(bytes, site, "bulk_load");
  CopyOperation load;
  load.site = site;
  load.block = simulation().running->block;
  load.offset = own_offset(to, site, "bulk_load");
  load.bytes = bytes;
  load.global = static_cast<uint8_t*>(const_cast<void*>(from));
  load.block->shared.check_range(load.offset, bytes, 16, site, "bulk_load");
  issue_load(std::move(load), own_offset(bar, site, "bulk_load"), "bulk_load");
}

void bulk_store(void* to, uint32_t from, uint32_t bytes, Site site) {
  check_bulk(bytes, site, "bulk_store");
  CopyOperation store;
  store.site = site;
  store.block = simulation().running->block;
  store.offset = own_offset(from, site, "bulk_store");
  store.bytes = bytes;
  store.global = static_cast<uint8_t*>(to);
  store.block->shared.check_range(store.offset, bytes, 16, site, "bulk_store");
  issue_store(std::move(store), "bulk_store");
}

void bulk_commit() {
  CopyThread& copies = simulation().running->copies;
  copies.stores.push_back(std::move(copies.open_stores));
  copies.open_stores.clear();
}

void bulk_wait(int pending, bool read_only) {
  Thread& thread = *simulation().running;
  CopyThread& copies = thread.copies;
  const AgentLayout& agents = thread.block->cluster->agents;
  const auto learn = [&](int local, uint32_t clock) {
    uint32_t& known = thread.knowledge.ordered()[thread.block->agent_base + local];
    known = std::max(known, clock);
    ++thread.version;
  };
  const size_t waited =
      copies.stores.size() - std::min(copies.stores.size(), static_cast<size_t>(pending));
  for (size_t group = 0; group < waited; ++group) {
    for (const auto& copy : copies.stores[group]) {
      finish(copy, read_only ? CopyOperation::State::kSourceRead : CopyOperation::State::kDone);
      learn(agents.bulk_read(copies.bulk_slot), copy->clock);
      if (!read_only) learn(agents.bulk_write(copies.bulk_slot), copy->clock);
    }
  }
  if (read_only) {
    copies.stores_read = std::max(copies.stores_read, waited);
  } else {
    copies.stores.erase(copies.stores.begin(),
                        copies.stores.begin() + static_cast<std::ptrdiff_t>(waited));
    copies.stores_read -= std::min(copies.stores_read, waited);
  }
}

void cp_async_16(uint32_t to, const void* from, bool valid, Site site) {
  Simulation& sim = simulation();
  Thread& thread = *sim.running;
  SharedMemory& shared = thread.block->shared;
  const uint32_t offset = own_offset(to, site, "cp_async_16");
  shared.check_range(offset, 16, 16, site, "cp_async_16");
  if (valid) {
    GlobalAllocation& allocation =
        GlobalMemory::instance().check(from, 16, 16, site, "cp_async_16");
    note_global(allocation, from, 16, GlobalAccess::kRead, thread.block->cluster->index,
                thread.actor(), site, "cp_async_16");
  }
  const Actor actor{thread.agent, kNotYetOrdered, &thread.knowledge, false};
  shared.note_write(offset, 16, actor, site, "cp_async_16");
  std::memset(shared.at(offset), 0xff, 16);
  thread.copies.open_cp_async.push_back({offset, valid ? from : nullptr});
}

void cp_async_commit() {
  CopyThread& copies = simulation().running->copies;
  copies.cp_async.push_back(std::move(copies.open_cp_async));
  copies.open_cp_async.clear();
}

void cp_async_wait(int pending) {
  Thread& thread = *simulation().running;
  SharedMemory& shared = thread.block->shared;
  auto& groups = thread.copies.cp_async;
  while (groups.size() > static_cast<size_t>(pending)) {
    for (const CpAsync& copy : groups.front()) {
      if (copy.from != nullptr) {
        std::memcpy(shared.at(copy.offset), copy.from, 16);
      } else {
        std::memset(shared.at(copy.offset), 0, 16);
      }
      // From here on it counts as the thread's own write.
      shared.order_writes(copy.offset, 16, thread.agent, thread.clock());
    }
    groups.pop_front();
  }
}

void check_copies_at_exit(const Thread& thread) {
  const CopyThread& copies = thread.copies;
  const auto complain = [](const CopyGroup& group, const char* missing) {
    for (const auto& copy : group) {
      report_issue("exit-in-flight", copy->site,
                   std::string("the thread exits without ") + missing + " after this store");
    }
  };
  complain(copies.open_stores, "bulk_commit and bulk_wait_read");
  for (size_t i = copies.stores_read; i < copies.stores.size(); ++i) {
    complain(copies.stores[i], "bulk_wait_read");
  }
  size_t left = copies.open_cp_async.size();
  for (const auto& group : copies.cp_async) left += group.size();
  if (left != 0) {
    report_issue("exit-in-flight", {"(exit)", 0},
                 "the thread exits with " + std::to_string(left) +
                     " cp_async_16 that it has not waited for");
  }
}

}  // namespace qwen1m::arch::emu
