#include "arch/emu/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define Q1M_ASAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define Q1M_ASAN 1
#endif

#ifdef Q1M_ASAN
// The interface of <sanitizer/common_interface_defs.h> for programs that switch stacks.
extern "C" void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t bytes);
extern "C" void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom,
                                                size_t* bytes);
#endif

#if defined(__x86_64__)
extern "C" void q1m_fiber_switch(void** save, void* load);
#else
#include <sys/ucontext.h>
// The functions of <ucontext.h>.
extern "C" int getcontext(ucontext_t* context);
extern "C" int swapcontext(ucontext_t* save, const ucontext_t* load);
extern "C" void makecontext(ucontext_t* context, void (*entry)(), int num_arguments, ...);
#endif

namespace qwen1m::arch::emu {
namespace {

#ifdef Q1M_ASAN
constexpr size_t kStackBytes = 512 * 1024;  // red zones around every array of registers
#else
constexpr size_t kStackBytes = 256 * 1024;
#endif

Fiber* g_previous = nullptr;  // who switched to the running fiber

}  // namespace

void fiber_entered() {
#ifdef Q1M_ASAN
  // Tells the bounds of the stack we come from: that of main() is known in no other way.
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  g_previous->stack = static_cast<uint8_t*>(const_cast<void*>(bottom));
  g_previous->stack_bytes = bytes;
#endif
}

void fiber_switch(Fiber& from, Fiber& to, [[maybe_unused]] bool from_ends) {
  g_previous = &from;
#ifdef Q1M_ASAN
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(__x86_64__)
  q1m_fiber_switch(&from.context, to.context);
#else
  if (from.context == nullptr) from.context = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.context), static_cast<ucontext_t*>(to.context));
#endif
#ifdef Q1M_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void fiber_start(Fiber& fiber, void (*entry)()) {
  fiber.fake_stack = nullptr;
#if defined(__x86_64__)
  // What q1m_fiber_switch pops: six registers, then the return address. A function expects
  // rsp % 16 == 8 at its entry, so one empty word stays above.
  void** top = reinterpret_cast<void**>(fiber.stack + fiber.stack_bytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.context = top;
#else
  if (fiber.context == nullptr) fiber.context = new ucontext_t;
  auto* context = static_cast<ucontext_t*>(fiber.context);
  getcontext(context);
  context->uc_stack.ss_sp = fiber.stack;
  context->uc_stack.ss_size = fiber.stack_bytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
#endif
}

void StackPool::give(Fiber& fiber) {
  if (free_.empty()) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, page, PROT_NONE);
    all_.push_back(static_cast<uint8_t*>(memory));
    free_.push_back(all_.back() + page);
  }
  fiber.stack = free_.back();
  fiber.stack_bytes = kStackBytes;
  free_.pop_back();
}

void StackPool::take_back(Fiber& fiber) {
  if (fiber.stack == nullptr) return;
  free_.push_back(fiber.stack);
  fiber.stack = nullptr;
#if !defined(__x86_64__)
  delete static_cast<ucontext_t*>(fiber.context);
#endif
  fiber.context = nullptr;
}

StackPool::~StackPool() {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  for (uint8_t* memory : all_) munmap(memory, kStackBytes + page);
}

}  // namespace qwen1m::arch::emu
