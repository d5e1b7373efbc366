// How one source is convolved: direct, or by Winograd's transforms on 2x2 or 4x4 outputs. Pure
// functions of shapes and of the instruction set, never of the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>

#include "../multidilated_conv.h"
#include "plan.h"
#include "tile_grid.h"

namespace d3net::cpu {

/// The value is the number of outputs along each side of a tile.
enum class Algorithm : int { direct = 1, winograd2 = 2, winograd4 = 4 };

inline const char* name_of(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::direct: return "direct";
    case Algorithm::winograd2: return "winograd F(2x2, 3x3)";
    case Algorithm::winograd4: return "winograd F(4x4, 3x3)";
  }
  return "";
}

/// The convolution of one source for some of its consumers, or its transpose.
struct PassShape {
  int64_t batch = 0, height = 0, width = 0;
  int64_t in_channels = 0, out_channels = 0;
  int64_t kernel_h = 3, kernel_w = 3;
  int64_t dilation_h = 1, dilation_w = 1;
  int64_t in_tensors = 1;  // that the input channels lie in

  /// That of the data gradient, which reads one tensor.
  PassShape transposed() const {
    PassShape s = *this;
    std::swap(s.in_channels, s.out_channels);
    s.in_tensors = 1;
    return s;
  }
  TileGrid grid(Algorithm algorithm) const {
    if (algorithm == Algorithm::direct) return {batch, height, width, 1, 1, 1};
    return {batch, height, width, dilation_h, dilation_w, static_cast<int64_t>(algorithm)};
  }
  int64_t tap_y(int64_t y, int64_t i) const { return y + (i - kernel_h / 2) * dilation_h; }
  int64_t tap_x(int64_t x, int64_t j) const { return x + (j - kernel_w / 2) * dilation_w; }
  bool inside(int64_t y, int64_t x) const { return y >= 0 && y < height && x >= 0 && x < width; }

  /// The taps that may reach inside the map from any pixel of the box; returns how many.
  int64_t live_taps_of(const Box& box, int* live) const {
    const LiveTaps vertical = live_taps(box.y, box.rows, height, kernel_h, dilation_h);
    const LiveTaps horizontal = live_taps(box.x, box.columns, width, kernel_w, dilation_w);
    int64_t taps = 0;
    for (int64_t i = vertical.first; i < vertical.first + vertical.count; ++i)
      for (int64_t j = horizontal.first; j < horizontal.first + horizontal.count; ++j)
        live[taps++] = static_cast<int>(i * kernel_w + j);
    return taps;
  }

  int64_t positions(Algorithm algorithm) const {
    if (algorithm == Algorithm::direct) return kernel_h * kernel_w;
    const int64_t side = static_cast<int64_t>(algorithm) + 2;
    return side * side;
  }
};

struct PassPlan {
  Algorithm algorithm = Algorithm::direct;
  bool pairs = false;  // direct products of two channels at once, rounded to bfloat16
  bool amx = false;    // by the matrix unit
  int64_t tiles = 24;  // of one task
  int64_t shares = 1;  // of the output channels: so many tasks work on the same tiles
};

constexpr int64_t kTiles = 24;      // of a task as a rule
constexpr int64_t kMostTiles = 64;  // of a task for the matrix unit
constexpr int64_t kMostTaps = 64;
constexpr int64_t kAmxTiles = 32;  // the matrix unit multiplies so many at a time

/// Runs of tiles, which are the tasks but for `shares`. For the matrix unit a run lies in a row.
inline int64_t count_runs(const PassShape& s, const PassPlan& plan) {
  if (plan.amx) return s.batch * s.height * ceil_div(s.width, plan.tiles);
  return ceil_div(s.grid(plan.algorithm).count(), plan.tiles);
}

/// Taps along an axis that a run of `run` outputs needs, on average.
inline double mean_live_taps(int64_t size, int64_t kernel, int64_t dilation, int64_t run) {
  int64_t taps = 0, runs = 0;
  for (int64_t begin = 0; begin < size; begin += run, ++runs)
    taps += live_taps(begin, std::min(run, size - begin), size, kernel, dilation).count;
  return static_cast<double>(taps) / static_cast<double>(runs);
}

