// What a tile reads: one or several tensors side by side, psi on load, zeros outside the map, and
// the transform into V.
#pragma once

#include <vector>

#include "channel_groups.h"
#include "tile_io.h"
#include "tile_plan.h"
#include "tile_transforms.h"

namespace d3net::cpu::D3NET_ISA {

/// A tensor with adjacent channels.
template <class T>
struct Slab {
  T* data = nullptr;
  int64_t stride_n = 0, stride_h = 0, stride_w = 0;

  T* at(int64_t n, int64_t y, int64_t x) const {
    return data + n * stride_n + y * stride_h + x * stride_w;
  }
};

struct Origin {
  int64_t image, y, x;  // of the first output
};

/// The tiles of a task.
struct Tiles {
  Origin at[kMostTiles];
  int64_t count = 0;

  Tiles() = default;
  /// Neighbours in a row, from `first` on.
  Tiles(const Origin& first, int64_t pixels) : count(pixels) {
    for (int64_t t = 0; t < count; ++t) at[t] = {first.image, first.y, first.x + t};
  }
  Tiles(const TileGrid& grid, int64_t first, int64_t most)
      : count(std::min(most, grid.count() - first)) {
    TileCursor cursor(grid, first);
    for (int64_t t = 0; t < count; ++t, cursor.advance())
      at[t] = {cursor.image, cursor.y, cursor.x};
  }
};

/// Inline for certain, as all its callers up to those with side effects must be: GCC takes
/// functions that only prefetch for pure and drops calls to them.
D3NET_INLINE void prefetch(const void* p, int64_t bytes) {
  const char* line = static_cast<const char*>(p);
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(line + b, 0, 2);
  __builtin_prefetch(line + bytes - 1, 0, 2);
}

/// The channels of one or several tensors, in groups of one vector; each part begins a new group.
template <class T>
struct Parts {
  std::vector<Slab<const T>> x;
  std::vector<int64_t> channels;

  Parts() = default;
  Parts(const Slab<const T>& only, int64_t its_channels) : x{only}, channels{its_channels} {}
  void add(const Slab<const T>& next, int64_t its_channels) {
    x.push_back(next);
    channels.push_back(its_channels);
  }
  int64_t groups(int64_t lanes) const { return count_groups(channels, lanes); }
  /// item(part, its channel, the channel among all, group, how many) for each group.
  template <class F>
  D3NET_INLINE void each_group(int64_t lanes, F&& item) const {
    each_channel_group(
        channels, lanes,
        [&](size_t part, int64_t in_part, int64_t channel, int64_t group, int64_t n)
            __attribute__((always_inline)) { item(x[part], in_part, channel, group, n); });
  }
  /// All channels of a pixel come to L2.
  D3NET_INLINE void prefetch_pixel(int64_t image, int64_t y, int64_t column) const {
    for (size_t i = 0; i < x.size(); ++i)
      prefetch(x[i].at(image, y, column), channels[i] * static_cast<int64_t>(sizeof(T)));
  }
};

template <class In, class A>
struct TileInput {
  static constexpr int kN = kLanes<A>;

  Parts<In> parts;
  bool activated = false;
  Activation<A> psi;

  /// V of some tiles: [position][group of channels][v_tiles][lane], positions v_position apart.
  /// Of direct convolution only the live positions are written. With pairs a lane has two channels.
  template <int m, bool pairs>
  void transform(const PassShape& s, const Tiles& tiles, const int* live, int64_t num_live, A* v,
                 int64_t v_tiles, int64_t v_position) const {
    using Reader = std::conditional_t<pairs, ReadPairs, Read>;
    parts.each_group(pairs ? 2 * kN : kN, [&](const Slab<const In>& x, int64_t in_part,
                                              int64_t channel, int64_t group, int64_t n) {
      const Reader element(*this, channel, n);
      Slab<const In> some = x;
      some.data += in_part;
      A* to = v + group * v_tiles * kN;
      for (int64_t t = 0; t < tiles.count; ++t, to += kN) {
        if (m > 1 && t + kTilesAhead < tiles.count)
          prefetch_tile<m>(s, some, tiles.at[t + kTilesAhead]);
        transform_tile<m>(s, some, tiles.at[t], live, num_live, element, to, v_position);
      }
    });
  }

  /// Pairs of all channels of `count` pixels of a row from column x on, zeros outside the map:
  /// [group][pixel][lane], groups v_group apart.
  void stage_pairs(const PassShape& s, int64_t image, int64_t y, int64_t x, int64_t count, A* v,
                   int64_t v_group) const {
    const bool row = y >= 0 && y < s.height;
    const int64_t first = row ? std::clamp<int64_t>(-x, 0, count) : count;
    const int64_t last = std::clamp(s.width - x, first, count);
    parts.each_group(2 * kN, [&](const Slab<const In>& part, int64_t in_part, int64_t channel,
                                 int64_t group, int64_t n) {
      const ReadPairs element(*this, channel, n);
      A* to = v + group * v_group;
      for (int64_t i = 0; i < first; ++i) store(to + i * kN, Vec<A>{});
      const In* pixel = part.at(image, y, x) + in_part;
      for (int64_t i = first; i < last; ++i) store(to + i * kN, element(pixel + i * part.stride_w));
      for (int64_t i = last; i < count; ++i) store(to + i * kN, Vec<A>{});
    });
  }

