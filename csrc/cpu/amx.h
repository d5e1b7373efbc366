// Products of bfloat16 by the CPU's matrix unit, where it has one (AMX): an instruction multiplies
// 32 input channels of sixteen pixels by the weights of sixteen output channels.
#pragma once

#include "tile_gemm.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
  int64_t tiles = 0;          // a multiple of 32
  float* products = nullptr;  // [chunk][tiles][lane]
};

#if defined(__x86_64__) && defined(__linux__) && D3NET_VECTOR_BYTES == 64

/// The system keeps the unit's registers only for processes that have asked for them.
inline bool ask_for_amx() {
  uint32_t a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr uint32_t kTile = 1u << 24, kBfloat16 = 1u << 22;
  if (!(d & kTile) || !(d & kBfloat16)) return false;
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
inline bool has_amx() {
  static const bool has = ask_for_amx();
  return has;
}

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
/// the thread's, and other libraries set them up before each use.
class AmxRegisters {
 public:
  AmxRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const layout;
    static_assert(sizeof layout == 64);
    asm volatile("ldtilecfg %0" ::"m"(layout));
  }
  ~AmxRegisters() { asm volatile("tilerelease" ::: "memory"); }
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
    const bool two = k + 1 < chunk, wide = !two && s.tiles % (4 * kAmxRows) == 0;
    const int64_t step = (wide ? 4 : 2) * kAmxRows;
    for (int64_t tile = 0; tile < s.tiles; tile += step) {
      if (two) amx_multiply_some<2, 2>(s, tile, k, chunk);
      if (wide) amx_multiply_some<4, 1>(s, tile, k, chunk);
      if (!two && !wide) amx_multiply_some<2, 1>(s, tile, k, chunk);
    }
  }
}

#else
inline bool has_amx() { return false; }
inline void amx_multiply(const AmxArgs&, int) {}
#endif

/// What the planner asks of the machine.
template <class A>
Machine machine_of() {
  return {kLanes<A>, kVectorRegisters, has_pair_products(), has_amx()};
}

}  // namespace d3net::cpu::D3NET_ISA
