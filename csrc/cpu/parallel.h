// Threads and scratch memory: the only things the kernels ask of their host.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace d3net::cpu {

/// Runs body(context, worker) once on every thread torch may use, this one among them, in one
/// parallel region: worker is 0 .. threads-1, and the same thread's from call to call. Where torch
/// gives fewer threads than it says, some workers are missing.
void run_on_all_threads(void (*body)(void*, int64_t worker), void* context);
int64_t num_threads();

template <class F>
void on_all_threads(F& body) {
  run_on_all_threads([](void* context, int64_t worker) { (*static_cast<F*>(context))(worker); },
                     &body);
}

/// Hands out 0 .. count-1, each once, and knows when all of them are done. Each worker has a share
/// of neighbouring items, the same whenever the count is, and helps others when it is through: what
/// it reads is then as a rule what it wrote the last time, in its own caches. Where two threads
/// have no cache in common, a block takes half as long as with items dealt out in turn.
class WorkQueue {
 public:
  WorkQueue(int64_t count, int64_t workers) : count_(count), shares_(static_cast<size_t>(workers)) {
    for (int64_t w = 0; w < workers; ++w) {
      Share& share = shares_[static_cast<size_t>(w)];
      share.next.store(count * w / workers, std::memory_order_relaxed);
      share.end = count * (w + 1) / workers;
    }
  }

  /// item(i, next): next is the item this thread will work on after i, or -1 where none is certain.
  template <class F>
  void work(int64_t worker, F&& item) {
    auto run = [&](int64_t i, int64_t next) {
      const Done done{done_};  // also when item throws: nobody waits for ever
      try {
        item(i, next);
      } catch (...) {
        if (next >= 0) const Done never_begun{done_};
        throw;
      }
    };
    Share& own = shares_[static_cast<size_t>(worker)];
    for (int64_t i = own.take(), next; i >= 0; i = next) {
      next = own.take();
      run(i, next);
    }
    // Nothing is taken in advance from others: they may be about to take it themselves.
    for (size_t s = 1; s < shares_.size(); ++s) {
      Share& other = shares_[(static_cast<size_t>(worker) + s) % shares_.size()];
      for (int64_t i; (i = other.take()) >= 0;) run(i, -1);
    }
  }
  /// Waits for items other threads took; each of those threads is running, so this ends.
  void wait() const {
    while (done_.load(std::memory_order_acquire) < count_) std::this_thread::yield();
  }

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;

    int64_t take() {
      if (next.load(std::memory_order_relaxed) >= end) return -1;
      const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
      return i < end ? i : -1;
    }
  };
  struct Done {
    std::atomic<int64_t>& count;
    ~Done() { count.fetch_add(1, std::memory_order_release); }
  };
  const int64_t count_;
  std::vector<Share> shares_;
  std::atomic<int64_t> done_{0};
};

/// A worker without a crew, for what a thread does by itself.
struct Alone {
  template <class F>
  void each(int64_t count, F&& item) {
    for (int64_t i = 0; i < count; ++i) item(i, i + 1 < count ? i + 1 : -1);
  }
};

/// What one thread sees of a parallel region that consists of phases. Every thread runs the same
/// program; the items of a phase are shared out, and a phase begins when the one before it is done.
class Crew {
 public:
  /// Below so many multiplications it takes longer to wake a thread than to do without it.
  static constexpr int64_t kWorthSharing = 1 << 20;
  /// How many take as long as reading or writing one number.
  static constexpr int64_t kPerNumber = 16;

  /// program(worker) on all threads, in one parallel region; on this one alone for little work.
  template <class F>
  static void run(F&& program, int64_t multiplications, int64_t numbers = 0) {
    const bool alone = multiplications + numbers * kPerNumber < kWorthSharing;
    Crew crew(alone ? 1 : num_threads());
    auto body = [&](int64_t index) {
      Worker worker(crew, index);
      program(worker);
    };
    if (alone)
      body(0);
    else
      on_all_threads(body);
  }

  class Worker {
   public:
    Worker(Crew& crew, int64_t index) : crew_(crew), index_(index) {}

    /// item(i, next) for i in [0, count), each on one thread.
    template <class F>
    void each(int64_t count, F&& item) {
      if (crew_.workers_ == 1) return Alone{}.each(count, item);
      WorkQueue& queue = crew_.phase(phase_++, count);
      queue.work(index_, item);
      queue.wait();
    }
    template <class F>
    void once(F&& f) {
      each(1, [&](int64_t, int64_t) { f(); });
    }
    int64_t workers() const { return crew_.workers_; }

   private:
    Crew& crew_;
    const int64_t index_;
    size_t phase_ = 0;
  };

 private:
  explicit Crew(int64_t workers) : workers_(workers) {}

  WorkQueue& phase(size_t index, int64_t count) {
    const std::lock_guard lock(mutex_);
    if (index == queues_.size()) queues_.emplace_back(count, workers_);
    return queues_[index];
  }

  const int64_t workers_;
  std::mutex mutex_;
  std::deque<WorkQueue> queues_;
};

constexpr size_t kPage = 4096, kLargePage = size_t{2} << 20;

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

/// Uninitialised memory from the system itself, not from the heap: recycled heap has small pages,
/// for good. Aligned to a large page where it is that large.
class Pages {
 public:
  Pages() = default;
  explicit Pages(size_t bytes) : size_(size_for(bytes)) {
#if defined(__linux__)
    const size_t unit = unit_of(bytes);
    void* mapped = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    mapped_ = mapped;
    data_ =
        reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(mapped_) + unit - 1) / unit * unit);
    advise_large_pages(data_, size_ - unit);
#else
    data_ = mapped_ = std::aligned_alloc(kPage, size_);
    if (!data_) throw std::bad_alloc();
#endif
  }
  /// What so many bytes take with the room to align them.
  static size_t size_for(size_t bytes) {
    const size_t unit = unit_of(bytes);
#if defined(__linux__)
    return (bytes + 2 * unit - 1) / unit * unit;
#else
    return (bytes + unit - 1) / unit * unit;
#endif
  }
  Pages(Pages&& other) noexcept { swap(other); }
  Pages& operator=(Pages&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Pages() {
    if (!mapped_) return;
#if defined(__linux__)
    munmap(mapped_, size_);
#else
    std::free(mapped_);
#endif
  }
  void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  static size_t unit_of([[maybe_unused]] size_t bytes) {
#if defined(__linux__)
    if (bytes >= kLargePage / 2) return kLargePage;
#endif
    return kPage;
  }
  void swap(Pages& other) {
    std::swap(data_, other.data_);
    std::swap(mapped_, other.mapped_);
    std::swap(size_, other.size_);
  }

  void* data_ = nullptr;
  void* mapped_ = nullptr;
  size_t size_ = 0;
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
      memory_ = Pages(bytes);
      capacity_ = bytes;
    }
    return static_cast<A*>(memory_.data());
  }
  void shrink() {
    if (capacity_ > kMostKept) release();
  }

 private:
  void release() {
    memory_ = Pages();
    capacity_ = 0;
  }

  Pages memory_;
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
