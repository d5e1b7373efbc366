// How one source is convolved: direct, or by Winograd's transforms on 2x2 or 4x4 outputs. Pure
// functions of shapes and of the instruction set, never of the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "plan.h"
#include "tile_grid.h"

namespace d3net::cpu {

/// The value is the number of outputs along each side of a tile.
enum class Algorithm : int { direct = 1, winograd2 = 2, winograd4 = 4 };

/// What torch's float32 precision switch allows: "highest", "high" and "medium".
enum class Precision : int { highest = 0, high = 1, medium = 2 };

/// The convolution of one source for some of its consumers, or its transpose.
struct PassShape {
  int64_t batch = 0, height = 0, width = 0;
  int64_t in_channels = 0, out_channels = 0;
  int64_t kernel_h = 3, kernel_w = 3;
  int64_t dilation_h = 1, dilation_w = 1;

  TileGrid grid(Algorithm algorithm) const {
    if (algorithm == Algorithm::direct) return {batch, height, width, 1, 1, 1};
    return {batch, height, width, dilation_h, dilation_w, static_cast<int64_t>(algorithm)};
  }
  int64_t tap_y(int64_t y, int64_t i) const { return y + (i - kernel_h / 2) * dilation_h; }
  int64_t tap_x(int64_t x, int64_t j) const { return x + (j - kernel_w / 2) * dilation_w; }
  bool inside(int64_t y, int64_t x) const { return y >= 0 && y < height && x >= 0 && x < width; }

  /// The taps that reach inside the map from any of these outputs; returns how many.
  template <class Tile>
  int64_t live_taps_of(const Tile* tiles, int64_t num_tiles, int* live) const {
    int64_t count = 0;
    for (int64_t tap = 0; tap < kernel_h * kernel_w; ++tap)
      for (int64_t t = 0; t < num_tiles; ++t)
        if (inside(tap_y(tiles[t].y, tap / kernel_w), tap_x(tiles[t].x, tap % kernel_w))) {
          live[count++] = static_cast<int>(tap);
          break;
        }
    return count;
  }

  int64_t positions(Algorithm algorithm) const {
    if (algorithm == Algorithm::direct) return kernel_h * kernel_w;
    const int64_t side = static_cast<int64_t>(algorithm) + 2;
    return side * side;
  }
};

struct PassPlan {
  Algorithm algorithm = Algorithm::direct;
  int64_t tiles = 24;  // of one task
};

constexpr int64_t kMostTiles = 24;
constexpr int64_t kMostTaps = 64;

/// Taps along an axis that a run of `run` outputs needs, on average.
inline double mean_live_taps(int64_t size, int64_t kernel, int64_t dilation, int64_t run) {
  int64_t taps = 0, runs = 0;
  for (int64_t begin = 0; begin < size; begin += run, ++runs)
    taps += live_taps(begin, std::min(run, size - begin), size, kernel, dilation).count;
  return static_cast<double>(taps) / static_cast<double>(runs);
}

/// Modelled cycles of one core: two FMA a cycle, and what a tile costs to transform, per vector of
/// channels, in and out (from counting their loads, stores and arithmetic).
inline double pass_cost(const PassShape& s, Algorithm algorithm, Machine machine) {
  const double tiles = static_cast<double>(s.grid(algorithm).count());
  const double in_vectors = static_cast<double>(ceil_div(s.in_channels, machine.lanes));
  const double out_vectors = static_cast<double>(ceil_div(s.out_channels, machine.lanes));
  const double channels = static_cast<double>(s.in_channels);
  if (algorithm == Algorithm::direct) {
    const double taps = mean_live_taps(s.height, s.kernel_h, s.dilation_h, 1) *
                        mean_live_taps(s.width, s.kernel_w, s.dilation_w, kMostTiles);
    return tiles * (taps * channels * out_vectors / 2 + 2.5 * taps * in_vectors + 5 * out_vectors);
  }
  const bool large = algorithm == Algorithm::winograd4;
  return tiles * ((large ? 36 : 16) * channels * out_vectors / 2 + (large ? 150 : 45) * in_vectors +
                  (large ? 120 : 35) * out_vectors);
}

/// The cheapest algorithm that the kernel's size and the precision permit. `exact` asks for direct
/// sums, as float64 does.
inline PassPlan plan_pass(const PassShape& s, Precision precision, bool exact, Machine machine) {
  PassPlan plan;
  if (s.kernel_h == 3 && s.kernel_w == 3 && !exact) {
    double best = pass_cost(s, Algorithm::direct, machine);
    for (const Algorithm algorithm : {Algorithm::winograd2, Algorithm::winograd4}) {
      if (algorithm == Algorithm::winograd4 && precision == Precision::highest) continue;
      const double cost = pass_cost(s, algorithm, machine);
      if (cost < best) {
        best = cost;
        plan.algorithm = algorithm;
      }
    }
  }
  // Small maps are cut finer, so that there are tasks to share.
  plan.tiles = s.grid(plan.algorithm).count() < kWantedTasks * kMostTiles ? 12 : kMostTiles;
  return plan;
}

}  // namespace d3net::cpu
