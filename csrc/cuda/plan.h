// How the work is cut: pure functions of (shape, dtype, architecture), free of CUDA, for unit
// tests.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"

namespace d3net::cuda {

/// What a choice may depend on. `capability` is 80 for sm_80.
struct Arch {
  int capability = 80;
  int multiprocessors = 108;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

/// Parts of the rows for the direct weight gradient: enough blocks to fill the device a few times,
/// and enough pixels a part for its sums to be worth a reduction over the block.
inline int64_t direct_gradient_parts(const Problem& p, const Arch& arch) {
  const int64_t taps = p.kernel_h * p.kernel_w;
  const int64_t groups = p.in_channels * divide_up(taps, kGradientTaps) + 1;
  const int64_t blocks = groups * divide_up(p.out_channels, kGradientOutputs);
  const int64_t rows = p.batch * p.height;
  const int64_t wanted = divide_up(int64_t{8} * arch.multiprocessors, blocks);
  const int64_t fewest_pixels = 8 * kDirectThreads;
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, rows * p.width / fewest_pixels));
}

}  // namespace d3net::cuda
