// Channels that lie in one or several tensors, in groups of at most so many.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "plan.h"

namespace d3net::cpu::D3NET_ISA {

/// The groups of at most `most` channels that lie in parts of so many channels; none reaches into
/// the next part.
inline int64_t count_groups(const std::vector<int64_t>& parts, int64_t most) {
  int64_t sum = 0;
  for (const int64_t channels : parts) sum += ceil_div(channels, most);
  return sum;
}
/// item(part, its channel, the channel among all, group, how many) for each of them.
template <class F>
D3NET_INLINE void each_channel_group(const std::vector<int64_t>& parts, int64_t most, F&& item) {
  int64_t group = 0, before = 0;
  for (size_t i = 0; i < parts.size(); before += parts[i++])
    for (int64_t c = 0; c < parts[i]; c += most, ++group)
      item(i, c, before + c, group, std::min(most, parts[i] - c));
}

}  // namespace d3net::cpu::D3NET_ISA
