// What becomes of a pass's outputs: the inverse transform, bias, sums of earlier sources, batch
// statistics, rounding, and behind a data gradient psi's derivative.
#pragma once

#include "tile_input.h"

namespace d3net::cpu::D3NET_ISA {

/// Output channels [begin, end) of a row of channels that may lie in two tensors: channel u is
/// element u of `low` below `cut`, and element u - cut of `high` from there on.
template <class A>
struct Destination {
  Slab<A> low, high;
  int64_t cut = 0, begin = 0, end = 0;
};

/// The part of one vector of output channels that lies in one tensor.
template <class A>
struct Piece {
  Slab<A> slab;  // data: where lane 0 would be
  int64_t first, last;
};

/// Mean and sum of squared distances from it over `count` values, per channel.
struct Moments {
  double mean = 0, squares = 0;

  /// Of two disjoint sets together (Chan, Golub & LeVeque).
  void merge(double count, const Moments& other, double other_count) {
    const double distance = other.mean - mean, total = count + other_count;
    mean += distance * (other_count / total);
    squares += other.squares + distance * distance * (count * other_count / total);
  }
};

/// What a finished layer's first channels are measured for: batch statistics.
/// moments: [run][channels], counts: [run] outputs of a channel.
struct Measure {
  int64_t channels = 0;  // 0: nothing
  Moments* moments = nullptr;
  double* counts = nullptr;
};

/// psi seen from behind: gradients of y = psi(x) become those of x * scale + shift, or of x.
/// sums: [run][channels][2]: over outputs, of the gradient and of the gradient times (x - mean).
template <class X, class A>
struct PsiBehind {
  Parts<X> parts;
  Activation<A> psi;
  const A* mean = nullptr;
  double* sums = nullptr;
  bool to_x = false;
};

/// A pass's first channels, where it completes them and they are kept as X: sums lie elsewhere.
template <class X>
struct Completed {
  Slab<X> slab;
  int64_t channels = 0;
};

/// X: features. A: sums.
template <class X, class A>
class TileOutput {
  static constexpr int kN = kLanes<A>;

 public:
  Destination<A> to;
  const A* bias = nullptr;
  bool accumulate = false;
  Completed<X> completed;  // only where X is not A
  Measure measure;
  PsiBehind<X, A> behind;  // sums null: none

  int64_t lead() const { return to.begin % kN; }
  int64_t vectors() const { return ceil_div(to.end, kN) - first_vector(); }

  /// One vector of output channels of all tiles: the inverse transform, and what happens to
  /// outputs.
  template <int m>
  void write_vector(const PassShape& shape, const Tiles& tiles, int64_t run, int64_t vector,
                    const A* products, int64_t position) const {
    const int64_t channel = vector * kN - lead();  // of lane 0, may be negative
    if (behind.sums) {
      Behind from(*this, shape, channel);
      const Sums sums =
          write_tiles<m>(shape, tiles, products, position, Masked(*this, shape, channel, from));
      for (int64_t l = 0; l < std::min<int64_t>(kN, shape.out_channels - channel); ++l) {
        double* to = behind.sums + 2 * (run * shape.out_channels + channel + l);
        to[0] = static_cast<double>(sums.sum[l]);
        to[1] = static_cast<double>(sums.squares[l]);
      }
      return;
    }
    const bool measured = std::max<int64_t>(0, channel) < measure.channels;
    const auto sums = write_sums<m>(shape, tiles, channel, measured, products, position);
    if (!measured) return;
    if (channel <= 0) measure.counts[run] = static_cast<double>(sums.count);
    const double n = static_cast<double>(sums.count);
    for (int64_t l = std::max<int64_t>(0, -channel);
         l < std::min<int64_t>(kN, measure.channels - channel); ++l) {
      const double s = static_cast<double>(sums.sum[l]);
      const double around_mean = static_cast<double>(sums.squares[l]) - s * s / n;
      measure.moments[run * measure.channels + channel + l] = {
          static_cast<double>(sums.pivot[l]) + s / n, around_mean < 0 ? 0 : around_mean};
    }
  }

