// Threads and scratch memory: the only things the kernels ask of their host.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>

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

/// A grow-only, cache-line aligned buffer; one thread_local instance per use.
class Scratch {
 public:
  template <class A>
  A* get(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(A) + 4095) / 4096 * 4096;
    if (bytes > capacity_) {
      memory_.reset();
      capacity_ = 0;
      memory_.reset(std::aligned_alloc(4096, bytes));
      if (!memory_) throw std::bad_alloc();
      capacity_ = bytes;
    }
    return static_cast<A*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t capacity_ = 0;
};

}  // namespace d3net::cpu
