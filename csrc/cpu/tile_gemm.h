// The two products of tiled convolutions, with lanes = output channels.
//
//   multiply   products[tile][k] = sum over channels of V[tile][channel] * U[channel][k]
//   outer      U[channel][k]    += sum over tiles    of V[tile][channel] * D[tile][k]
//
// V holds channels in groups of one vector, [group][tile][lane], each part of the input from a new
// group on; results and D hold output channels likewise; U is [channel][k]. All of one position of
// the transformed tiles.
#pragma once

#include <array>

#include "plan.h"
#include "simd.h"

namespace d3net::cpu::D3NET_ISA {

constexpr int kMaxChunk = kVectorRegisters == 32 ? 4 : 3;  // vectors of output channels at a time

/// Tiles of a microkernel: accumulators, a chunk of U and one broadcast fill the register file.
/// Tasks have 12 tiles, or 24, which a chunk of three vectors can cut in eights.
constexpr int tiles_at_once(int chunk, bool by_24) {
  if (kVectorRegisters == 32) return chunk <= 2 ? 12 : chunk == 3 && by_24 ? 8 : 6;
  return chunk == 1 ? 12 : chunk == 2 ? 6 : 4;
}

template <class A>
struct MultiplyArgs {
  const A* v = nullptr;  // [position][group][tiles][lane]
  int64_t v_position = 0;
  const A* u = nullptr;  // [position][channel][chunk * lanes]
  int64_t u_position = 0;
  const int* positions = nullptr;  // those to add up
  int64_t num_positions = 1;
  const int64_t* channels = nullptr;  // of each part; twice as many as rows of U with pairs
  int64_t num_parts = 0;
  int64_t tiles = 0;
  int64_t count = 0;      // of them wanted; some more are multiplied
  A* products = nullptr;  // [chunk][tiles][lane]
};

template <class A, int chunk, int rows, bool pairs>
void multiply(const MultiplyArgs<A>& args) {
  constexpr int lanes = kLanes<A>;
  const MultiplyArgs<A> s = args;
  for (int64_t tile = 0; tile < s.count; tile += rows) {
    Vec<A> acc[rows][chunk] = {};
    for (int64_t q = 0; q < s.num_positions; ++q) {
      const A* u = s.u + s.positions[q] * s.u_position;
      const A* v = s.v + s.positions[q] * s.v_position + tile * lanes;
      for (int64_t part = 0; part < s.num_parts; ++part)
        for (int64_t left = pairs ? ceil_div(s.channels[part], 2) : s.channels[part]; left > 0;
             left -= lanes, v += s.tiles * lanes) {
          const int64_t in_group = std::min<int64_t>(lanes, left);
          for (int64_t c = 0; c < in_group; ++c, u += chunk * lanes) {
            Vec<A> outs[chunk];
            unroll<chunk>([&](auto k)
                              __attribute__((always_inline)) { outs[k] = load(u + k * lanes); });
            unroll<rows>([&](auto r) __attribute__((always_inline)) {
              if constexpr (pairs) {
                const Vec<A> value = broadcast_pair(v + r * lanes + c);
                unroll<chunk>([&](auto k) __attribute__((always_inline)) {
                  acc[r][k] = add_pair_products(acc[r][k], value, outs[k]);
                });
              } else {
                const Vec<A> value = broadcast(v[r * lanes + c]);
                unroll<chunk>([&](auto k) __attribute__((always_inline)) {
                  acc[r][k] = fma(value, outs[k], acc[r][k]);
                });
              }
            });
          }
        }
    }
    unroll<rows>([&](auto r) __attribute__((always_inline)) {
      unroll<chunk>([&](auto k) __attribute__((always_inline)) {
        store(s.products + (k * s.tiles + tile + r) * lanes, acc[r][k]);
      });
    });
  }
}

template <class A>
using Multiply = void (*)(const MultiplyArgs<A>&);

/// kMultiply<A, pairs>[tiles % 24 == 0][chunk - 1]
template <class A, bool pairs>
constexpr auto kMultiply = [] {
  std::array<std::array<Multiply<A>, kMaxChunk>, 2> table{};
  unroll<kMaxChunk>([&](auto chunk) {
    table[0][chunk] = multiply<A, chunk + 1, tiles_at_once(chunk + 1, false), pairs>;
    table[1][chunk] = multiply<A, chunk + 1, tiles_at_once(chunk + 1, true), pairs>;
  });
  return table;
}();

template <class A>
struct OuterArgs {
  const A* v;  // [tiles][lane], at the first channel; the channels share a group
  const A* d;  // [chunk][d_chunk]: [tiles][lane]
  int64_t d_chunk;
  int64_t tiles;
  A* u;  // [channel][k]
  int64_t u_channel;
  bool opens;  // what stands in u is not added
};

/// Channels of a microkernel: a divisor of the lanes.
constexpr int channels_at_once(int chunk, int lanes) {
  const int most = kVectorRegisters == 32 ? (chunk == 1   ? 16
                                             : chunk == 4 ? 4
                                                          : 8)
                   : chunk == 1           ? 8
                                          : 4;
  return most < lanes ? most : lanes;
}

template <class A, int chunk>
void outer(const OuterArgs<A>& args) {
  constexpr int lanes = kLanes<A>, rows = channels_at_once(chunk, lanes);
  const OuterArgs<A> s = args;
  Vec<A> acc[rows][chunk];
  unroll<rows>([&](auto r) __attribute__((always_inline)) {
    unroll<chunk>([&](auto k) __attribute__((always_inline)) {
      acc[r][k] = s.opens ? Vec<A>{} : load(s.u + r * s.u_channel + k * lanes);
    });
  });
  for (int64_t t = 0; t < s.tiles; ++t) {
    Vec<A> outs[chunk];
    unroll<chunk>([&](auto k) __attribute__((always_inline)) {
      outs[k] = load(s.d + k * s.d_chunk + t * lanes);
    });
    unroll<rows>([&](auto r) __attribute__((always_inline)) {
      const Vec<A> value = broadcast(s.v[t * lanes + r]);
      unroll<chunk>([&](auto k) __attribute__((always_inline)) {
        acc[r][k] = fma(value, outs[k], acc[r][k]);
      });
    });
  }
  unroll<rows>([&](auto r) __attribute__((always_inline)) {
    unroll<chunk>([&](auto k) __attribute__((always_inline)) {
      store(s.u + r * s.u_channel + k * lanes, acc[r][k]);
    });
  });
}

template <class A>
using Outer = void (*)(const OuterArgs<A>&);

template <class A>
constexpr auto kOuter = [] {
  std::array<Outer<A>, kMaxChunk> table{};
  unroll<kMaxChunk>([&](auto chunk) { table[chunk] = outer<A, chunk + 1>; });
  return table;
}();

/// How many vectors the next chunk takes when `left` remain: threes, which use the registers best.
inline int next_chunk(int64_t left) {
  if (left <= kMaxChunk) return static_cast<int>(left);
  return left == 4 ? 2 : 3;
}

}  // namespace d3net::cpu::D3NET_ISA
