// How the work is cut: functions of (shape, dtype, architecture) alone, but for what the
// environment variable D3NET_KERNELS_CUDA_PLAN fixes; free of CUDA, for unit tests.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "geometry.h"
#include "params.h"

namespace d3net::cuda {

/// What a choice may depend on. `capability` is 80 for sm_80.
struct Arch {
  int capability = 80;
  int multiprocessors = 108;
};

/// What a user may fix to tune for a GPU; 0: chosen here.
struct Tuning {
  int tiles = 0;      // of 8 outputs a block of the tensor-core convolutions, 1 to kMostTiles
  int64_t parts = 0;  // of the map in a weight gradient
};

/// Of a text such as "tiles=3,parts=8"; null or empty: nothing fixed.
inline Tuning tuning_of(const char* text) {
  Tuning tuning;
  std::istringstream entries(text ? text : "");
  for (std::string entry; std::getline(entries, entry, ',');) {
    const size_t equals = std::min(entry.find('='), entry.size());
    const std::string name = entry.substr(0, equals);
    const char* digits = entry.c_str() + std::min(equals + 1, entry.size());
    char* end = nullptr;
    const int64_t value = std::strtoll(digits, &end, 10);
    const bool number = *digits && !*end && value >= 1;
    if (number && name == "tiles" && value <= kMostTiles)
      tuning.tiles = static_cast<int>(value);
    else if (number && name == "parts")
      tuning.parts = value;
    else
      throw std::runtime_error("D3NET_KERNELS_CUDA_PLAN is \"" + std::string(text) +
                               "\"; accepted are tiles=1 to tiles=" + std::to_string(kMostTiles) +
                               " and parts=1 or more, separated by a comma");
  }
  return tuning;
}

inline Tuning tuning() { return tuning_of(std::getenv("D3NET_KERNELS_CUDA_PLAN")); }

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

/// Parts of the rows for the direct weight gradient: enough blocks to fill the device a few times,
/// and enough pixels a part for its sums to be worth a reduction over the block.
inline int64_t direct_gradient_parts(const Problem& p, const Arch& arch) {
  const int64_t taps = p.kernel_h * p.kernel_w;
  const int64_t groups = p.in_channels * divide_up(taps, kGradientTaps) + 1;
  const int64_t blocks = groups * divide_up(p.out_channels, kGradientOutputs);
  const int64_t rows = p.batch * p.height;
  const int64_t fixed = tuning().parts;
  const int64_t wanted = fixed ? fixed : divide_up(int64_t{8} * arch.multiprocessors, blocks);
  const int64_t fewest_pixels = 8 * kDirectThreads;
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, rows * p.width / fewest_pixels));
}

/// Why the tensor-core convolutions do not take a problem; null where they do.
inline const char* tensor_refuses(const Problem& p, const Arch& arch) {
  if (arch.capability < 80) return "the GPU has no mma.sync for bfloat16 and TF32";
  if (p.dtype == DType::float64) return "the dtype has 64 bits";
  if (p.dtype == DType::float32 && p.precision == Precision::highest)
    return "torch allows no TF32 in place of float32";
  if (p.kernel_h != 3 || p.kernel_w != 3) return "the kernel is not 3x3";
  constexpr int64_t kMost = 1 << 28;  // rows and columns are int
  if (p.height > kMost || p.width > kMost) return "the map is too large";
  for (int64_t i = 0; i < p.num_sources; ++i) {
    const int64_t h = p.sources[i].dilation_h, w = p.sources[i].dilation_w;
    if (h != w && h < p.height && w < p.width) return "a dilation differs in height and width";
  }
  return nullptr;
}

/// The widest access to a map of so many channels and columns.
inline Access access_of(const View& v, int64_t channels, int64_t width, int64_t element_bytes) {
  auto fits = [](int64_t elements) { return elements % kPixelsALoad == 0; };
  if (reinterpret_cast<uintptr_t>(v.data) % (element_bytes * kPixelsALoad) || !fits(v.stride_n) ||
      !fits(v.stride_h))
    return Access::any;
  if (v.stride_w == 1 && fits(v.stride_c) && fits(width)) return Access::rows;
  return v.stride_c == 1 && fits(v.stride_w) && fits(channels) ? Access::pixels : Access::any;
}

