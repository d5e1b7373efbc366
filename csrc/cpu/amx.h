// Products of bfloat16 by the CPU's matrix unit, where it has one (AMX): an instruction multiplies
// 32 input channels of sixteen pixels by the weights of sixteen output channels.
#pragma once

#include "kernels.h"
#include "tile_gemm.h"

namespace d3net::cpu::D3NET_ISA {

constexpr int kAmxRows = 16;  // tiles, and pairs of input channels
constexpr bool kMayAmx = kPairs && kLanes<float> == 16;

/// A direct convolution of neighbouring pixels, in pairs of channels:
///
///   products[pixel][k] = sum over taps and pairs of V[tap][pixel][pair] * U[tap][pair][k]
struct AmxArgs {
  const float* v = nullptr;            // [group of pairs][pixel][lane]
  const int64_t* v_offsets = nullptr;  // of each tap's first pixel; taps may share pixels
  int64_t v_group = 0;
  int64_t num_groups = 0;
  const float* u = nullptr;  // [tap][group][lane][chunk * lanes], zeros where a part has no pair
  int64_t u_position = 0;
  const int* taps = nullptr;  // in U, of those to add up
  int64_t num_taps = 0;
  int64_t tiles = 0;          // from one vector of products to the next
  int64_t count = 0;          // of them wanted; a multiple of 32 is multiplied
  float* products = nullptr;  // [chunk][tiles][lane]
};

#if D3NET_VECTOR_BYTES == 64

template <int t>
D3NET_INLINE void amx_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(t));
}
template <int t>
D3NET_INLINE void amx_load(const float* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(t) : "memory");
}
template <int t>
D3NET_INLINE void amx_store(float* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(t) : "memory");
}
/// sum[tile][k] += over pairs of channels of a[tile][pair] * b[pair][k]
template <int sum, int a, int b>
D3NET_INLINE void amx_add_products() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}

/// The unit's registers as eight squares of 16 x 64 bytes, for the length of a product. They are
/// the thread's: another library that believes them set up finds them as it left them.
class AmxRegisters {
  struct alignas(64) Layout {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };
  static_assert(sizeof(Layout) == 64);

 public:
  AmxRegisters() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    Layout squares;
    squares.palette = 1;
    for (int t = 0; t < 8; ++t) squares.bytes[t] = 64, squares.rows[t] = kAmxRows;
    asm volatile("ldtilecfg %0" ::"m"(squares));
  }
  ~AmxRegisters() {
    if (before_.palette)
      asm volatile("ldtilecfg %0" ::"m"(before_) : "memory");
    else
      asm volatile("tilerelease" ::: "memory");
  }

 private:
  Layout before_;
};

/// squares of tiles x vectors of output channels, from `tile` and `k` on.
template <int squares, int vectors>
void amx_multiply_some(const AmxArgs& s, int64_t tile, int64_t k, int64_t chunk) {
  constexpr int sums = squares * vectors, a = sums, b = a + (vectors > 1 ? squares : 1);
  static_assert(b + vectors <= 8);
  constexpr int64_t lanes = kLanes<float>, row = lanes * sizeof(float);
  unroll<sums>([](auto t) __attribute__((always_inline)) { amx_zero<t>(); });
  for (int64_t q = 0; q < s.num_taps; ++q) {
    const float* u = s.u + s.taps[q] * s.u_position + k * lanes;
    const float* v = s.v + s.v_offsets[q] + tile * lanes;
    for (int64_t group = 0; group < s.num_groups; ++group) {
      unroll<vectors>([&](auto j) __attribute__((always_inline)) {
        amx_load<b + j>(u + j * lanes, chunk * row);
      });
      unroll<squares>([&](auto r) __attribute__((always_inline)) {
        constexpr int pixels = vectors > 1 ? a + r : a;
        amx_load<pixels>(v + r * kAmxRows * lanes, row);
        unroll<vectors>([&](auto j) __attribute__((always_inline)) {
          amx_add_products<r * vectors + j, pixels, b + j>();
        });
      });
      v += s.v_group;
      u += kAmxRows * chunk * lanes;
    }
  }
  unroll<squares>([&](auto r) __attribute__((always_inline)) {
    unroll<vectors>([&](auto j) __attribute__((always_inline)) {
      amx_store<r * vectors + j>(s.products + ((k + j) * s.tiles + tile + r * kAmxRows) * lanes,
                                 row);
    });
  });
}

/// For a chunk of vectors of output channels.
inline void amx_multiply(const AmxArgs& s, int chunk) {
  const AmxRegisters registers;
  for (int64_t k = 0; k < chunk; k += 2) {
    const bool two = k + 1 < chunk, wide = !two && s.count > 2 * kAmxRows;
    const int64_t step = (wide ? 4 : 2) * kAmxRows;
    for (int64_t tile = 0; tile < s.count; tile += step) {
      if (two) amx_multiply_some<2, 2>(s, tile, k, chunk);
      if (wide) amx_multiply_some<4, 1>(s, tile, k, chunk);
      if (!two && !wide) amx_multiply_some<2, 1>(s, tile, k, chunk);
    }
  }
}

#else
inline void amx_multiply(const AmxArgs&, int) {}
#endif

/// What the planner asks of the machine.
template <class A>
Machine machine_of() {
  return {kLanes<A>, kVectorRegisters, has_pair_products(), kMayAmx && kernels().amx};
}

}  // namespace d3net::cpu::D3NET_ISA
