// One source's convolution for all its consumers, on tiles: channels are adjacent in memory and
// lanes are channels, so that a dilation is nothing but a distance between pixels.
//
// A task takes 12 or 24 tiles: psi on load and transform into V, a matrix product for each position
// of the transformed tile, and the inverse transform into the destination.
#pragma once

#include <vector>

#include "amx.h"
#include "parallel.h"
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
struct PsiBackward {
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
  Destination<A> to;
  const A* bias = nullptr;
  bool accumulate = false;
  Completed<X> completed;  // only where X is not A
  Measure measure;
  PsiBackward<X, A> behind;  // sums null: none

  /// Runs of tiles, each with sums of its own.
  int64_t runs() const { return ceil_div(shape.grid(plan.algorithm).count(), plan.tiles); }
  int64_t tasks() const { return runs() * plan.shares; }

  int64_t packed_size() const {
    int64_t size = 0;
    for (int64_t v = 0, chunk; v < vectors(); v += chunk) {
      chunk = next_chunk(vectors() - v);
      size += shape.positions(plan.algorithm) * u_position(chunk);
    }
    return size;
  }
  int64_t pack_items() const { return ceil_div(u_rows(), kPackedAtOnce); }

  int64_t weight_bytes() const { return wide_weights ? sizeof(A) : sizeof(X); }
  bool weights_are_bfloat16() const { return std::is_same_v<X, bfloat16> && !wide_weights; }

