// CUDA C++ on the CPU: the same kernel sources, compiled by the host compiler with its sanitizers.
//
// One fiber per CUDA thread, blocks one after another. A fiber runs until it waits: at a barrier or
// in a warp instruction. Under AddressSanitizer every buffer and the dynamic shared memory have
// their true sizes; under ThreadSanitizer every fiber is a thread to it, and barriers are the only
// order between them, so that a missing one is a reported race.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#define GPU_NOT_TRACED __attribute__((no_sanitize("thread")))
#else
#define GPU_NOT_TRACED
#endif

namespace gpu {

struct Uint3 {
  unsigned x = 0, y = 0, z = 0;
};

struct Copy {  // of cp.async
  char* to;
  const char* from;
  int bytes, zeros;  // zeros follow the copied bytes
};

enum class State { running, at_barrier, in_warp, finished };

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Uint3 thread;
  unsigned linear = 0, lane = 0, warp = 0;
  State state = State::running;
  unsigned mask = 0;         // of the warp instruction it waits in
  void* argument = nullptr;  // of that instruction
  std::vector<Copy> open_group;
  std::deque<std::vector<Copy>> groups;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan_fiber = nullptr;  // ThreadSanitizer's
};

struct Machine {
  Fiber* self = nullptr;
  std::vector<Fiber> fibers;
  std::vector<unsigned> arrived;  // by warp: lanes that wait in a warp instruction
  void* scheduler = nullptr;
  Uint3 block, grid_size, block_size;
  char* shared = nullptr;  // below 4 GiB, as its addresses have 32 bits
  std::function<void()> kernel;
  std::mt19937 random{1};
  std::string order = "forward";
  bool early_copies = false;
  void* fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  void* tsan_fiber = nullptr;
  char barrier_token = 0, launch_token = 0;
  char warp_token[64] = {};
};
inline Machine machine;

constexpr size_t stack_bytes = size_t{256} << 10;
constexpr size_t most_shared = size_t{228} << 10;  // of any GPU

[[noreturn]] inline void die(const std::string& what) {
  std::fprintf(stderr, "GPU on CPU: %s (block %u %u %u", what.c_str(), machine.block.x,
               machine.block.y, machine.block.z);
  if (machine.self) std::fprintf(stderr, ", thread %u", machine.self->linear);
  std::fprintf(stderr, ")\n");
  std::abort();
}

inline void acquire([[maybe_unused]] void* token) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(token);
#endif
}
inline void release([[maybe_unused]] void* token) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(token);
#endif
}

// Switching stacks: saves what the calling convention of x86-64 asks to keep.
extern "C" void gpu_switch(void** save, void* to);
__asm__(
    ".text\n.weak gpu_switch\n.type gpu_switch,@function\ngpu_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  ret\n"
    ".size gpu_switch, .-gpu_switch\n");

GPU_NOT_TRACED inline void to_scheduler([[maybe_unused]] bool last = false) {
  Fiber* self = machine.self;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &self->fake_stack, machine.scheduler_stack,
                                 machine.scheduler_stack_size);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(machine.tsan_fiber, 1 /* no synchronisation */);
#endif
  gpu_switch(&self->stack_pointer, machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake_stack, &machine.scheduler_stack,
                                  &machine.scheduler_stack_size);
#endif
}

GPU_NOT_TRACED inline void to_fiber(Fiber& fiber) {
  machine.self = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.fake_stack, fiber.stack, stack_bytes);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber.tsan_fiber, 1);
#endif
  gpu_switch(&machine.scheduler, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.fake_stack, nullptr, nullptr);
#endif
  machine.self = nullptr;
}

GPU_NOT_TRACED inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_size);
#endif
  acquire(&machine.launch_token);
  machine.kernel();
  bool pending = !machine.self->open_group.empty();
  for (const auto& group : machine.self->groups) pending |= !group.empty();
  if (pending) die("the thread exits with a cp.async that it never waited for");
  release(&machine.launch_token);
  machine.self->state = State::finished;
  to_scheduler(true);
  std::abort();
}

GPU_NOT_TRACED inline void barrier() {
  release(&machine.barrier_token);
  machine.self->state = State::at_barrier;
  to_scheduler();
  acquire(&machine.barrier_token);
}

/// While it lives, ThreadSanitizer looks away: one lane moves registers on behalf of all.
struct Untracked {
#if defined(__SANITIZE_THREAD__)
  Untracked() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Untracked() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Untracked() {}
#endif
};

/// The lanes of `mask` meet; the last to come executes `together(lanes of the warp, mask)`.
/// `orders`: memory accesses before and after are ordered, as __syncwarp does.
template <class F>
GPU_NOT_TRACED inline void meet(unsigned mask, void* argument, bool orders, F together) {
  Fiber& self = *machine.self;
  unsigned& arrived = machine.arrived[self.warp];
  if (!(mask >> self.lane & 1)) die("a lane is not in its own member mask");
  self.argument = argument;
  self.mask = mask;
  if (orders) release(&machine.warp_token[self.warp]);
  arrived |= 1u << self.lane;
  if ((arrived & mask) == mask) {
    Fiber* lanes = &machine.fibers[self.warp * 32];
    for (int lane = 0; lane < 32; ++lane)
      if ((mask >> lane & 1) && lanes[lane].mask != mask) die("lanes disagree on the member mask");
    arrived &= ~mask;
    {
      const Untracked whole_warp;
      together(lanes, mask);
    }
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) lanes[lane].state = State::running;
  } else {
    self.state = State::in_warp;
    to_scheduler();
  }
  if (orders) acquire(&machine.warp_token[self.warp]);
}