  /// To L2, while the products are made: what the outputs of position p are added to.
  template <int m>
  D3NET_INLINE void prefetch_outputs(const PassShape& shape, const Tiles& tiles, int p,
                                     int64_t first, int64_t chunk) const {
    const int i = (p - m) / m, j = (p - m) % m;  // positions m .. m + m * m - 1 each take an output
    if (m > 1 && (p < m || i >= m)) return;
    const int64_t end = (first_vector() + first + chunk) * kN;
    int64_t begin = (first_vector() + first) * kN;
    if (!accumulate) begin = std::max(begin, to.begin + completed.channels);  // never in sums
    for (int64_t t = 0; t < tiles.count; ++t) {
      const Origin& tile = tiles.at[t];
      const int64_t y = tile.y + (m > 1 ? i * shape.dilation_h : 0);
      const int64_t x = tile.x + (m > 1 ? j * shape.dilation_w : 0);
      if (y >= shape.height || x >= shape.width) continue;
      prefetch_channels(to.low, tile.image, y, x, begin, std::min(end, to.cut));
      prefetch_channels(to.high, tile.image, y, x, std::max<int64_t>(0, begin - to.cut),
                        std::min(end, to.end) - to.cut);
      if (behind.sums) behind.parts.prefetch_pixel(tile.image, y, x);
    }
  }

 private:
  int64_t first_vector() const { return to.begin / kN; }

  D3NET_INLINE static void prefetch_channels(const Slab<A>& slab, int64_t image, int64_t y,
                                             int64_t x, int64_t begin, int64_t end) {
    if (begin < end)
      prefetch(slab.at(image, y, x) + begin, (end - begin) * static_cast<int64_t>(sizeof(A)));
  }

  /// Of the vector whose lane 0 is the pass's output channel `lane`.
  int pieces_of(int64_t lane, Piece<A>* pieces) const {
    const int64_t channel = to.begin + lane;
    const int64_t first = std::max<int64_t>(0, to.begin - channel);
    const int64_t last = std::min<int64_t>(kN, to.end - channel);
    const int64_t cut = std::clamp(to.cut - channel, first, last);
    int count = 0;
    auto add = [&](const Slab<A>& slab, int64_t offset, int64_t from, int64_t until) {
      if (from >= until) return;
      pieces[count] = {slab, from, until};
      pieces[count++].slab.data = slab.data + offset;
    };
    add(to.low, channel, first, cut);
    add(to.high, channel - to.cut, cut, last);
    return count;
  }

  /// Over the outputs of a task. Distances from the first output keep float sums accurate.
  struct Sums {
    int64_t count = 0;
    Vec<A> pivot{}, sum{}, squares{};

    D3NET_INLINE void add(Vec<A> v) {
      if (count++ == 0) pivot = v;
      const Vec<A> distance = v - pivot;
      sum += distance;
      squares = fma(distance, distance, squares);
    }
  };

  template <int m>
  Sums write_sums(const PassShape& shape, const Tiles& tiles, int64_t channel, bool measured,
                  const A* products, int64_t position) const {
    if constexpr (!std::is_same_v<X, A>)
      if (channel < completed.channels)
        return write_tiles<m>(shape, tiles, products, position,
                              Rounding(*this, shape, channel, measured));
    Piece<A> pieces[2] = {};
    const int count = pieces_of(channel, pieces);
    if (count == 1 && pieces[0].first == 0 && pieces[0].last == kN)
      return write_tiles<m>(shape, tiles, products, position,
                            Whole(*this, shape, channel, pieces[0], measured));
    return write_tiles<m>(shape, tiles, products, position,
                          InPieces(*this, shape, channel, pieces, count, measured));
  }

  /// Walks over pixels of a tile in one tensor.
  template <class E>
  struct Walk {
    Slab<E> slab;
    int64_t step_y = 0, step_x = 0;
    E* first = nullptr;

    Walk() = default;
    Walk(const Slab<E>& s, const PassShape& shape)
        : slab(s), step_y(shape.dilation_h * s.stride_h), step_x(shape.dilation_w * s.stride_w) {}
    D3NET_INLINE void begin(const Origin& tile) { first = slab.at(tile.image, tile.y, tile.x); }
    D3NET_INLINE E* at(int64_t i, int64_t j) const { return first + i * step_y + j * step_x; }
  };

  Vec<A> bias_of(const PassShape& shape, int64_t channel) const {
    if (!bias) return Vec<A>{};
    return load_lanes<A>(bias + channel, std::max<int64_t>(0, -channel),
                         std::min<int64_t>(kN, shape.out_channels - channel));
  }

