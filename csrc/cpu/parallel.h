// Threads and scratch memory: the only things the kernels ask of their host.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace d3net::cpu {

/// Runs body(context) once on every thread torch may use, this one among them; one parallel region.
void run_on_all_threads(void (*body)(void*), void* context);

template <class F>
void on_all_threads(F& body) {
  run_on_all_threads([](void* context) { (*static_cast<F*>(context))(); }, &body);
}

/// Hands out 0 .. count-1, each once, and knows when all of them are done.
class WorkQueue {
 public:
  explicit WorkQueue(int64_t count) : count_(count) {}

  /// item(i, next): next is the item this thread will work on after i, -1 after its last.
  template <class F>
  void work(F&& item) {
    for (int64_t i = take(), next; i >= 0; i = next) {
      next = take();
      const Done done{done_};  // also when item throws: nobody waits for ever
      item(i, next);
    }
  }
  /// Waits for items other threads took; each of those threads is running, so this ends.
  void wait() const {
    while (done_.load(std::memory_order_acquire) < count_) std::this_thread::yield();
  }

 private:
  struct Done {
    std::atomic<int64_t>& count;
    ~Done() { count.fetch_add(1, std::memory_order_release); }
  };
  int64_t take() {
    const int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
    return i < count_ ? i : -1;
  }

  const int64_t count_;
  std::atomic<int64_t> next_{0}, done_{0};
};

/// What one thread sees of a parallel region that consists of phases. Every thread runs the same
/// program; the items of a phase are shared out, and a phase begins when the one before it is done.
class Crew {
 public:
  /// program(worker) on all threads, in one parallel region.
  template <class F>
  static void run(F&& program) {
    Crew crew;
    auto body = [&] {
      Worker worker(crew);
      program(worker);
    };
    on_all_threads(body);
  }

  class Worker {
   public:
    explicit Worker(Crew& crew) : crew_(crew) {}

    /// item(i, next) for i in [0, count), each on one thread.
    template <class F>
    void each(int64_t count, F&& item) {
      WorkQueue& queue = crew_.phase(phase_++, count);
      queue.work(item);
      queue.wait();
    }
    template <class F>
    void once(F&& f) {
      each(1, [&](int64_t, int64_t) { f(); });
    }

   private:
    Crew& crew_;
    size_t phase_ = 0;
  };

 private:
  WorkQueue& phase(size_t index, int64_t count) {
    const std::lock_guard lock(mutex_);
    if (index == queues_.size()) queues_.emplace_back(count);
    return queues_[index];
  }

  std::mutex mutex_;
  std::deque<WorkQueue> queues_;
};

constexpr size_t kLargePage = size_t{2} << 20;

/// Asks for large pages, where the system has them, for fresh memory about to be filled: to fault
/// it in by pages of 4 KiB can take longer than to compute what it holds.
inline void advise_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  const auto address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (address + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t last = (address + bytes) / kLargePage * kLargePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

inline void* allocate_aligned(size_t bytes) {
  const size_t unit = bytes >= (size_t{64} << 10) ? kLargePage : 4096;
  bytes = (bytes + unit - 1) / unit * unit;
  void* memory = std::aligned_alloc(unit, bytes);
  if (!memory) throw std::bad_alloc();
  advise_large_pages(memory, bytes);
  return memory;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

/// Memory that outlives a call, because fresh pages cost more than the call's own use of them. One
/// thread_local instance per use; it grows, but what is too large to keep goes with shrink().
class Scratch {
 public:
  static constexpr size_t kMostKept = size_t{256} << 20;

  template <class A>
  A* get(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(A);
    if (bytes > capacity_) {
      release();
      memory_.reset(allocate_aligned(bytes));
      capacity_ = bytes;
    }
    return static_cast<A*>(memory_.get());
  }
  void shrink() {
    if (capacity_ > kMostKept) release();
  }

 private:
  void release() {
    memory_.reset();
    capacity_ = 0;
  }

  std::unique_ptr<void, Free> memory_;
  size_t capacity_ = 0;
};

/// Scratch memory for the length of a call.
template <class A>
class Borrowed {
 public:
  Borrowed(Scratch& scratch, int64_t count) : scratch_(scratch), data_(scratch.get<A>(count)) {}
  ~Borrowed() { scratch_.shrink(); }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  A* get() const { return data_; }

 private:
  Scratch& scratch_;
  A* data_;
};

}  // namespace d3net::cpu
