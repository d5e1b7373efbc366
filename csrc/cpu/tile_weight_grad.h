// The weight gradient of one source, the exact transpose of tile_pass.h in the weights: the same
// transformed inputs V, times the spread output gradients D, summed over the tiles, gathered back to
// the 3x3 taps.
//
// Tiles are taken a panel at a time: all threads transform the panel, then share its products by
// position and channels, so that each sum has one owner and one order. There are no partial sums.
#pragma once

#include <vector>

#include "parallel.h"
#include "tile_gemm.h"
#include "tile_input.h"

namespace d3net::cpu::D3NET_ISA {

template <class In, class A>
class TileWeightGradient {
  static constexpr int kN = kLanes<A>;

 public:
  PassShape shape;  // that of the forward pass
  Algorithm algorithm = Algorithm::direct;
  TileInput<In, A> input;
  Slab<const A> gradient;  // data: the first output channel
  In* to = nullptr;        // (out_channels, in_channels, kernel_h, kernel_w), dense

  /// Elements of memory that run() needs, shared by the threads.
  int64_t workspace_size() const {
    return v_size() + d_size() + shape.positions(algorithm) * u_position();
  }

  void run(Crew::Worker& worker, A* workspace) const {
    switch (algorithm) {
      case Algorithm::direct: return run_tiles<1>(worker, workspace);
      case Algorithm::winograd2:
        if constexpr (std::is_same_v<A, float>) run_tiles<2>(worker, workspace);
        return;
      case Algorithm::winograd4:
        if constexpr (std::is_same_v<A, float>) run_tiles<4>(worker, workspace);
        return;
    }
  }

 private:
  static constexpr int64_t kPanelBytes = 4 << 20;  // V and D: part of the last-level cache
  static constexpr int64_t kTilesAtOnce = 8;

  int64_t in_groups() const { return ceil_div(shape.in_channels, kN); }
  int64_t out_groups() const { return ceil_div(shape.out_channels, kN); }
  int64_t d_positions() const {
    return algorithm == Algorithm::direct ? 1 : shape.positions(algorithm);
  }
  int64_t panel() const {
    const int64_t tile_bytes =
        (shape.positions(algorithm) * in_groups() + d_positions() * out_groups()) * kN *
        static_cast<int64_t>(sizeof(A));
    const int64_t most = round_up(shape.grid(algorithm).count(), kTilesAtOnce);
    return std::min(most, std::clamp<int64_t>(kPanelBytes / tile_bytes, 32, 512) / kTilesAtOnce *
                              kTilesAtOnce);
  }
  // One vector more, so that positions do not fall on one cache set.
  int64_t v_position() const { return in_groups() * panel() * kN + kN; }
  int64_t d_position() const { return out_groups() * panel() * kN + kN; }
  int64_t v_size() const { return shape.positions(algorithm) * v_position(); }
  int64_t d_size() const { return d_positions() * d_position(); }
  int64_t u_channel() const { return out_groups() * kN; }
  int64_t u_position() const { return in_groups() * kN * u_channel() + kN; }

  template <int m>
  void run_tiles(Crew::Worker& worker, A* v) const {
    const TileGrid grid = shape.grid(algorithm);
    const int64_t tiles = grid.count(), panel = this->panel();
    const int64_t positions = shape.positions(algorithm);
    A* d = v + v_size();
    A* u = d + d_size();
    worker.each(positions, [&](int64_t p, int64_t) {
      std::fill(u + p * u_position(), u + (p + 1) * u_position(), A{0});
    });
    for (int64_t begin = 0; begin < tiles; begin += panel) {
      const int64_t count = std::min(panel, tiles - begin);
      worker.each(ceil_div(count, kTilesAtOnce), [&](int64_t i, int64_t) {
        const int64_t first = i * kTilesAtOnce;
        const Tiles some(grid, begin + first, std::min(kTilesAtOnce, count - first));
        int every[kMostTaps];
        for (int q = 0; q < kMostTaps; ++q) every[q] = q;
        input.template transform<m>(shape, some, every, m == 1 ? positions : 0, v + first * kN,
                                    panel, v_position());
        spread_gradients<m>(some, d + first * kN);
      });
      // Enough items to share, each with a run of channels of one position.
      const int64_t blocks = std::min(in_groups(), ceil_div(kWantedTasks * 2, positions));
      worker.each(positions * blocks, [&](int64_t i, int64_t) {
        const int64_t p = i / blocks, block = i % blocks;
        if (m == 1 && !position_lives(grid, p, begin, count)) return;
        multiply_position(v + p * v_position(), d + (m == 1 ? 0 : p) * d_position(), count,
                          block * in_groups() / blocks, (block + 1) * in_groups() / blocks,
                          u + p * u_position());
      });
    }
    worker.each(shape.in_channels, [&](int64_t c, int64_t) { gather<m>(c, u + c * u_channel()); });
  }