  struct Whole {
    Walk<A> to;
    Vec<A> offset;
    bool accumulate;
    bool measured;
    Sums sums;

    Whole(const TileOutput& out, const PassShape& shape, int64_t channel, const Piece<A>& piece,
          bool is_measured)
        : to(piece.slab, shape),
          offset(out.bias_of(shape, channel)),
          accumulate(out.accumulate),
          measured(is_measured) {}
    D3NET_INLINE void begin(const Origin& tile) { to.begin(tile); }
    D3NET_INLINE void put(int64_t i, int64_t j, Vec<A> v) {
      A* p = to.at(i, j);
      v += offset;
      if (accumulate) v += load(p);
      if (measured) sums.add(v);
      store(p, v);
    }
  };

  struct InPieces {
    Walk<A> to[2];
    int64_t first[2], last[2];
    Vec<A> offset;
    bool accumulate;
    bool measured;
    Sums sums;

    InPieces(const TileOutput& out, const PassShape& shape, int64_t channel,
             const Piece<A> (&pieces)[2], int count, bool is_measured)
        : to{{pieces[0].slab, shape}, {pieces[count - 1].slab, shape}},
          first{pieces[0].first, pieces[count - 1].first},
          last{pieces[0].last, count == 1 ? pieces[0].first : pieces[1].last},
          offset(out.bias_of(shape, channel)),
          accumulate(out.accumulate),
          measured(is_measured) {}
    D3NET_INLINE void begin(const Origin& tile) {
      to[0].begin(tile);
      to[1].begin(tile);
    }
    D3NET_INLINE void put(int64_t i, int64_t j, Vec<A> v) {
      A *p = to[0].at(i, j), *q = to[1].at(i, j);
      v += offset;
      if (accumulate) {
        v += load_lanes<A>(p, first[0], last[0]);
        if (first[1] < last[1]) v += load_lanes<A>(q, first[1], last[1]);
      }
      if (measured) sums.add(v);
      store_lanes<A>(p, v, first[0], last[0]);
      if (first[1] < last[1]) store_lanes<A>(q, v, first[1], last[1]);
    }
  };

  /// Lanes below `cut` are complete, those from there on stay sums.
  struct Rounding {
    Walk<A> to;
    Walk<X> kept;
    int64_t first, cut, last;
    Vec<A> offset;
    bool accumulate;
    bool measured;
    bool reads_or_keeps_sums;
    Sums sums;

    Rounding(const TileOutput& out, const PassShape& shape, int64_t channel, bool is_measured)
        : to(out.to.low, shape),
          kept(out.completed.slab, shape),
          first(std::max<int64_t>(0, -channel)),
          cut(std::min<int64_t>(kN, out.completed.channels - channel)),
          last(std::min<int64_t>(kN, shape.out_channels - channel)),
          offset(out.bias_of(shape, channel)),
          accumulate(out.accumulate),
          measured(is_measured),
          reads_or_keeps_sums(accumulate || cut < last) {
      if (reads_or_keeps_sums) to.slab.data += out.to.begin + channel;
      kept.slab.data += channel;
    }
    D3NET_INLINE void begin(const Origin& tile) {
      if (reads_or_keeps_sums) to.begin(tile);
      kept.begin(tile);
    }
    D3NET_INLINE void put(int64_t i, int64_t j, Vec<A> v) {
      v += offset;
      if (accumulate) v += load_lanes<A>(to.at(i, j), first, last);
      if (measured) sums.add(v);
      store_lanes<A>(kept.at(i, j), v, first, cut);
      if (cut < last) store_lanes<A>(to.at(i, j), v, cut, last);
    }
  };

