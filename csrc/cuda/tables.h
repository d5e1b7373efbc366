// Launches with typed parameters, and the tables that launches read.
#pragma once

#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "program.h"

namespace d3net::cuda {

constexpr int kThreads = 256;  // of the small kernels

template <class Params>
void launch(Device& device, const std::string& kernel, int64_t blocks, int threads,
            const Params& params, int64_t shared_bytes = 0) {
  device.launch(kernel.c_str(), blocks, threads, shared_bytes, &params, sizeof params);
}

/// Tables on their way to device memory, all of them in as few launches as they fill.
class Tables {
 public:
  /// `*address` will be that of the uploaded table.
  template <class Entry>
  void add(const std::vector<Entry>& table, const Entry** address) {
    static_assert(sizeof(Entry) % 4 == 0 && alignof(Entry) <= 8);
    places_.push_back({bytes_.size(), [address](const char* at) {
                         *address = reinterpret_cast<const Entry*>(at);
                       }});
    const char* first = reinterpret_cast<const char*>(table.data());
    bytes_.insert(bytes_.end(), first, first + table.size() * sizeof(Entry));
    bytes_.resize((bytes_.size() + 7) / 8 * 8);
  }

  void upload(Device& device) const {
    const int64_t words = static_cast<int64_t>(bytes_.size() / 4);
    auto* to = static_cast<uint32_t*>(device.allocate(words * 4));
    for (int64_t done = 0; done < words; done += Upload::kWords) {
      const auto size = static_cast<int32_t>(std::min<int64_t>(words - done, Upload::kWords));
      Upload piece{to + done, size, {}};
      std::memcpy(piece.data, bytes_.data() + done * 4, static_cast<size_t>(size) * 4);
      launch(device, "upload_table", 1, kThreads, piece);
    }
    for (const Place& place : places_)
      place.set_address(reinterpret_cast<const char*>(to) + place.offset);
  }

 private:
  struct Place {
    size_t offset;
    std::function<void(const char*)> set_address;
  };
  std::vector<Place> places_;
  std::vector<char> bytes_;
};

}  // namespace d3net::cuda
