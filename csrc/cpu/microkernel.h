// The inner loops. Both keep a block of accumulators in registers and read planar rows that
// stage.h has already converted, activated and zero padded; a tap is nothing but a pointer shift.
#pragma once

#include <array>

#include "plan.h"
#include "simd.h"

namespace d3net::cpu::D3NET_ISA {

constexpr Machine machine(int element_bytes) {
  return {kVectorBytes / element_bytes, kVectorRegisters};
}

/// acc[k][pixels] += sum over live taps and channels of w[tap][channel][k] * x[channel][pixels]
template <class A>
struct CorrelateArgs {
  const A* x;  // first live tap, first channel
  int64_t channels, channel_stride;
  int64_t tap_rows, tap_cols;          // live taps
  int64_t tap_row_step, tap_col_step;  // in x
  const A* w;                          // [tap row][tap col][channel][k], at the first live tap
  int64_t w_tap_row_step;
  A* acc;  // [k][pixels]
  int64_t acc_stride;
  bool first;  // start from zero instead of acc
};

template <class A, int kb, int pv>
void correlate(const CorrelateArgs<A>& args) {
  constexpr int lanes = kLanes<A>;
  const CorrelateArgs<A> s = args;
  Vec<A> acc[kb][pv];
  unroll<kb>([&](auto k) __attribute__((always_inline)) {
    unroll<pv>([&](auto p) __attribute__((always_inline)) {
      acc[k][p] = s.first ? Vec<A>{} : load(s.acc + k * s.acc_stride + p * lanes);
    });
  });
  for (int64_t i = 0; i < s.tap_rows; ++i) {
    const A* w = s.w + i * s.w_tap_row_step;
    for (int64_t j = 0; j < s.tap_cols; ++j) {
      const A* x = s.x + i * s.tap_row_step + j * s.tap_col_step;
      for (int64_t c = 0; c < s.channels; ++c) {
        Vec<A> pixels[pv];
        unroll<pv>([&](auto p) __attribute__((always_inline)) { pixels[p] = load(x + p * lanes); });
        unroll<kb>([&](auto k) __attribute__((always_inline)) {
          const Vec<A> weight = broadcast(w[k]);
          unroll<pv>([&](auto p) __attribute__((always_inline)) {
            acc[k][p] = fma(weight, pixels[p], acc[k][p]);
          });
        });
        x += s.channel_stride;
        w += kb;
      }
    }
  }
  unroll<kb>([&](auto k) __attribute__((always_inline)) {
    unroll<pv>([&](auto p) __attribute__((always_inline)) {
      store(s.acc + k * s.acc_stride + p * lanes, acc[k][p]);
    });
  });
}

template <class A>
using Correlate = void (*)(const CorrelateArgs<A>&);

/// kCorrelate<A>[k - 1][vectors - 1]; null where the registers do not suffice.
template <class A>
constexpr auto kCorrelate = [] {
  std::array<std::array<Correlate<A>, kMaxPixelVectors>, kMaxOutBlock> table{};
  unroll<kMaxOutBlock>([&](auto k) {
    unroll<kMaxPixelVectors>([&](auto p) {
      if constexpr (fits(k + 1, p + 1, kVectorRegisters)) table[k][p] = correlate<A, k + 1, p + 1>;
    });
  });
  return table;
}();

/// out[k][tap] += sum over pixels of g[k][pixels] * x[pixels shifted by tap]
template <class A>
struct ReduceArgs {
  const A* g;
  int64_t g_plane, g_row;  // strides
  const A* x;
  int64_t x_row, tap_step;
  int64_t rows, vectors;
  A* out;
  int64_t out_stride;  // between k; taps are adjacent
};

constexpr int kMaxTaps = 3;
constexpr int kMaxReduceBlock = kVectorRegisters == 32 ? 8 : 4;  // kb * 3 + 3 + 1 registers

template <class A, int kb, int taps>
void reduce(const ReduceArgs<A>& args) {
  constexpr int lanes = kLanes<A>;
  const ReduceArgs<A> s = args;
  Vec<A> acc[kb][taps] = {};
  for (int64_t r = 0; r < s.rows; ++r) {
    const A* g = s.g + r * s.g_row;
    const A* x = s.x + r * s.x_row;
    for (int64_t v = 0; v < s.vectors; ++v, g += lanes, x += lanes) {
      Vec<A> shifted[taps];
      unroll<taps>([&](auto t)
                       __attribute__((always_inline)) { shifted[t] = load(x + t * s.tap_step); });
      unroll<kb>([&](auto k) __attribute__((always_inline)) {
        const Vec<A> gradient = load(g + k * s.g_plane);
        unroll<taps>([&](auto t) __attribute__((always_inline)) {
          acc[k][t] = fma(gradient, shifted[t], acc[k][t]);
        });
      });
    }
  }
  unroll<(kb * taps + lanes - 1) / lanes>([&](auto group) __attribute__((always_inline)) {
    constexpr int first = group * lanes;
    constexpr int count = kb * taps - first < lanes ? kb * taps - first : lanes;
    Vec<A> each[lanes] = {};
    unroll<count>([&](auto i) __attribute__((always_inline)) {
      each[i] = acc[(first + i) / taps][(first + i) % taps];
    });
    A sums[lanes];
    store(sums, sum_lanes_of_each<A>(each));
    unroll<count>([&](auto i) __attribute__((always_inline)) {
      s.out[(first + i) / taps * s.out_stride + (first + i) % taps] += sums[i];
    });
  });
}

template <class A>
using Reduce = void (*)(const ReduceArgs<A>&);

/// kReduce<A>[k - 1][taps - 1]
template <class A>
constexpr auto kReduce = [] {
  std::array<std::array<Reduce<A>, kMaxTaps>, kMaxReduceBlock> table{};
  unroll<kMaxReduceBlock>(
      [&](auto k) { unroll<kMaxTaps>([&](auto t) { table[k][t] = reduce<A, k + 1, t + 1>; }); });
  return table;
}();

}  // namespace d3net::cpu::D3NET_ISA