  /// One vector of the channels that psi was applied to, from one part or from several.
  class Behind {
   public:
    Behind(const TileOutput& out, const PassShape& shape, int64_t channel) {
      int64_t before = 0;
      for (size_t i = 0; i < out.behind.parts.x.size(); ++i) {
        const int64_t end = before + out.behind.parts.channels[i];
        const int64_t first = std::max<int64_t>(0, before - channel);
        const int64_t last = std::min<int64_t>(kN, end - channel);
        if (first < last) {
          Slab<const X> x = out.behind.parts.x[i];
          x.data += channel + first - before;
          pieces_[count_++] = {Walk<const X>(x, shape), first, last};
        }
        before = end;
      }
    }
    D3NET_INLINE void begin(const Origin& tile) {
      for (int i = 0; i < count_; ++i) pieces_[i].x.begin(tile);
    }
    /// The part that has all channels of the vector, or null.
    const Walk<const X>* only() const { return count_ == 1 ? &pieces_[0].x : nullptr; }
    Vec<A> at(int64_t i, int64_t j) const {
      A lanes[kN] = {};
      for (int k = 0; k < count_; ++k) {
        const int64_t some = pieces_[k].last - pieces_[k].first;
        store_first<A>(lanes + pieces_[k].first, load_first<A>(pieces_[k].x.at(i, j), some), some);
      }
      return load(lanes);
    }

   private:
    struct Piece {
      Walk<const X> x;
      int64_t first, last;
    };
    Piece pieces_[kN];
    int count_ = 0;
  };

  struct Masked {
    Walk<A> to;
    Walk<const X> x;
    Behind* parts;  // null: x has all channels
    int64_t lanes;
    Vec<A> scale, shift, mean, floor, slope;
    Sums sums;

    Masked(const TileOutput& out, const PassShape& shape, int64_t channel, Behind& from)
        : to(out.to.low, shape),
          parts(from.only() ? nullptr : &from),
          lanes(std::min<int64_t>(kN, shape.out_channels - channel)),
          scale(broadcast(A{1})),
          shift{},
          mean(load_first<A>(out.behind.mean + channel, lanes)),
          floor(broadcast(out.behind.psi.relu ? A{0} : std::numeric_limits<A>::quiet_NaN())) {
      if (out.behind.psi.scale) {
        scale = load_first<A>(out.behind.psi.scale + channel, lanes);
        shift = load_first<A>(out.behind.psi.shift + channel, lanes);
      }
      slope = out.behind.to_x ? scale : broadcast(A{1});
      to.slab.data += channel;
      if (!parts) x = *from.only();
    }
    D3NET_INLINE void begin(const Origin& tile) {
      to.begin(tile);
      if (parts)
        parts->begin(tile);
      else
        x.begin(tile);
    }
    D3NET_INLINE void put(int64_t i, int64_t j, Vec<A> v) {
      const Vec<A> value = parts         ? parts->at(i, j)
                           : lanes == kN ? load<A>(x.at(i, j))
                                         : load_first<A>(x.at(i, j), lanes);
      v = fma(value, scale, shift) <= floor ? Vec<A>{} : v;
      sums.sum += v;
      sums.squares = fma(v, value - mean, sums.squares);
      store_first<A>(to.at(i, j), v * slope, lanes);
    }
  };

  /// The inverse transform of some tiles. The writer is taken by value: its sums stay in registers.
  template <int m, class Writer>
  Sums write_tiles(const PassShape& shape, const Tiles& tiles, const A* products, int64_t position,
                   Writer writer) const {
    for (int64_t t = 0; t < tiles.count; ++t, products += kN) {
      const Origin& tile = tiles.at[t];
      writer.begin(tile);
      if constexpr (m == 1) {
        writer.put(0, 0, load(products));
      } else {
        constexpr int side = Winograd<m>::positions;
        Vec<A> columns[m][side];
        unroll<side>([&](auto j) __attribute__((always_inline)) {
          Vec<A> column[side], result[m];
          unroll<side>([&](auto i) __attribute__((always_inline)) {
            column[i] = load(products + (i * side + j) * position);
          });
          Winograd<m>::output(column, result);
          unroll<m>([&](auto i) __attribute__((always_inline)) { columns[i][j] = result[i]; });
        });
        const bool inside = tile.x + (m - 1) * shape.dilation_w < shape.width;
        for (int64_t i = 0; i < m && tile.y + i * shape.dilation_h < shape.height; ++i) {
          Vec<A> result[m];
          Winograd<m>::output(columns[i], result);
          if (inside)
            unroll<m>([&](auto j) __attribute__((always_inline)) { writer.put(i, j, result[j]); });
          else
            for (int64_t j = 0; tile.x + j * shape.dilation_w < shape.width; ++j)
              writer.put(i, j, result[j]);
        }
      }
    }
    return writer.sums;
  }
};

}  // namespace d3net::cpu::D3NET_ISA