inline void perform(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  std::memset(copy.to + copy.bytes, 0, copy.zeros);
}

inline void start_copy(const Copy& copy) {
  if (machine.early_copies) perform(copy);
  machine.self->open_group.push_back(copy);
}
inline void commit_copies() {
  machine.self->groups.push_back(std::move(machine.self->open_group));
  machine.self->open_group.clear();
}
inline void wait_for_copies(size_t left) {
  auto& groups = machine.self->groups;
  for (; groups.size() > left; groups.pop_front())
    if (!machine.early_copies)
      for (const Copy& copy : groups.front()) perform(copy);
}

/// One block; `shared` bytes of dynamic shared memory are there, nothing behind them.
GPU_NOT_TRACED inline void run_block(size_t shared) {
  const unsigned threads = machine.block_size.x * machine.block_size.y * machine.block_size.z;
  auto& fibers = machine.fibers;
  if (fibers.size() != threads) {
    fibers.resize(threads);
    for (auto& fiber : fibers)
      if (!fiber.stack) fiber.stack = static_cast<char*>(std::aligned_alloc(64, stack_bytes));
  }
  machine.arrived.assign((threads + 31) / 32, 0);
  std::memset(machine.shared, 0xff, shared);  // NaN in every floating format
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(machine.shared + shared, most_shared - shared);
  for (auto& fiber : fibers) __asan_unpoison_memory_region(fiber.stack, stack_bytes);
#elif defined(__SANITIZE_THREAD__)
  machine.tsan_fiber = __tsan_get_current_fiber();
#endif
  release(&machine.launch_token);
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; ++i) {
    order[i] = machine.order == "reverse" ? threads - 1 - i : i;
    Fiber& fiber = fibers[i];
    fiber.linear = i;
    fiber.thread = {i % machine.block_size.x, i / machine.block_size.x % machine.block_size.y,
                    i / (machine.block_size.x * machine.block_size.y)};
    fiber.lane = i % 32;
    fiber.warp = i / 32;
    fiber.state = State::running;
    fiber.fake_stack = nullptr;
    void** top = reinterpret_cast<void**>(fiber.stack + stack_bytes) - 1;
    *top = nullptr;  // keeps the alignment that the calling convention asks for
    *--top = reinterpret_cast<void*>(&enter);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.stack_pointer = top;
#if defined(__SANITIZE_THREAD__)
    fiber.tsan_fiber = __tsan_create_fiber(0);
#endif
  }
  for (unsigned finished = 0; finished < threads;) {
    bool progressed = false;
    if (machine.order == "random") std::shuffle(order.begin(), order.end(), machine.random);
    for (const unsigned i : order) {
      // Its whole warp as far as it comes, then the next: the largest skew between warps.
      const unsigned first = fibers[i].warp * 32, last = std::min(first + 32, threads);
      for (bool any = true; any;) {
        any = false;
        for (unsigned k = first; k < last; ++k) {
          Fiber& fiber = fibers[machine.order == "reverse" ? first + last - 1 - k : k];
          if (fiber.state != State::running) continue;
          to_fiber(fiber);
          any = progressed = true;
          finished += fiber.state == State::finished;
        }
      }
    }
    if (progressed) continue;
    for (auto& fiber : fibers) {
      if (fiber.state == State::in_warp) die("deadlock: lanes wait for others of their warp");
      if (fiber.state == State::at_barrier) fiber.state = State::running;
    }
  }
  acquire(&machine.launch_token);
#if defined(__SANITIZE_THREAD__)
  for (auto& fiber : fibers) __tsan_destroy_fiber(fiber.tsan_fiber);
#elif defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(machine.shared, most_shared);
#endif
}

GPU_NOT_TRACED inline void launch(Uint3 grid, Uint3 block, size_t shared,
                                  const std::function<void()>& kernel) {
  if (shared > most_shared) die("more dynamic shared memory than any GPU has");
  if (!machine.shared) {
    void* low = mmap(nullptr, most_shared, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
    if (low == MAP_FAILED) die("no memory below 4 GiB");
    machine.shared = static_cast<char*>(low);
  }
  machine.grid_size = grid;
  machine.block_size = block;
  machine.kernel = kernel;
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  for (size_t i = 0; i < blocks; ++i) {
    const size_t j = machine.order == "reverse" ? blocks - 1 - i : i;
    machine.block = {static_cast<unsigned>(j % grid.x), static_cast<unsigned>(j / grid.x % grid.y),
                     static_cast<unsigned>(j / grid.x / grid.y)};
    run_block(shared);
  }
}

}  // namespace gpu
