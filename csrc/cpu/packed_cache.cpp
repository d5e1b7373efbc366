#include "packed_cache.h"

#include <algorithm>

namespace d3net::cpu {

PackedCache& PackedCache::of_process() {
  static PackedCache cache;
  return cache;
}

std::shared_ptr<PackedCache::Entry> PackedCache::find(const Key& key) {
  const std::lock_guard lock(mutex_);
  ++clock_;
  for (const auto& entry : entries_)
    if (entry->key == key) {
      entry->used = clock_;
      return entry;
    }
  return nullptr;
}

std::shared_ptr<PackedCache::Entry> PackedCache::make(const Key& key, size_t weight_bytes,
                                                      size_t packed_bytes) {
  const std::lock_guard lock(mutex_);
  const size_t bytes = Pages::size_for(weight_bytes) + Pages::size_for(packed_bytes);
  std::erase_if(entries_, [&](const auto& entry) {
    return entry->key == key || entry->used + kOld < clock_;
  });
  if (!make_room(key, bytes)) return nullptr;
  auto entry = std::make_shared<Entry>();
  entry->key = key;
  entry->weights = Pages(weight_bytes);
  entry->packed = Pages(packed_bytes);
  entry->bytes = bytes;
  entry->used = clock_;
  return entry;
}

bool PackedCache::make_room(const Key& key, size_t bytes) {
  std::erase_if(refused_, [&](const auto& refusal) { return refusal.second + kOld < clock_; });
  const size_t all = held();
  if (all + bytes <= kMostBytes) return true;
  auto refusal =
      std::find_if(refused_.begin(), refused_.end(), [&](const auto& r) { return r.first == key; });
  if (refusal == refused_.end()) {
    refused_.emplace_back(key, clock_);
    return false;
  }
  const uint64_t since = std::exchange(refusal->second, clock_);
  std::ranges::sort(entries_, {}, [](const auto& entry) { return entry->used; });
  size_t freed = 0;
  auto unused = entries_.begin();
  for (; all - freed + bytes > kMostBytes; ++unused) {
    if (unused == entries_.end() || (*unused)->used > since) return false;
    freed += (*unused)->bytes;
  }
  entries_.erase(entries_.begin(), unused);
  refused_.erase(refusal);
  return true;
}

void PackedCache::keep(const std::shared_ptr<Entry>& entry) {
  const std::lock_guard lock(mutex_);
  std::erase_if(entries_, [&](const auto& other) { return other->key == entry->key; });
  if (held() + entry->bytes <= kMostBytes) entries_.push_back(entry);
}

void PackedCache::forget(const std::shared_ptr<Entry>& entry) {
  const std::lock_guard lock(mutex_);
  std::erase(entries_, entry);
}

size_t PackedCache::bytes() {
  const std::lock_guard lock(mutex_);
  return held();
}

size_t PackedCache::held() const {
  size_t sum = 0;
  for (const auto& entry : entries_) sum += entry->bytes;
  return sum;
}

}  // namespace d3net::cpu