/// The same from a column on that may divide vectors of pixels.
inline Access access_from(int64_t column, Access access) {
  return access == Access::rows && column % kPixelsALoad ? Access::any : access;
}

/// The tile of a block of a tensor-core kernel: 8 * tiles outputs, so many rows.
struct TensorTile {
  int tiles, rows;
};

/// What is compiled (kernels.h): as many rows as the registers hold without spilling.
constexpr TensorTile kTensorTiles[] = {{1, 8}, {2, 8}, {3, 6}, {4, 4}, {5, 4}};

/// Blocks of outputs: as few columns of padding as possible, then as few blocks as possible.
inline int tensor_tiles(const std::vector<int64_t>& channels) {
  if (const int fixed = tuning().tiles) return fixed;
  int best = 1;
  int64_t least = -1;
  for (int tiles = kMostTiles; tiles >= 1; --tiles) {
    int64_t cost = 0;
    for (int64_t c : channels)  // a block costs about one tile more than it has: staging its input
      cost += divide_up(c, 8 * tiles) * (tiles + 1);
    if (least < 0 || cost < least) least = cost, best = tiles;
  }
  return best;
}

inline TensorTile tensor_tile(int tiles) {
  for (const TensorTile& tile : kTensorTiles)
    if (tile.tiles == tiles) return tile;
  return {0, 0};
}

/// The stages of one chunk of channels, in the order of the kinds. `stage` holds what they share.
inline void append_stages(std::vector<Stage>& to, Stage stage, int64_t dilation_h,
                          int64_t dilation_w, TensorTile tile, const Problem& p) {
  const Kinds kinds = kinds_of(tile.rows);
  const int tap = tap_slots(tile.tiles);
  const int first = stage.chunk * 9 * tap;
  // Taps that see padding only, wherever they are, have no stage.
  const bool vertical = dilation_h < p.height, horizontal = dilation_w < p.width;
  const int d = static_cast<int>(horizontal ? dilation_w : vertical ? dilation_h : 0);
  const bool band = d <= kWidestBand && horizontal;
  const Access access = stage.access;
  auto add = [&](int kind, int row, int column, int weights) {
    const Kind& k = kinds.kind[kind];
    stage.kind = kind;
    stage.row = row, stage.rows = k.rows;
    stage.column = column - k.halo, stage.columns = k.columns;
    stage.access = access_from(stage.column, access);
    stage.weights = weights;
    to.push_back(stage);
  };
  stage.dilation = d;
  if (band && vertical && kinds.has_all(d)) {
    for (int i = 0; i < kinds.count; ++i)
      if (kinds.kind[i].taps == Taps::all && kinds.kind[i].dilation == d)
        add(i, kinds.kind[i].first_row, 0, first);
    return;
  }
  const int halo = band ? kinds.halo_for(d) : 0;
  for (int r = vertical ? 0 : 1; r < (vertical ? 3 : 2); ++r)
    for (int i = 0; i < kinds.count; ++i) {
      const Kind& k = kinds.kind[i];
      const int row = (r - 1) * d + k.first_row;
      if (band && k.taps == Taps::row && k.halo == halo) add(i, row, 0, first + 3 * r * tap);
      if (!band && k.taps == Taps::one)
        for (int s = horizontal ? 0 : 1; s < (horizontal ? 3 : 2); ++s)
          add(i, row, (s - 1) * d, first + (3 * r + s) * tap);
    }
}

/// Sizes of the walks of a weight gradient over a map of that height, so many rows a step.
inline void set_walks(WeightJob& job, int64_t dilation, int64_t height, int64_t rows) {
  const int64_t d = dilation < height ? dilation : 0;
  job.row_dilation = static_cast<int32_t>(d);
  job.stride = static_cast<int32_t>(std::max<int64_t>(d, rows));
  job.remainders = static_cast<int32_t>(divide_up(job.stride, rows));
  job.steps = static_cast<int32_t>(divide_up(height, job.stride));
}

/// Parts of the map for the tensor-core weight gradient: as many as fill the device in one wave.
inline int64_t tensor_gradient_parts(int64_t jobs, int64_t steps, const Arch& arch) {
  const int64_t fixed = tuning().parts;
  return std::clamp<int64_t>(fixed ? fixed : int64_t{2} * arch.multiprocessors / jobs, 1, steps);
}

}  // namespace d3net::cuda
