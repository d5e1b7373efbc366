// How a convolution is cut into tiles: pure functions of its shape, never of the number of threads
// (which is why the result has the same bits for any number of them).
#pragma once

#include <algorithm>
#include <cstdint>

namespace d3net::cpu {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

/// Consecutive taps along one axis that reach inside the map.
struct LiveTaps {
  int64_t first, count;
};

/// The taps that reach inside [0, size) from some position in [begin, begin + count), itself
/// inside.
constexpr LiveTaps live_taps(int64_t begin, int64_t count, int64_t size, int64_t kernel,
                             int64_t dilation) {
  const int64_t centre = kernel / 2;
  const int64_t first = std::max<int64_t>(0, centre - (begin + count - 1) / dilation);
  const int64_t last = std::min(kernel - 1, centre + (size - 1 - begin) / dilation);
  return {first, last - first + 1};
}

/// What the plan needs to know of an instruction set.
struct Machine {
  int lanes;           // elements of the accumulation type in one vector
  int registers;       // vector registers
  bool pairs = false;  // two products of bfloat16 in a lane, by one instruction
  bool amx = false;    // a matrix unit for products of bfloat16
};

constexpr int kMaxOutBlock = 13;     // output channels of a microkernel
constexpr int kMaxPixelVectors = 4;  // pixel vectors of a microkernel

/// Accumulators, one row of pixels and one broadcast weight have to fit the register file.
constexpr bool fits(int out_block, int pixel_vectors, int registers) {
  return out_block * pixel_vectors + pixel_vectors + 1 <= registers;
}

/// Outputs x pixel vectors that one microkernel keeps in registers.
struct Blocking {
  int64_t out_block = 1;
  int64_t pixel_vectors = 1;
};

/// Cycles of one (channel, tap) step of a microkernel: two FMA and two 64-byte load ports; a pixel
/// load counts twice because a tap's shift makes it cross cache lines.
constexpr double step_cost(int64_t out_block, int64_t pixel_vectors) {
  return std::max(0.5 * static_cast<double>(out_block * pixel_vectors),
                  0.5 * static_cast<double>(out_block + 2 * pixel_vectors)) +
         0.5;
}

/// The microkernel shape with the least modelled work on rows of `vectors` pixel vectors.
inline Blocking choose_blocking(int64_t out_channels, int64_t vectors, Machine machine) {
  Blocking best;
  double best_cost = 0;
  for (int64_t pv = 1; pv <= kMaxPixelVectors; ++pv) {
    int64_t widest = kMaxOutBlock;
    while (widest > 0 && !fits(static_cast<int>(widest), static_cast<int>(pv), machine.registers))
      --widest;
    if (widest == 0) break;
    const int64_t blocks = ceil_div(out_channels, widest);
    const int64_t kb = ceil_div(out_channels, blocks);
    const int64_t last = out_channels - (blocks - 1) * kb;
    auto row_cost = [&](int64_t outs) {
      const double tail = vectors % pv ? step_cost(outs, vectors % pv) : 0.0;
      return static_cast<double>(vectors / pv) * step_cost(outs, pv) + tail;
    };
    const double cost = static_cast<double>(blocks - 1) * row_cost(kb) + row_cost(last);
    if (best_cost == 0 || cost < best_cost) {
      best_cost = cost;
      best = {kb, pv};
    }
  }
  return best;
}

/// One task computes `out_group` output channels of rows x cols pixels of one image.
struct Tiling {
  int64_t rows = 1, cols = 1;  // cols: a multiple of the lanes, may pass the map's edge
  int64_t out_group = 1;
  int64_t bands = 0, strips = 0, out_groups = 0;
  Blocking blocking;