  bool position_lives(const TileGrid& grid, int64_t position, int64_t begin, int64_t count) const {
    TileCursor cursor(grid, begin);
    for (int64_t t = 0; t < count; ++t, cursor.advance())
      if (shape.inside(shape.tap_y(cursor.y, position / shape.kernel_w),
                       shape.tap_x(cursor.x, position % shape.kernel_w)))
        return true;
    return false;
  }

  template <int m>
  void spread_gradients(const Tiles& tiles, A* d) const {
    for (int64_t channel = 0; channel < shape.out_channels; channel += kN, d += panel() * kN) {
      const int64_t n = std::min<int64_t>(kN, shape.out_channels - channel);
      auto element = [&](const Origin& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
        const int64_t y = tile.y + i * shape.dilation_h, x = tile.x + j * shape.dilation_w;
        if (y >= shape.height || x >= shape.width) return Vec<A>{};
        const A* p = gradient.at(tile.image, y, x) + channel;
        return n == kN ? load(p) : load_first<A>(p, n);
      };
      for (int64_t t = 0; t < tiles.count; ++t) {
        A* to_tile = d + t * kN;
        if constexpr (m == 1) {
          store(to_tile, element(tiles.at[t], 0, 0));
        } else {
          constexpr int side = Winograd<m>::positions;
          Vec<A> rows[m][side];
          for (int i = 0; i < m; ++i) {
            Vec<A> row[m];
            unroll<m>([&](auto j)
                          __attribute__((always_inline)) { row[j] = element(tiles.at[t], i, j); });
            Winograd<m>::spread(row, rows[i]);
          }
          unroll<side>([&](auto j) __attribute__((always_inline)) {
            Vec<A> column[m], result[side];
            unroll<m>([&](auto i) __attribute__((always_inline)) { column[i] = rows[i][j]; });
            Winograd<m>::spread(column, result);
            unroll<side>([&](auto i) __attribute__((always_inline)) {
              store(to_tile + (i * side + j) * d_position(), result[i]);
            });
          });
        }
      }
    }
  }

  /// U += V^T D of one position, for some groups of input channels.
  void multiply_position(const A* v, const A* d, int64_t tiles, int64_t first_group,
                         int64_t last_group, A* u) const {
    for (int64_t group = first_group; group < last_group; ++group)
      for (int64_t k = 0; k < out_groups();) {
        const int chunk = next_chunk(out_groups() - k);
        const int64_t rows = channels_at_once(chunk, kN);
        const int64_t last = std::min<int64_t>(kN, shape.in_channels - group * kN);
        for (int64_t r = 0; r < last; r += rows)
          kOuter<A>[chunk - 1]({v + group * panel() * kN + r, d + k * panel() * kN, panel() * kN,
                                tiles, u + (group * kN + r) * u_channel() + k * kN, u_channel()});
        k += chunk;
      }
  }

  /// The taps of one input channel.
  template <int m>
  void gather(int64_t channel, const A* u) const {
    const int64_t taps = shape.kernel_h * shape.kernel_w;
    for (int64_t out = 0; out < shape.out_channels; out += kN) {
      const int64_t n = std::min<int64_t>(kN, shape.out_channels - out);
      auto write = [&](int64_t tap, int64_t l, A value) {
        store_one(to + ((out + l) * shape.in_channels + channel) * taps + tap, value);
      };
      if constexpr (m == 1) {
        for (int64_t tap = 0; tap < taps; ++tap)
          for (int64_t l = 0; l < n; ++l) write(tap, l, u[tap * u_position() + out + l]);
      } else {
        constexpr int side = Winograd<m>::positions;

        WideDoubles rows[side][3];
        for (int i = 0; i < side; ++i) {
          WideDoubles row[side];
          for (int j = 0; j < side; ++j)
            for (int l = 0; l < kN; ++l)
              row[j][l] = static_cast<double>(u[(i * side + j) * u_position() + out + l]);
          Winograd<m>::gather_weight(row, rows[i]);
        }
        for (int j = 0; j < 3; ++j) {
          WideDoubles column[side], result[3];
          for (int i = 0; i < side; ++i) column[i] = rows[i][j];
          Winograd<m>::gather_weight(column, result);
          for (int i = 0; i < 3; ++i)
            for (int64_t l = 0; l < n; ++l) write(i * 3 + j, l, static_cast<A>(result[i][l]));
        }
      }
    }
  }
};

}  // namespace d3net::cpu::D3NET_ISA
