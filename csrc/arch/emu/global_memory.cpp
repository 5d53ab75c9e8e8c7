#include "arch/emu/global_memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "arch/emu/emulator.h"
#include "arch/emu/simulation.h"
#include "qwen1m/error.h"

namespace qwen1m::arch::emu {
namespace {

constexpr size_t kAlignment = 256;

std::string nearest_text(const std::map<uintptr_t, GlobalAllocation>& allocations, uintptr_t at) {
  auto next = allocations.upper_bound(at);
  if (next == allocations.begin()) return "below every allocation";
  const GlobalAllocation& allocation = std::prev(next)->second;
  return std::to_string(at - reinterpret_cast<uintptr_t>(allocation.base)) + " bytes into '" +
         allocation.name + "' of " + std::to_string(allocation.bytes) + " bytes";
}

}  // namespace

GlobalCell& GlobalAllocation::cell(uint64_t word) {
  auto& page = shadow[word / kPageWords];
  if (!page) page = std::make_unique<Page>();
  return page->cells[word % kPageWords];
}

GlobalMemory& GlobalMemory::instance() {
  static GlobalMemory memory;
  return memory;
}

void GlobalMemory::add(GlobalAllocation allocation) {
  const auto begin = reinterpret_cast<uintptr_t>(allocation.base);
  const auto next = allocations_.lower_bound(begin);
  const bool overlaps = (next != allocations_.end() && next->first < begin + allocation.bytes) ||
                        (next != allocations_.begin() &&
                         std::prev(next)->first + std::prev(next)->second.bytes > begin);
  if (overlaps) {
    throw Error("register_global: '" + allocation.name + "': overlaps memory that is registered");
  }
  allocations_.emplace(begin, std::move(allocation));
  recent_ = nullptr;
}

void GlobalMemory::remove(const void* base) {
  const auto at = allocations_.find(reinterpret_cast<uintptr_t>(base));
  if (at == allocations_.end()) {
    throw Error("free_global: memory: expected the start of an allocation, got another address");
  }
  GlobalAllocation& allocation = at->second;
  if (allocation.mapped_bytes != 0) {
    munmap(allocation.base, allocation.mapped_bytes);
  } else if (allocation.is_ours) {
    std::free(allocation.base);
  }
  allocations_.erase(at);
  recent_ = nullptr;
}

GlobalAllocation* GlobalMemory::find(const void* at) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  const auto holds = [address](const GlobalAllocation& allocation) {
    return address - reinterpret_cast<uintptr_t>(allocation.base) < allocation.bytes;
  };
  if (recent_ != nullptr && holds(*recent_)) return recent_;
  const auto next = allocations_.upper_bound(address);
  if (next == allocations_.begin() || !holds(std::prev(next)->second)) return nullptr;
  recent_ = &std::prev(next)->second;
  return recent_;
}

GlobalAllocation& GlobalMemory::check(const void* at, uint64_t bytes, uint32_t alignment, Site site,
                                      const char* what) {
  GlobalAllocation* allocation = find(at);
  const auto address = reinterpret_cast<uintptr_t>(at);
  if (allocation == nullptr ||
      address - reinterpret_cast<uintptr_t>(allocation->base) + bytes > allocation->bytes) {
    report_fatal("global-bounds", site,
                 std::string(what) + " of " + std::to_string(bytes) + " bytes, " +
                     nearest_text(allocations_, address) + ", is outside every allocation");
  }
  if (address % alignment != 0) {
    report_fatal("alignment", site,
                 std::string(what) + " " + nearest_text(allocations_, address) +
                     ": the address must be " + std::to_string(alignment) + "-byte aligned");
  }
  return *allocation;
}

void GlobalMemory::forget_accesses() {
  for (auto& [base, allocation] : allocations_) allocation.shadow.clear();
}

void* allocate_global(size_t bytes, const std::string& name) {
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, rounded == 0 ? kAlignment : rounded);
  if (memory == nullptr) throw std::bad_alloc();
  std::memset(memory, 0xff, rounded);
  GlobalAllocation allocation;
  allocation.base = static_cast<uint8_t*>(memory);
  allocation.bytes = bytes;
  allocation.name = name;
  allocation.is_ours = true;
  GlobalMemory::instance().add(std::move(allocation));
  return memory;
}

void* allocate_global_lazily(size_t bytes, const std::string& name) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  GlobalAllocation allocation;
  allocation.base = static_cast<uint8_t*>(memory);
  allocation.bytes = allocation.mapped_bytes = bytes;
  allocation.name = name;
  GlobalMemory::instance().add(std::move(allocation));
  return memory;
}

void free_global(void* memory) { GlobalMemory::instance().remove(memory); }

void register_global(const void* memory, size_t bytes, const std::string& name, bool writable) {
  GlobalAllocation allocation;
  allocation.base = static_cast<uint8_t*>(const_cast<void*>(memory));
  allocation.bytes = bytes;
  allocation.name = name;
  allocation.writable = writable;
  GlobalMemory::instance().add(std::move(allocation));
}

void unregister_global(const void* memory) { GlobalMemory::instance().remove(memory); }

}  // namespace qwen1m::arch::emu