  /// Transforms the weights of some input channels.
  void pack(int64_t item, A* packed) const {
    wide_weights ? pack_from<A>(item, packed) : pack_from<X>(item, packed);
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
  static constexpr int64_t kPackedAtOnce = 8;

  int64_t lead() const { return to.begin % kN; }
  int64_t first_vector() const { return to.begin / kN; }
  int64_t vectors() const { return ceil_div(to.end, kN) - first_vector(); }
  /// One vector more than needed, so that positions do not fall on one cache set.
  int64_t u_position(int64_t chunk) const { return u_rows() * chunk * kN + kN; }
  /// One a channel, or one a pair; pairs do not reach into the next part, nor do the matrix unit's
  /// groups of them.
  int64_t u_rows() const {
    if (plan.amx) return input.parts.groups(2 * kN) * kN;
    return plan.pairs ? input.parts.groups(2) : shape.in_channels;
  }

  // ---- weights ---------------------------------------------------------------------------------

  template <class E>
  void pack_from(int64_t item, A* packed) const {
    switch (plan.algorithm) {
      case Algorithm::direct:
        if constexpr (kMayPair)
          if (plan.pairs) return pack_channels<E, 1, true>(item, packed);
        return pack_channels<E, 1>(item, packed);
      case Algorithm::winograd2:
        if constexpr (kTransforms) pack_channels<E, 2>(item, packed);
        return;
      case Algorithm::winograd4:
        if constexpr (kTransforms) pack_channels<E, 4>(item, packed);
        return;
    }
  }

  /// U lies chunk by chunk, [position][row][chunk * lanes] each.
  template <class E, int m, bool pairs = false>
  void pack_channels(int64_t item, A* packed) const {
    const int64_t begin = item * kPackedAtOnce;
    const int64_t end = std::min(begin + kPackedAtOnce, u_rows());
    for (int64_t v = 0; v < vectors();) {
      const int64_t chunk = next_chunk(vectors() - v);
      for (int64_t k = 0; k < chunk; ++k)
        each_row<pairs>(begin, end, [&](int64_t row, int64_t channel, int64_t channels) {
          const int64_t out = (v + k) * kN - lead();
          A* u = packed + (row * chunk + k) * kN;
          if constexpr (pairs)
            pack_pair<E>(channel, channels, out, u_position(chunk), u);
          else
            pack_vector<E, m>(channel, out, u_position(chunk), u);
        });
      packed += shape.positions(plan.algorithm) * u_position(chunk);
      v += chunk;
    }
  }

  /// item(row of U, its first channel, its channels) for the rows from begin to end.
  template <bool pairs, class F>
  void each_row(int64_t begin, int64_t end, F&& item) const {
    if constexpr (!pairs) {
      for (int64_t row = begin; row < end; ++row) item(row, row, 1);
    } else if (plan.amx) {
      input.parts.each_group(2 * kN,
                             [&](const auto&, int64_t, int64_t channel, int64_t group, int64_t n) {
                               for (int64_t i = 0; i < kN; ++i)
                                 if (const int64_t row = group * kN + i; begin <= row && row < end)
                                   item(row, channel + 2 * i, std::clamp<int64_t>(n - 2 * i, 0, 2));
                             });
    } else {
      input.parts.each_group(2, [&](const auto&, int64_t, int64_t channel, int64_t row, int64_t n) {
        if (begin <= row && row < end) item(row, channel, n);
      });
    }
  }

  template <class E>
  void pack_pair(int64_t channel, int64_t channels, int64_t out, int64_t position, A* u) const {
    Vec<A> first[kMostTaps] = {}, second[kMostTaps] = {};
    if (channels >= 1) load_taps<E, 1>(channel, out, first);
    if (channels == 2) load_taps<E, 1>(channel + 1, out, second);
    for (int64_t tap = 0; tap < shape.positions(Algorithm::direct); ++tap)
      store(u + tap * position, round_to_pairs(first[tap], second[tap]));
  }

  /// One input channel's weights to the output channels out, out + 1, ...; zeros beyond the ends.
  template <class E, int m>
  void pack_vector(int64_t channel, int64_t out, int64_t position, A* u) const {
    Vec<A> by_tap[m > 1 ? 9 : kMostTaps];
    load_taps<E, m>(channel, out, by_tap);
    if constexpr (m == 1) {
      const int64_t taps = shape.kernel_h * shape.kernel_w;
      for (int64_t tap = 0; tap < taps; ++tap) store(u + tap * position, by_tap[tap]);
    } else {
      constexpr int side = Winograd<m>::positions;
      WideDoubles rows[3][side];
      for (int i = 0; i < 3; ++i) {
        WideDoubles row[3];
        for (int j = 0; j < 3; ++j) widen(by_tap[3 * i + j], row[j]);
        Winograd<m>::weight(row, rows[i]);
      }
      for (int j = 0; j < side; ++j) {
        const WideDoubles column[3] = {rows[0][j], rows[1][j], rows[2][j]};
        WideDoubles result[side];
        Winograd<m>::weight(column, result);
        for (int i = 0; i < side; ++i) store(u + (i * side + j) * position, narrow(result[i]));
      }
    }
  }

  /// Vectors of output channels, one a tap. Where the taps of a channel follow each other in
  /// memory, in either direction, a run of them is loaded for each output and transposed.
  template <class E, int m>
  D3NET_INLINE void load_taps(int64_t channel, int64_t out, Vec<A>* by_tap) const {
    const int64_t first = std::max<int64_t>(0, -out);
    const int64_t last = std::min<int64_t>(kN, shape.out_channels - out);
    const int64_t width = m > 1 ? 3 : shape.kernel_w, taps = m > 1 ? 9 : shape.kernel_h * width;
    const E* w =
        static_cast<const E*>(weight.data) + channel * weight.stride_c + out * weight.stride_k;
    const int64_t step = weight.stride_w;
    if ((step != 1 && step != -1) || weight.stride_h != step * width) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        A lanes[kN] = {};
        for (int64_t l = first; l < last; ++l)
          lanes[l] = load_one<A>(w + l * weight.stride_k + tap / width * weight.stride_h +
                                 tap % width * weight.stride_w);
        by_tap[tap] = load(lanes);
      }
      return;
    }
    const E* lowest = step > 0 ? w : w - (taps - 1);
    auto run = [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
      Vec<A> block[kN];
      unroll<kN>([&](auto l) __attribute__((always_inline)) {
        block[l] = first <= l && l < last
                       ? load_first<A>(lowest + l * weight.stride_k + begin, count)
                       : Vec<A>{};
      });
      transpose<A>(block);
      unroll<kN>([&](auto t) __attribute__((always_inline)) {
        if (t < count) by_tap[step > 0 ? begin + t : taps - 1 - begin - t] = block[t];
      });
    };
    if constexpr (m > 1)
      unroll<ceil_div(9, kN)>([&](auto i) __attribute__((always_inline)) {
        run(i * kN, std::min<int64_t>(kN, 9 - i * kN));
      });
    else
      for (int64_t begin = 0; begin < taps; begin += kN)
        run(begin, std::min<int64_t>(kN, taps - begin));
  }

  // ---- one task --------------------------------------------------------------------------------

  template <int m, bool pairs = false>
  void run_tiles(int64_t task, int64_t next, const A* packed) const {
    static thread_local Scratch v_memory, product_memory;
    const int64_t run = task / plan.shares, next_run = next < 0 ? -1 : next / plan.shares;
    const int64_t positions = shape.positions(plan.algorithm);
    const TileGrid grid = shape.grid(plan.algorithm);
    const Tiles tiles(grid, run * plan.tiles, plan.tiles);
    const Tiles ahead = next_run <= run ? Tiles() : Tiles(grid, next_run * plan.tiles, plan.tiles);

    const int64_t v_position = input.parts.groups(pairs ? 2 * kN : kN) * plan.tiles * kN + kN;
    A* v = v_memory.get<A>(positions * v_position);
    int live[kMostTaps];
    int64_t num_live = 0;
    if constexpr (m == 1)
      num_live = shape.live_taps_of(box_of(grid, run * plan.tiles, tiles.count), live);
    int64_t v_offsets[kMostTaps];
    AmxArgs amx;
    if (pairs && plan.amx)
      amx = stage_for_amx(tiles, live, num_live, v, v_position, v_offsets);
    else
      input.template transform<m, pairs>(shape, tiles, live, num_live, v, plan.tiles, v_position);

    // The share begins and ends with a chunk.
    const int64_t share = task % plan.shares;
    const int64_t begin = vectors() * share / plan.shares;
    const int64_t end = vectors() * (share + 1) / plan.shares;
    for (int64_t first = 0; first < end;) {
      const int chunk = next_chunk(vectors() - first);
      if (first < begin) {
        packed += positions * u_position(chunk);
        first += chunk;
        continue;
      }
      const bool last_chunk = first + chunk >= end;
      const int64_t product_position = chunk * plan.tiles * kN + kN;
      A* products = product_memory.get<A>((m == 1 ? 1 : positions) * product_position);
      MultiplyArgs<A> args;
      args.v = v, args.v_position = v_position;
      args.u = packed, args.u_position = u_position(chunk);
      args.channels = input.parts.channels.data();
      args.num_parts = static_cast<int64_t>(input.parts.channels.size());
      args.tiles = plan.tiles, args.products = products;
      const auto kernel = kMultiply<A, pairs>[plan.tiles % 24 == 0][chunk - 1];
      if constexpr (m == 1) {
        args.positions = live;
        args.num_positions = num_live;
        prefetch_outputs<m>(tiles, 0, first, chunk);
        if (last_chunk) prefetch_lowest_row(ahead);
        if constexpr (pairs && kMayAmx) {
          if (plan.amx) {
            amx.u = packed, amx.u_position = u_position(chunk), amx.products = products;
            amx_multiply(amx, chunk);
          } else {
            kernel(args);
          }
        } else {
          kernel(args);
        }
      } else {
        for (int p = 0; p < positions; ++p) {
          prefetch_outputs<m>(tiles, p, first, chunk);
          if (last_chunk) prefetch_inputs<m>(ahead, p);
          args.positions = &p;
          args.products = products + p * product_position;
          kernel(args);
        }
      }
      for (int k = 0; k < chunk; ++k)
        write_vector<m>(tiles, run, first + k, products + k * plan.tiles * kN, product_position);
      packed += positions * u_position(chunk);
      first += chunk;
    }
  }

  /// What the matrix unit multiplies of some pixels: where they are neighbours in a row and taps
  /// overlap, each pixel of the rows they read once; else each tap's pixels by themselves.
  AmxArgs stage_for_amx(const Tiles& tiles, const int* live, int64_t num_live, A* v,
                        int64_t v_position, int64_t* v_offsets) const {
    AmxArgs args;
    if constexpr (kMayPair) {
      const int64_t groups = input.parts.groups(2 * kN);
      args = {v, v_offsets, plan.tiles * kN, groups, nullptr, 0, live, num_live, plan.tiles};
      if (tiles.in_a_row() && shape.dilation_w < plan.tiles) {
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

  // ---- outputs ---------------------------------------------------------------------------------

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

  /// One vector of output channels of all tiles: the inverse transform, and what happens to
  /// outputs.
  template <int m>
  void write_vector(const Tiles& tiles, int64_t run, int64_t vector, const A* products,
                    int64_t position) const {
    const int64_t channel = vector * kN - lead();  // of lane 0, may be negative
    if (behind.sums) {
      Behind from(*this, channel);
      const Sums sums = write_tiles<m>(tiles, products, position, Masked(*this, channel, from));
      for (int64_t l = 0; l < std::min<int64_t>(kN, shape.out_channels - channel); ++l) {
        double* to = behind.sums + 2 * (run * shape.out_channels + channel + l);
        to[0] = static_cast<double>(sums.sum[l]);
        to[1] = static_cast<double>(sums.squares[l]);
      }
      return;
    }
    const bool measured = std::max<int64_t>(0, channel) < measure.channels;
    const auto sums = write_sums<m>(tiles, channel, measured, products, position);
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
  Sums write_sums(const Tiles& tiles, int64_t channel, bool measured, const A* products,
                  int64_t position) const {
    if constexpr (!std::is_same_v<X, A>)
      if (channel < completed.channels)
        return write_tiles<m>(tiles, products, position, Rounding(*this, channel, measured));
    Piece<A> pieces[2] = {};
    const int count = pieces_of(channel, pieces);
    if (count == 1 && pieces[0].first == 0 && pieces[0].last == kN)
      return write_tiles<m>(tiles, products, position, Whole(*this, channel, pieces[0], measured));
    return write_tiles<m>(tiles, products, position,
                          InPieces(*this, channel, pieces, count, measured));
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

  Vec<A> bias_of(int64_t channel) const {
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

    Whole(const TilePass& pass, int64_t channel, const Piece<A>& piece, bool is_measured)
        : to(piece.slab, pass.shape),
          offset(pass.bias_of(channel)),
          accumulate(pass.accumulate),
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

    InPieces(const TilePass& pass, int64_t channel, const Piece<A> (&pieces)[2], int count,
             bool is_measured)
        : to{{pieces[0].slab, pass.shape}, {pieces[count - 1].slab, pass.shape}},
          first{pieces[0].first, pieces[count - 1].first},
          last{pieces[0].last, count == 1 ? pieces[0].first : pieces[1].last},
          offset(pass.bias_of(channel)),
          accumulate(pass.accumulate),
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

    Rounding(const TilePass& pass, int64_t channel, bool is_measured)
        : to(pass.to.low, pass.shape),
          kept(pass.completed.slab, pass.shape),
          first(std::max<int64_t>(0, -channel)),
          cut(std::min<int64_t>(kN, pass.completed.channels - channel)),
          last(std::min<int64_t>(kN, pass.shape.out_channels - channel)),
          offset(pass.bias_of(channel)),
          accumulate(pass.accumulate),
          measured(is_measured),
          reads_or_keeps_sums(accumulate || cut < last) {
      if (reads_or_keeps_sums) to.slab.data += pass.to.begin + channel;
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
    Behind(const TilePass& pass, int64_t channel) {
      int64_t before = 0;
      for (size_t i = 0; i < pass.behind.parts.x.size(); ++i) {
        const int64_t end = before + pass.behind.parts.channels[i];
        const int64_t first = std::max<int64_t>(0, before - channel);
        const int64_t last = std::min<int64_t>(kN, end - channel);
        if (first < last) {
          Slab<const X> x = pass.behind.parts.x[i];
          x.data += channel + first - before;
          pieces_[count_++] = {Walk<const X>(x, pass.shape), first, last};
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

    Masked(const TilePass& pass, int64_t channel, Behind& from)
        : to(pass.to.low, pass.shape),
          parts(from.only() ? nullptr : &from),
          lanes(std::min<int64_t>(kN, pass.shape.out_channels - channel)),
          scale(broadcast(A{1})),
          shift{},
          mean(load_first<A>(pass.behind.mean + channel, lanes)),
          floor(broadcast(pass.behind.psi.relu ? A{0} : std::numeric_limits<A>::quiet_NaN())) {
      if (pass.behind.psi.scale) {
        scale = load_first<A>(pass.behind.psi.scale + channel, lanes);
        shift = load_first<A>(pass.behind.psi.shift + channel, lanes);
      }
      slope = pass.behind.to_x ? scale : broadcast(A{1});
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
  Sums write_tiles(const Tiles& tiles, const A* products, int64_t position, Writer writer) const {
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

  // ---- what is needed next comes to L2 while the products are made ------------------------------

  template <int m>
  D3NET_INLINE void prefetch_outputs(const Tiles& tiles, int p, int64_t first,
                                     int64_t chunk) const {
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

  D3NET_INLINE static void prefetch_channels(const Slab<A>& slab, int64_t image, int64_t y,
                                             int64_t x, int64_t begin, int64_t end) {
    if (begin < end)
      prefetch(slab.at(image, y, x) + begin, (end - begin) * static_cast<int64_t>(sizeof(A)));
  }

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
