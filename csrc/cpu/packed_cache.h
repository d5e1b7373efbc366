// Packed weights from call to call, for maps so small that packing would take a good part of the
// time. What is kept serves only a call whose weights equal, byte by byte, those it was made from:
// no change, however it was made, can be missed.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "parallel.h"

namespace d3net::cpu {

class PackedCache {
 public:
  static constexpr size_t kMostBytes = size_t{128} << 20;
  /// What so many look-ups passed by has no user any more.
  static constexpr uint64_t kOld = 1000;

  /// Addresses of the weights and all that decides how they are packed.
  using Key = std::vector<int64_t>;

  struct Entry {
    Key key;
    Pages weights, packed;  // as they were, and what became of them
    size_t bytes = 0;
    uint64_t used = 0;
  };

  static PackedCache& of_process();

  /// The entry of a key, or null. It stays alive while somebody holds it.
  std::shared_ptr<Entry> find(const Key& key);
  /// Memory for a new entry, or null where there is no room. Entries that nobody asked for since
  /// the key was last refused give way; of a network too large for the cache all others are asked
  /// for in between, so that none is thrown out only to be made again.
  std::shared_ptr<Entry> make(const Key& key, size_t weight_bytes, size_t packed_bytes);
  /// Hands over an entry that make() gave, filled, if there is still room; it replaces an older one
  /// of its key.
  void keep(const std::shared_ptr<Entry>& entry);
  void forget(const std::shared_ptr<Entry>& entry);
  size_t bytes();

 private:
  size_t held() const;
  bool make_room(const Key& key, size_t bytes);

  std::mutex mutex_;
  std::vector<std::shared_ptr<Entry>> entries_;
  std::vector<std::pair<Key, uint64_t>> refused_;  // and when
  uint64_t clock_ = 0;
};

}  // namespace d3net::cpu