 private:
  static constexpr int64_t kTilesAhead = 2;

  /// psi of n channels of a pixel.
  struct Read {
    Vec<A> scale = broadcast(A{1}), shift{}, floor;
    int64_t n;
    bool activated;

    Read(const TileInput& input, int64_t channel, int64_t count)
        : floor(broadcast(input.psi.floor())), n(count), activated(input.activated) {
      if (!input.psi.scale) return;
      scale = load_first<A>(input.psi.scale + channel, n);
      shift = load_first<A>(input.psi.shift + channel, n);
    }
    D3NET_INLINE Vec<A> operator()(const In* p) const {
      const Vec<A> value = n == kN ? load<A>(p) : load_first<A>(p, n);
      return activated ? at_least<A>(floor, fma(value, scale, shift)) : value;
    }
  };

  /// The same, two channels a lane.
  struct ReadPairs {
    Vec<A> scale[2] = {broadcast(A{1}), broadcast(A{1})}, shift[2] = {}, floor;
    int64_t n;
    bool activated;

    ReadPairs(const TileInput& input, int64_t channel, int64_t count)
        : floor(broadcast(input.psi.floor())), n(count), activated(input.activated) {
      if (!input.psi.scale) return;
      for (int i = 0; i < 2; ++i) {
        scale[i] = load_first<A>(input.psi.scale + channel + i * kN, of_half(i));
        shift[i] = load_first<A>(input.psi.shift + channel + i * kN, of_half(i));
      }
    }
    D3NET_INLINE Vec<A> operator()(const In* p) const {
      Vec<A> value[2];
      for (int i = 0; i < 2; ++i)
        value[i] = n == 2 * kN ? load<A>(p + i * kN) : load_first<A>(p + i * kN, of_half(i));
      if (activated)
        for (int i = 0; i < 2; ++i)
          value[i] = at_least<A>(floor, fma(value[i], scale[i], shift[i]));
      return round_neighbours(value[0], value[1]);
    }
    int64_t of_half(int i) const { return std::clamp<int64_t>(n - i * kN, 0, kN); }
  };

  /// To L1, what a tile does not share with its neighbours.
  template <int m>
  D3NET_INLINE static void prefetch_tile(const PassShape& s, const Slab<const In>& x,
                                         const Origin& tile) {
    const In* first = x.at(tile.image, tile.y, tile.x);
    for (int64_t i = 0; i < m && tile.y + i * s.dilation_h < s.height; ++i)
      for (int64_t j = 0; j < m && tile.x + j * s.dilation_w < s.width; ++j)
        __builtin_prefetch(first + i * s.dilation_h * x.stride_h + j * s.dilation_w * x.stride_w);
  }

  template <int m, class F>
  D3NET_INLINE static void transform_tile(const PassShape& s, const Slab<const In>& x,
                                          const Origin& tile, const int* live, int64_t num_live,
                                          const F& element, A* v, int64_t v_position) {
    if constexpr (m == 1) {
      for (int64_t q = 0; q < num_live; ++q) {
        const int64_t y = s.tap_y(tile.y, live[q] / s.kernel_w);
        const int64_t column = s.tap_x(tile.x, live[q] % s.kernel_w);
        store(v + live[q] * v_position,
              s.inside(y, column) ? element(x.at(tile.image, y, column)) : Vec<A>{});
      }
    } else {
      constexpr int side = Winograd<m>::positions;
      const int64_t top = tile.y - s.dilation_h, left = tile.x - s.dilation_w;
      const int64_t step_y = s.dilation_h * x.stride_h, step_x = s.dilation_w * x.stride_w;
      const In* corner = x.at(tile.image, top, left);
      Vec<A> rows[side][side];
      if (top >= 0 && left >= 0 && top + (side - 1) * s.dilation_h < s.height &&
          left + (side - 1) * s.dilation_w < s.width) {
        for (int i = 0; i < side; ++i) {
          Vec<A> row[side];
          unroll<side>([&](auto j) __attribute__((always_inline)) {
            row[j] = element(corner + i * step_y + j * step_x);
          });
          Winograd<m>::input(row, rows[i]);
        }
      } else {
        for (int i = 0; i < side; ++i) {
          Vec<A> row[side];
          for (int j = 0; j < side; ++j)
            row[j] = s.inside(top + i * s.dilation_h, left + j * s.dilation_w)
                         ? element(corner + i * step_y + j * step_x)
                         : Vec<A>{};
          Winograd<m>::input(row, rows[i]);
        }
      }
      unroll<side>([&](auto j) __attribute__((always_inline)) {
        Vec<A> column[side], result[side];
        unroll<side>([&](auto i) __attribute__((always_inline)) { column[i] = rows[i][j]; });
        Winograd<m>::input(column, result);
        unroll<side>([&](auto i) __attribute__((always_inline)) {
          store(v + (i * side + j) * v_position, result[i]);
        });
      });
    }
  }
};

}  // namespace d3net::cpu::D3NET_ISA
