// The packed weights of a call's passes: made by all threads together, or kept from an earlier call
// with the same weights.
#pragma once

#include <atomic>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "packed_cache.h"
#include "tile_pass.h"

namespace d3net::cpu::D3NET_ISA {

template <class Pass>
class PackedWeights {
  using A = typename Pass::Sum;

 public:
  /// `recur`: whether later calls are expected to have the same weights.
  PackedWeights(const std::vector<Pass>& passes, bool recur) : passes_(passes) {
    for (const Pass& pass : passes)
      offsets_.push_back(offsets_.back() + round_up(pass.packing().size(), 64));
    borrowed_.emplace(memory(), offsets_.back());
    if (!recur || !worth_keeping()) return;
    PackedCache& cache = PackedCache::of_process();
    entry_ = cache.find(key());
    found_ = entry_ != nullptr;
    if (!found_)
      entry_ = cache.make(key(), static_cast<size_t>(weight_bytes()),
                          static_cast<size_t>(offsets_.back()) * sizeof(A));
  }

  /// All threads together; afterwards of() may be read. What decides on the phases is the same for
  /// all of them, whoever comes first.
  void prepare(Crew::Worker& worker) {
    if (found_) {
      compare(worker);
      if (!differ_.load(std::memory_order_relaxed)) return;
      worker.once([&] {  // the next call makes a new entry
        PackedCache::of_process().forget(entry_);
        entry_ = nullptr;
      });
    } else if (entry_) {
      each_chunk(worker, [&](const char* weights, int64_t at, int64_t bytes) {
        std::memcpy(kept(at), weights, static_cast<size_t>(bytes));
      });
    }
    int64_t items = 0;
    for (const Pass& pass : passes_) items += pass.packing().items();
    worker.each(items, [&](int64_t item, int64_t) {
      size_t i = 0;
      while (item >= passes_[i].packing().items()) item -= passes_[i++].packing().items();
      passes_[i].packing().pack(item, of(i));
    });
    if (found_ || !entry_) return;
    compare(worker);  // somebody may have written to the weights meanwhile
    worker.once([&] {
      if (!differ_.load(std::memory_order_relaxed)) PackedCache::of_process().keep(entry_);
    });
  }

  A* of(size_t pass) const {
    A* all = entry_ ? static_cast<A*>(entry_->packed.data()) : borrowed_->get();
    return all + offsets_[pass];
  }

 private:
  static constexpr int64_t kChunk = int64_t{256} << 10;  // bytes compared or copied at a time

  static Scratch& memory() {
    static thread_local Scratch scratch;
    return scratch;
  }

  char* kept(int64_t at) const { return static_cast<char*>(entry_->weights.data()) + at; }

  /// Weights lie densely, and packing them is a good part of the work.
  bool worth_keeping() const {
    const Machine machine = machine_of<A>();
    double packing = 0, all = 0;
    for (const Pass& pass : passes_) {
      const PassShape& s = pass.shape;
      if (!lie_densely(pass)) return false;
      packing += packing_cost(s, pass.plan.algorithm, machine);
      all += pass_cost(s, pass.plan, machine);
    }
    return packing > all / 16;
  }

  /// One output's after the other's, either contiguous or channels_last.
  static bool lie_densely(const Pass& pass) {
    const PassShape& s = pass.shape;
    const Weight& w = pass.weight;
    const int64_t taps = s.kernel_h * s.kernel_w;
    const bool contiguous = w.stride_c == taps && w.stride_h == s.kernel_w && w.stride_w == 1;
    const bool channels_last =
        w.stride_c == 1 && w.stride_h == s.kernel_w * s.in_channels && w.stride_w == s.in_channels;
    return w.stride_k == s.in_channels * taps && (contiguous || channels_last);
  }

  int64_t bytes_of(const Pass& pass) const {
    return pass.shape.out_channels * pass.weight.stride_k * pass.packing().bytes_of_one();
  }
  int64_t weight_bytes() const {
    int64_t sum = 0;
    for (const Pass& pass : passes_) sum += bytes_of(pass);
    return sum;
  }

  PackedCache::Key key() const {
    const Pass& first = passes_.front();
    PackedCache::Key key{D3NET_VECTOR_BYTES, first.packing().bytes_of_one(),
                         first.packing().are_bfloat16(), sizeof(A)};
    key.reserve(key.size() + 11 * passes_.size());
    for (const Pass& pass : passes_)
      for (const int64_t part :
           {reinterpret_cast<int64_t>(pass.weight.data), pass.weight.stride_c,
            pass.shape.in_channels, pass.shape.out_channels, pass.shape.kernel_h,
            pass.shape.kernel_w, static_cast<int64_t>(pass.plan.algorithm),
            int64_t{pass.plan.pairs}, int64_t{pass.plan.amx}, pass.plan.shares, pass.output.lead()})
        key.push_back(part);
    for (const Pass& pass : passes_)
      if (pass.plan.pairs)  // they end with a part
        key.insert(key.end(), pass.input.parts.channels.begin(), pass.input.parts.channels.end());
    return key;
  }

  void compare(Crew::Worker& worker) {
    each_chunk(worker, [&](const char* weights, int64_t at, int64_t bytes) {
      if (std::memcmp(weights, kept(at), static_cast<size_t>(bytes)) != 0)
        differ_.store(true, std::memory_order_relaxed);
    });
  }

  /// item(weights, where they lie among all, bytes), over all passes.
  template <class F>
  void each_chunk(Crew::Worker& worker, F&& item) const {
    int64_t before = 0;
    for (const Pass& pass : passes_) {
      const int64_t bytes = bytes_of(pass);
      const char* weights = static_cast<const char*>(pass.weight.data);
      worker.each(ceil_div(bytes, kChunk), [&](int64_t i, int64_t) {
        item(weights + i * kChunk, before + i * kChunk, std::min(kChunk, bytes - i * kChunk));
      });
      before += bytes;
    }
  }

  const std::vector<Pass>& passes_;
  std::vector<int64_t> offsets_{0};
  bool found_ = false;  // fixed before the threads start, since it decides on their phases
  std::shared_ptr<PackedCache::Entry> entry_;
  std::atomic<bool> differ_{false};
  std::optional<Borrowed<A>> borrowed_;
};

}  // namespace d3net::cpu::D3NET_ISA
