// Winograd's F(2, 3) along rows: two outputs of a three-tap row from four products instead of six.
//
// With dilation d a row falls into blocks of d columns. Outputs x (in an even block) and x + d (the
// odd block after it) form a pair; they read x - d, x, x + d and x + 2d. Even and odd blocks are
// first taken apart, so that lanes hold neighbouring pairs whatever the dilation:
//
//   v0 = x[-d] - x[d]    v1 = x[0] + x[d]    v2 = x[d] - x[0]    v3 = x[0] - x[2d]
//   m_i = sum over channels and tap rows of u_i * v_i
//   y[0] = m0 + m1 + m2  y[d] = m1 - m2 - m3
//   u0 = w0   u1 = (w0 + w1 + w2) / 2   u2 = (w0 - w1 + w2) / 2   u3 = w2
//
// (Winograd 1980; Lavin & Gray 2016.) Its rounding error is that of the direct sum but for a small
// factor, hence it serves where torch asks for full float32; double stays direct.
#pragma once

#include "plan.h"
#include "simd.h"

namespace d3net::cpu::D3NET_ISA {

template <int lanes, int run>
struct EvenBlocks {
  static constexpr int of(int lane) { return lane / run * 2 * run + lane % run; }
};
template <int lanes, int run>
struct OddBlocks {
  static constexpr int of(int lane) { return EvenBlocks<lanes, run>::of(lane) + run; }
};
/// Puts (even, odd) back in order: the lower or the upper half of the columns.
template <int lanes, int run, int half>
struct Merge {
  static constexpr int of(int lane) {
    const int column = lane + half * lanes, block = column / run;
    return block / 2 * run + column % run + (block % 2 ? lanes : 0);
  }
};

/// f(integral_constant<int, run>) with run = min(dilation, lanes); the dilation is a power of two
/// or a multiple of the lanes.
template <class A, class F>
D3NET_INLINE void for_run(int64_t dilation, F&& f) {
  constexpr int lanes = kLanes<A>;
  if (dilation >= lanes) return f(std::integral_constant<int, lanes>{});
  if constexpr (lanes > 8)
    if (dilation == 8) return f(std::integral_constant<int, 8>{});
  if constexpr (lanes > 4)
    if (dilation == 4) return f(std::integral_constant<int, 4>{});
  if constexpr (lanes > 2)
    if (dilation == 2) return f(std::integral_constant<int, 2>{});
  f(std::integral_constant<int, 1>{});
}

/// Column of the first lane of the tile-th pair vector; its odd half is `dilation` further right
/// where dilation >= lanes, and the two interleave within 2 * lanes columns where it is smaller.
template <int lanes>
D3NET_INLINE int64_t even_column(int64_t pair, int64_t dilation) {
  return dilation <= lanes ? 2 * pair : pair / dilation * 2 * dilation + pair % dilation;
}

/// Rows of columns, row[0 .. 2 * pairs) with `dilation` readable on either side and zero outside
/// the map, to the four v planes. `parts` is scratch for 2 * (pairs + 2 * margin) elements.
template <class A>
void transform_row(const A* row, int64_t pairs, int64_t dilation, A* parts, A* v, int64_t plane) {
  constexpr int lanes = kLanes<A>;
  const int64_t margin = std::max<int64_t>(dilation, lanes);
  A* even = parts + margin;
  A* odd = even + pairs + 2 * margin;
  for_run<A>(dilation, [&](auto run) __attribute__((always_inline)) {
    for (int64_t i = -margin; i < pairs + margin; i += lanes) {
      const A* from = row - 2 * margin + even_column<lanes>(i + margin, dilation);
      if constexpr (run == lanes) {
        store(even + i, load(from));
        store(odd + i, load(from + dilation));
      } else {
        const Vec<A> low = load(from), high = load(from + lanes);
        store(even + i, shuffle<EvenBlocks<lanes, run>>(low, high));
        store(odd + i, shuffle<OddBlocks<lanes, run>>(low, high));
      }
    }
  });
  for (int64_t i = 0; i < pairs; i += lanes) {
    const Vec<A> x0 = load(even + i), x1 = load(odd + i);
    store(v + i, load(odd + i - dilation) - x1);
    store(v + plane + i, x0 + x1);
    store(v + 2 * plane + i, x1 - x0);
    store(v + 3 * plane + i, x0 - load(even + i + dilation));
  }
}

/// The four m planes of pairs first .. first + pairs of a row to its outputs, added to what is
/// there unless `overwrite`.
template <class A>
void inverse_row(const A* m, int64_t plane, int64_t first, int64_t pairs, int64_t dilation,
                 bool overwrite, A* row) {
  constexpr int lanes = kLanes<A>;
  for_run<A>(dilation, [&](auto run) __attribute__((always_inline)) {
    for (int64_t i = 0; i < pairs; i += lanes) {
      const Vec<A> m1 = load(m + plane + i), m2 = load(m + 2 * plane + i);
      Vec<A> low = load(m + i) + m1 + m2, high = m1 - m2 - load(m + 3 * plane + i);
      A* to = row + even_column<lanes>(first + i, dilation);
      const int64_t distance = run == lanes ? dilation : lanes;
      if constexpr (run != lanes) {
        const Vec<A> even = low, odd = high;
        low = shuffle<Merge<lanes, run, 0>>(even, odd);
        high = shuffle<Merge<lanes, run, 1>>(even, odd);
      }
      store(to, overwrite ? low : load(to) + low);
      store(to + distance, overwrite ? high : load(to + distance) + high);
    }
  });
}

/// u_0 .. u_3 of three neighbouring taps.
template <class A>
D3NET_INLINE void transform_weights(A w0, A w1, A w2, A* u, int64_t step) {
  u[0] = w0;
  u[step] = (w0 + w1 + w2) / 2;
  u[2 * step] = (w0 - w1 + w2) / 2;
  u[3 * step] = w2;
}

}  // namespace d3net::cpu::D3NET_ISA
