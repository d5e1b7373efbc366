// One source's convolution for all its consumers, on tiles: channels are adjacent in memory and
// lanes are channels, so that a dilation is nothing but a distance between pixels.
//
// A task takes 12 or 24 tiles, or more single pixels for the matrix unit: psi on load and transform
// into V, a matrix product for each position of the transformed tile, and the inverse transform
// into the destination.
#pragma once

#include <vector>

#include "amx.h"
#include "parallel.h"
#include "tile_output.h"
#include "weight_packing.h"

namespace d3net::cpu::D3NET_ISA {

/// In: what is convolved is kept as. X: features and 16-bit weights. A: sums.
template <class In, class X, class A>
class TilePass {
  static constexpr int kN = kLanes<A>;

 public:
  using Sum = A;

  PassShape shape;
  PassPlan plan;
  TileInput<In, A> input;
  Weight weight;              // k: outputs, c: inputs
  bool wide_weights = false;  // of type A, not X
  TileOutput<X, A> output;

  /// Runs of tiles, each with sums of its own.
  int64_t runs() const { return count_runs(shape, plan); }
  int64_t tasks() const { return runs() * plan.shares; }

  WeightPacking<X, A> packing() const {
    return {shape,        plan,          input.parts.channels, weight,
            wide_weights, output.lead(), output.vectors()};
  }

  /// Computes the tiles of a task; `next` is the one after it, or -1.
  void run(int64_t task, int64_t next, const A* packed) const {
    switch (plan.algorithm) {
      case Algorithm::direct:
        if constexpr (kMayPair)
          if (plan.pairs) return run_tiles<1, true>(task, next, packed);
        return run_tiles<1>(task, next, packed);
      case Algorithm::winograd2:
        if constexpr (kTransforms) run_tiles<2>(task, next, packed);
        return;
      case Algorithm::winograd4:
        if constexpr (kTransforms) run_tiles<4>(task, next, packed);
        return;
    }
  }

 private:
  static constexpr bool kTransforms = std::is_same_v<A, float>;
  static constexpr bool kMayPair = kPairs && std::is_same_v<A, float>;

  template <int m, bool pairs = false>
  void run_tiles(int64_t task, int64_t next, const A* packed) const {
    static thread_local Scratch v_memory, product_memory;
    const int64_t run = task / plan.shares, next_run = next < 0 ? -1 : next / plan.shares;
    const int64_t positions = shape.positions(plan.algorithm);
    const Tiles tiles = tiles_of(run), ahead = next_run <= run ? Tiles() : tiles_of(next_run);

    const int64_t v_position = input.parts.groups(pairs ? 2 * kN : kN) * plan.tiles * kN + kN;
    A* v = v_memory.get<A>(positions * v_position);
    int live[kMostTaps];
    int64_t num_live = 0;
    if constexpr (m == 1) num_live = shape.live_taps_of(box_of(tiles, run), live);
    int64_t v_offsets[kMostTaps];
    AmxArgs amx;
    if (pairs && plan.amx)
      amx = stage_for_amx(tiles, live, num_live, v, v_position, v_offsets);
    else
      input.template transform<m, pairs>(shape, tiles, live, num_live, v, plan.tiles, v_position);

    const WeightPacking<X, A> packing = this->packing();
    const int64_t share = task % plan.shares;
    const int64_t begin = packing.share_begin(share), end = packing.share_begin(share + 1);
    for (int64_t first = 0; first < begin; first += packing.chunk_at(first))
      packed += packing.chunk_size(packing.chunk_at(first));
    for (int64_t first = begin; first < end;) {
      const int chunk = packing.chunk_at(first);
      const bool last_chunk = first + chunk >= end;
      const int64_t product_position = chunk * plan.tiles * kN + kN;
      A* products = product_memory.get<A>((m == 1 ? 1 : positions) * product_position);
      MultiplyArgs<A> args;
      args.v = v, args.v_position = v_position;
      args.u = packed, args.u_position = packing.position(chunk);
      args.channels = input.parts.channels.data();
      args.num_parts = static_cast<int64_t>(input.parts.channels.size());
      args.tiles = plan.tiles, args.count = tiles.count, args.products = products;
      const auto kernel = kMultiply<A, pairs>[plan.tiles % 24 == 0][chunk - 1];
      if constexpr (m == 1) {
        args.positions = live;
        args.num_positions = num_live;
        output.template prefetch_outputs<m>(shape, tiles, 0, first, chunk);
        if (last_chunk) prefetch_lowest_row(ahead);
        if constexpr (pairs && kMayAmx) {
          if (plan.amx) {
            amx.u = packed, amx.u_position = packing.position(chunk), amx.products = products;
            amx_multiply(amx, chunk);
          } else {
            kernel(args);
          }
        } else {
          kernel(args);
        }
      } else {
        for (int p = 0; p < positions; ++p) {
          output.template prefetch_outputs<m>(shape, tiles, p, first, chunk);
          if (last_chunk) prefetch_inputs<m>(ahead, p);
          args.positions = &p;
          args.products = products + p * product_position;
          kernel(args);
        }
      }
      for (int k = 0; k < chunk; ++k)
        output.template write_vector<m>(shape, tiles, run, first + k,
                                        products + k * plan.tiles * kN, product_position);
      packed += packing.chunk_size(chunk);
      first += chunk;
    }
  }

