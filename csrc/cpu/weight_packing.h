// The weights of a pass, transformed and packed as its products read them.
#pragma once

#include <vector>

#include "channel_groups.h"
#include "tile_gemm.h"
#include "tile_io.h"
#include "tile_plan.h"
#include "tile_transforms.h"

namespace d3net::cpu::D3NET_ISA {

/// X: 16-bit weights, if not wide. A: what they are packed as.
template <class X, class A>
struct WeightPacking {
  const PassShape& shape;
  const PassPlan& plan;
  const std::vector<int64_t>& parts;  // input channels of each
  const Weight& weight;               // k: outputs, c: inputs
  bool wide;                          // of type A, not X
  int64_t lead;                       // lanes of the first vector before output channel 0
  int64_t vectors;                    // of output channels

  /// Numbers in all.
  int64_t size() const {
    int64_t size = 0;
    for (int64_t v = 0; v < vectors; v += chunk_at(v)) size += chunk_size(chunk_at(v));
    return size;
  }
  /// The vectors that a share of the tasks begins with.
  int64_t share_begin(int64_t share) const { return vectors * share / plan.shares; }
  /// Vectors of the chunk that begins with vector v; none reaches into the next share.
  int chunk_at(int64_t v) const {
    int64_t share = 1;
    while (share_begin(share) <= v) ++share;
    return next_chunk(share_begin(share) - v);
  }
  int64_t chunk_size(int chunk) const { return shape.positions(plan.algorithm) * position(chunk); }
  /// From one position of the transformed tile to the next: one vector more than needed, so that
  /// they do not fall on one cache set.
  int64_t position(int64_t chunk) const { return rows() * chunk * kN + kN; }

  int64_t items() const { return ceil_div(rows(), kPackedAtOnce); }

  /// Transforms the weights of some input channels.
  void pack(int64_t item, A* packed) const {
    wide ? pack_from<A>(item, packed) : pack_from<X>(item, packed);
  }

  int64_t bytes_of_one() const { return wide ? sizeof(A) : sizeof(X); }
  bool are_bfloat16() const { return std::is_same_v<X, bfloat16> && !wide; }

 private:
  static constexpr int kN = kLanes<A>;
  static constexpr bool kTransforms = std::is_same_v<A, float>;
  static constexpr bool kMayPair = kPairs && std::is_same_v<A, float>;
  static constexpr int64_t kPackedAtOnce = 8;

  /// One a channel, or one a pair; pairs do not reach into the next part, nor do the matrix unit's
  /// groups of them.
  int64_t rows() const {
    if (plan.amx) return count_groups(parts, 2 * kN) * kN;
    return plan.pairs ? count_groups(parts, 2) : shape.in_channels;
  }

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
    const int64_t end = std::min(begin + kPackedAtOnce, rows());
    for (int64_t v = 0; v < vectors;) {
      const int chunk = chunk_at(v);
      each_row<pairs>(begin, end, [&](int64_t row, int64_t channel, int64_t channels) {
        for (int64_t k = 0; k < chunk; ++k) {
          const int64_t out = (v + k) * kN - lead;
          A* u = packed + (row * chunk + k) * kN;
          if constexpr (pairs)
            pack_pair<E>(channel, channels, out, position(chunk), u);
          else
            pack_vector<E, m>(channel, out, position(chunk), u);
        }
      });
      packed += chunk_size(chunk);
      v += chunk;
    }
  }

  /// item(row of U, its first channel, its channels) for the rows from begin to end.
  template <bool pairs, class F>
  void each_row(int64_t begin, int64_t end, F&& item) const {
    if constexpr (!pairs) {
      for (int64_t row = begin; row < end; ++row) item(row, row, 1);
    } else if (plan.amx) {
      each_channel_group(parts, 2 * kN,
                         [&](size_t, int64_t, int64_t channel, int64_t group, int64_t n) {
                           for (int64_t i = 0; i < kN; ++i)
                             if (const int64_t row = group * kN + i; begin <= row && row < end)
                               item(row, channel + 2 * i, std::clamp<int64_t>(n - 2 * i, 0, 2));
                         });
    } else {
      each_channel_group(parts, 2, [&](size_t, int64_t, int64_t channel, int64_t row, int64_t n) {
        if (begin <= row && row < end) item(row, channel, n);
      });
    }
  }

  template <class E>
  void pack_pair(int64_t channel, int64_t channels, int64_t out, int64_t position, A* u) const {
    const int64_t taps = shape.positions(Algorithm::direct);
    Vec<A> pair[2][kMostTaps];
    for (int64_t i = 0; i < 2; ++i) {
      if (i < channels)
        load_taps<E, 1>(channel + i, out, pair[i]);
      else
        std::fill(pair[i], pair[i] + taps, Vec<A>{});
    }
    for (int64_t tap = 0; tap < taps; ++tap)
      store(u + tap * position, round_to_pairs(pair[0][tap], pair[1][tap]));
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
};

}  // namespace d3net::cpu::D3NET_ISA