  int64_t tiles() const { return bands * strips; }
};

constexpr int64_t kAccumulatorBytes = 192 << 10;  // accumulators of a tile: part of L2
constexpr int64_t kStagingBytes = 512 << 10;      // staged rows of a chunk of channels: part of L2
constexpr int64_t kMaxTileVectors = 26;
constexpr int64_t kMaxTileRows = 4;
constexpr int64_t kMaxOutGroup = 64;
constexpr int64_t kWantedTasks = 8;  // enough to share among a few cores

/// dilation_h: the largest among the sources; pairs: columns come in pairs of vectors, as
/// Winograd's transform needs them.
inline Tiling choose_tiling(int64_t batch, int64_t height, int64_t width, int64_t out_channels,
                            int64_t kernel_h, int64_t dilation_h, bool pairs, int64_t element_bytes,
                            Machine machine) {
  Tiling t;
  const int64_t unit = machine.lanes * (pairs ? 2 : 1);  // columns of one vector of accumulators
  const int64_t row_vectors = ceil_div(width, unit);
  t.strips = ceil_div(row_vectors * unit, kMaxTileVectors * machine.lanes);
  const int64_t vectors = ceil_div(row_vectors, t.strips);
  t.blocking = choose_blocking(out_channels, vectors, machine);
  t.strips = ceil_div(row_vectors, vectors);
  t.cols = vectors * unit;

  t.out_groups = ceil_div(out_channels, kMaxOutGroup);
  t.out_group = round_up(ceil_div(out_channels, t.out_groups), t.blocking.out_block);
  t.out_groups = ceil_div(out_channels, t.out_group);

  t.rows = std::clamp<int64_t>(height, 1, kMaxTileRows);
  auto too_large = [&] {
    const int64_t staged_rows = t.rows + (kernel_h - 1) * std::min(dilation_h, t.rows);
    const int64_t channel_bytes = staged_rows * t.cols * (pairs ? 2 : 1) * element_bytes;
    const int64_t tasks = batch * ceil_div(height, t.rows) * t.strips * t.out_groups;
    return t.out_group * t.rows * t.cols * element_bytes > kAccumulatorBytes ||
           channel_bytes * machine.lanes > kStagingBytes || tasks < kWantedTasks;
  };
  while (t.rows > 1 && too_large()) t.rows = ceil_div(t.rows, 2);
  t.bands = ceil_div(height, t.rows);
  return t;
}

constexpr int64_t kGradientBytes = 32 << 10;  // of a block of channels of a tile: part of L1
constexpr int64_t kPartialBytes = 8 << 20;    // all partial weight gradients together
constexpr int64_t kFewestParts = 4, kMostParts = 16;

/// The weight gradient: pixels are cut into tiles, tiles dealt to `parts` partial sums that are
/// added in order at the end; a task owns one part and `out_group` output channels.
struct ReductionTiling {
  Tiling tiling;
  int64_t parts = 1;
};

inline ReductionTiling choose_reduction_tiling(int64_t batch, int64_t height, int64_t width,
                                               int64_t out_channels, int64_t out_block,
                                               int64_t weights, int64_t element_bytes,
                                               Machine machine) {
  ReductionTiling plan;
  Tiling& t = plan.tiling;
  const int64_t row_vectors = ceil_div(width, machine.lanes);
  t.strips = ceil_div(row_vectors, kMaxTileVectors);
  t.cols = ceil_div(row_vectors, t.strips) * machine.lanes;
  t.strips = ceil_div(width, t.cols);
  const int64_t blocks = ceil_div(out_channels, out_block);
  t.blocking.out_block = ceil_div(out_channels, blocks);
  const int64_t row_bytes = t.blocking.out_block * t.cols * element_bytes;
  t.rows = std::clamp<int64_t>(kGradientBytes / row_bytes, 1, height);
  t.bands = ceil_div(height, t.rows);
  t.out_groups = ceil_div(blocks, 3);
  t.out_group = ceil_div(blocks, t.out_groups) * t.blocking.out_block;
  t.out_groups = ceil_div(out_channels, t.out_group);
  plan.parts = std::clamp(kPartialBytes / (weights * element_bytes), kFewestParts, kMostParts);
  plan.parts = std::min(plan.parts, batch * t.tiles());
  return plan;
}

/// Where the rows that a tile reads of one source stand in the staging buffer.
///
/// Each staged channel has `slots` rows of `pitch` elements; output row r of the tile reads, at
/// vertical tap j, slot r + j * tap_rows. When the dilation is at most the tile's height the taps
/// share rows (tap_rows = dilation), otherwise every tap has rows of its own (tap_rows = rows).
/// Column x of the map stands at lead + x - first_column, so a horizontal tap is a shift.
struct Window {
  int64_t slots, tap_rows;
  int64_t reach;  // columns staged on either side: the largest shift that meets the map
  int64_t lead, pitch, channel_stride;
  int64_t chunk;  // channels staged together
  bool winograd;  // rows are transformed: four planes of `pairs` elements a slot
  int64_t pairs, transformed_stride;
};

constexpr int64_t kWinogradPlanes = 4;

/// Winograd's transforms pay where enough products share them.
inline bool prefers_winograd(int64_t width, int64_t channels, int64_t out_channels,
                             int64_t kernel_w, Machine machine) {
  return kernel_w == 3 && out_channels >= 8 && channels >= 12 && width > 3 * machine.lanes;
}

/// The pairs of columns that a dilation forms have to fill vectors and tiles.
inline bool allows_winograd(int64_t dilation_w, int64_t width, const Tiling& tiling,
                            Machine machine) {
  const bool fills_vectors = dilation_w < machine.lanes ? (dilation_w & (dilation_w - 1)) == 0
                                                        : dilation_w % machine.lanes == 0;
  return fills_vectors && dilation_w < width && tiling.cols % (2 * dilation_w) == 0;
}

inline Window choose_window(int64_t channels, int64_t kernel_h, int64_t kernel_w,
                            int64_t dilation_h, int64_t dilation_w, int64_t width, bool winograd,
                            const Tiling& tiling, int64_t element_bytes, Machine machine) {
  Window w;
  w.winograd = winograd;
  w.tap_rows = std::min(dilation_h, tiling.rows);
  w.slots = tiling.rows + (kernel_h - 1) * w.tap_rows;
  const int64_t live_shifts = width > 0 ? (width - 1) / dilation_w : 0;
  w.reach = std::min(kernel_w / 2, live_shifts) * dilation_w;
  const int64_t margin = winograd ? 2 * std::max<int64_t>(dilation_w, machine.lanes) : w.reach;
  w.lead = round_up(margin, machine.lanes);
  w.pitch = round_up(w.lead + tiling.cols + margin, machine.lanes) + machine.lanes;
  w.pairs = tiling.cols / 2;
  // An odd number of cache lines between channels: their rows never fall on one cache set.
  const int64_t line = 64 / element_bytes;
  auto odd_lines = [&](int64_t elements) { return (ceil_div(elements, line) | 1) * line; };
  w.channel_stride = odd_lines(w.slots * w.pitch);
  w.transformed_stride = odd_lines(w.slots * kWinogradPlanes * w.pairs);
  const int64_t hot = winograd ? w.transformed_stride : w.channel_stride;
  const int64_t most = std::clamp<int64_t>(kStagingBytes / (hot * element_bytes), 4, 64);
  w.chunk = ceil_div(channels, ceil_div(channels, most));
  // Whole vectors of channels, so that interleaved channels are read once.
  if (w.chunk < channels && most >= machine.lanes)
    w.chunk = std::min(round_up(w.chunk, machine.lanes), most / machine.lanes * machine.lanes);
  return w;
}

}  // namespace d3net::cpu