/// Modelled cycles of one core: two FMA a cycle, four in pairs, or sixteen by the matrix unit, half
/// of its best, and what a tile costs to transform, in and out, per vector of channels (from
/// counting loads, stores and arithmetic).
inline double pass_cost(const PassShape& s, const PassPlan& plan, Machine machine) {
  const int64_t there = s.grid(plan.algorithm).count();
  const double tiles =
      static_cast<double>(plan.amx ? there / s.width * round_up(s.width, kAmxTiles) : there);
  const double in_vectors = static_cast<double>(ceil_div(s.in_channels, machine.lanes));
  const double out_vectors = static_cast<double>(ceil_div(s.out_channels, machine.lanes));
  const double products = static_cast<double>(s.in_channels) * out_vectors;
  double taps = 36, in = 150, out = 120;
  if (plan.algorithm == Algorithm::winograd2) {
    taps = 16, in = 45, out = 35;
  } else if (plan.algorithm == Algorithm::direct) {
    taps = mean_live_taps(s.height, s.kernel_h, s.dilation_h, 1) *
           mean_live_taps(s.width, s.kernel_w, s.dilation_w, kTiles);
    in = 2.5 * taps, out = 5;
  }
  double a_cycle = plan.pairs ? 4 : 2;
  if (plan.amx)  // each tensor's channels in groups of 32
    a_cycle =
        16 * static_cast<double>(s.in_channels) /
        static_cast<double>(round_up(ceil_div(s.in_channels, s.in_tensors), 2 * machine.lanes) *
                            s.in_tensors);
  return tiles * (taps * products / a_cycle + in * in_vectors + out * out_vectors);
}

/// What it costs to pack the weights: measured, most of it the stores that miss the caches.
inline double packing_cost(const PassShape& s, Algorithm algorithm, Machine machine) {
  const double weights = algorithm == Algorithm::winograd4   ? 1000
                         : algorithm == Algorithm::winograd2 ? 450
                                                             : 120;
  return weights * static_cast<double>(s.in_channels * ceil_div(s.out_channels, machine.lanes));
}

/// The cheapest algorithm that the kernel's size and the precision permit. `exact` asks for direct
/// sums, as float64 does. Packing counts for a quarter: small maps have it kept from call to call,
/// where the weights stay, and results are not to depend on whether they do.
inline PassPlan plan_pass(const PassShape& s, Precision precision, bool exact, Machine machine) {
  PassPlan plan;
  double best = std::numeric_limits<double>::infinity();
  auto consider = [&](Algorithm algorithm, bool pairs = false, bool amx = false) {
    const PassPlan candidate{algorithm, pairs, amx};
    const double cost = pass_cost(s, candidate, machine) + packing_cost(s, algorithm, machine) / 4;
    if (cost >= best) return;
    best = cost;
    plan = candidate;
  };
  consider(Algorithm::direct);
  if (!exact) {
    const bool transforms = s.kernel_h == 3 && s.kernel_w == 3;
    if (transforms) consider(Algorithm::winograd2);
    if (transforms && precision >= Precision::high) consider(Algorithm::winograd4);
    if (machine.pairs && precision == Precision::medium) {
      consider(Algorithm::direct, true);
      if (machine.amx) consider(Algorithm::direct, true, true);
    }
  }
  // Small maps are cut finer, so that there are tasks to share.
  const int64_t most = !plan.amx ? kTiles : s.width > kAmxTiles ? kMostTiles : kAmxTiles;
  const bool small = s.grid(plan.algorithm).count() < kWantedTasks * most;
  plan.tiles = small && most != kAmxTiles ? most / 2 : most;
  const int64_t most_shares = std::max<int64_t>(1, s.out_channels / (2 * machine.lanes));
  plan.shares = std::min(most_shares, ceil_div(kWantedTasks, count_runs(s, plan)));
  return plan;
}

}  // namespace d3net::cpu