  /// For the matrix unit neighbours in a row of the map, else neighbours of the walk.
  Tiles tiles_of(int64_t run) const {
    if (!plan.amx) return {shape.grid(plan.algorithm), run * plan.tiles, plan.tiles};
    const int64_t in_row = ceil_div(shape.width, plan.tiles), in_image = in_row * shape.height;
    const int64_t image = run / in_image, left = run % in_image;
    const bool low = shape.height <= TileCursor::kLow;
    const int64_t y = low ? left % shape.height : left / in_row;
    const int64_t x = (low ? left / shape.height : left % in_row) * plan.tiles;
    return {{image, y, x}, std::min(plan.tiles, shape.width - x)};
  }
  /// What the tiles of direct convolution lie in.
  Box box_of(const Tiles& tiles, int64_t run) const {
    if (plan.amx) return {tiles.at[0].y, 1, tiles.at[0].x, tiles.count};
    return cpu::box_of(shape.grid(plan.algorithm), run * plan.tiles, tiles.count);
  }

  /// What the matrix unit multiplies of some neighbours in a row: where taps overlap, each pixel of
  /// the rows they read once; else each tap's pixels by themselves.
  AmxArgs stage_for_amx(const Tiles& tiles, const int* live, int64_t num_live, A* v,
                        int64_t v_position, int64_t* v_offsets) const {
    AmxArgs args;
    if constexpr (kMayPair) {
      const int64_t groups = input.parts.groups(2 * kN);
      args = {v, v_offsets, plan.tiles * kN, groups,     nullptr,
              0, live,      num_live,        plan.tiles, tiles.count};
      if (shape.dilation_w < plan.tiles) {
        const int64_t span = plan.tiles + (shape.kernel_w - 1) * shape.dilation_w;
        const Origin& first = tiles.at[0];
        args.v_group = span * kN;
        for (int64_t q = 0, staged = -1; q < num_live; ++q) {
          const int64_t i = live[q] / shape.kernel_w, j = live[q] % shape.kernel_w;
          A* row = v + i * groups * args.v_group;
          if (i != staged)
            input.stage_pairs(shape, first.image, shape.tap_y(first.y, i), shape.tap_x(first.x, 0),
                              span, row, args.v_group);
          staged = i;
          v_offsets[q] = row - v + j * shape.dilation_w * kN;
        }
      } else {
        input.template transform<1, true>(shape, tiles, live, num_live, v, plan.tiles, v_position);
        for (int64_t q = 0; q < num_live; ++q) v_offsets[q] = live[q] * v_position;
      }
    }
    return args;
  }

  // ---- what is needed next comes to L2 while the products are made ------------------------------

  /// Of direct convolution, the inputs that no earlier row of outputs has read.
  D3NET_INLINE void prefetch_lowest_row(const Tiles& tiles) const {
    for (int64_t t = 0; t < tiles.count; ++t) {
      const Origin& tile = tiles.at[t];
      const int64_t y = shape.tap_y(tile.y, shape.kernel_h - 1);
      if (y < shape.height) input.parts.prefetch_pixel(tile.image, y, tile.x);
    }
  }

  /// The inputs that the next task's tiles do not share with their neighbours.
  template <int m>
  D3NET_INLINE void prefetch_inputs(const Tiles& tiles, int p) const {
    constexpr int side = m + 2;
    const int i = p / side, j = p % side;
    if (shape.dilation_w == 1 && (j == 0 || j > m)) return;
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t y = tiles.at[t].y + (i - 1) * shape.dilation_h;
      const int64_t x = tiles.at[t].x + (j - 1) * shape.dilation_w;
      if (shape.inside(y, x)) input.parts.prefetch_pixel(tiles.at[t].image, y, x);
    }
  }
};

}  // namespace d3net::cpu::D3NET_ISA
