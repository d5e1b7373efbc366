// A small vector layer on the compiler's vector extensions: one source for AVX-512, AVX2 and
// 128-bit (SSE2, NEON) code. Each instruction set includes it in a namespace of its own
// (D3NET_ISA), so that no two translation units ever share a function compiled for different CPUs.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define D3NET_INLINE __attribute__((always_inline)) inline

namespace d3net::cpu::D3NET_ISA {

constexpr int kVectorBytes = D3NET_VECTOR_BYTES;
constexpr int kVectorRegisters = D3NET_VECTOR_REGISTERS;

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class A>
struct VecTraits;
template <>
struct VecTraits<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t mask __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VecTraits<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t mask __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VecTraits<A>::type;
template <class A>
using Mask = typename VecTraits<A>::mask;
template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

/// f(integral_constant<int, 0>) ... f(integral_constant<int, n - 1>), unrolled for certain:
/// accumulators indexed by these constants stay in registers.
template <int n, class F>
D3NET_INLINE constexpr void unroll(F&& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, n>{});
}

template <class A>
D3NET_INLINE Vec<A> broadcast(A value) {
  return value - Vec<A>{};  // scalar operands are broadcast; x - 0 keeps -0 and NaN
}

/// True in the lanes below n.
template <class A>
D3NET_INLINE Mask<A> first_lanes(int64_t n) {
  using Lane = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  Mask<A> lane;
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = i;
  return lane < static_cast<Lane>(n);
}

// ---- memory: T is the stored type, A the accumulation type -------------------------------------

template <class A>
D3NET_INLINE Vec<A> load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class A>
D3NET_INLINE void store(A* p, Vec<A> v) {
  std::memcpy(p, &v, sizeof v);
}

typedef uint32_t Bits32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));

/// Elements of 16 bits as float, and float rounded to the nearest of them, ties to even.
template <class T>
D3NET_INLINE Vec<float> unpack(Bits16 bits);
template <class T>
D3NET_INLINE Bits16 pack(Vec<float> v);

/// A bfloat16 in the lower half of each lane.
D3NET_INLINE Bits32 to_bfloat16(Vec<float> v) {
  const Bits32 u = reinterpret_cast<Bits32>(v);
  const Bits32 nearest_even = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const Bits32 quiet_nan = (u >> 16) | 0x40;
  return (u & 0x7fffffff) > 0x7f800000 ? quiet_nan : nearest_even;
}

template <>
D3NET_INLINE Vec<float> unpack<bfloat16>(Bits16 bits) {
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(bits, Bits32) << 16);
}
template <>
D3NET_INLINE Bits16 pack<bfloat16>(Vec<float> v) {
  return __builtin_convertvector(to_bfloat16(v), Bits16);
}

#if D3NET_VECTOR_BYTES == 64
template <>
D3NET_INLINE Vec<float> unpack<float16>(Bits16 bits) {
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);
}
template <>
D3NET_INLINE Bits16 pack<float16>(Vec<float> v) {
  return (Bits16)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
#elif D3NET_VECTOR_BYTES == 32
template <>
D3NET_INLINE Vec<float> unpack<float16>(Bits16 bits) {
  return (Vec<float>)_mm256_cvtph_ps((__m128i)bits);
}
template <>
D3NET_INLINE Bits16 pack<float16>(Vec<float> v) {
  return (Bits16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}
#else
// Integer arithmetic only: right on any CPU and with denormals flushed or not.
template <>
D3NET_INLINE Vec<float> unpack<float16>(Bits16 bits) {
  const Bits32 h = __builtin_convertvector(bits, Bits32);
  const Bits32 sign = (h & 0x8000) << 16, magnitude = h & 0x7fff;
  const Bits32 normal = (magnitude << 13) + (112u << 23);
  const Bits32 inf_nan = (magnitude << 13) | 0x7f800000;
  // A subnormal is magnitude * 2^-24: let the integer conversion normalise it.
  typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
  const Vec<float> small =
      __builtin_convertvector(reinterpret_cast<Ints>(magnitude), Vec<float>) * 0x1p-24f;
  const Bits32 finite = magnitude < 0x400 ? reinterpret_cast<Bits32>(small) : normal;
  return reinterpret_cast<Vec<float>>((magnitude >= 0x7c00 ? inf_nan : finite) | sign);
}
D3NET_INLINE uint16_t to_half(uint32_t u) {
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000);
  const uint32_t magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00 | ((magnitude >> 13) & 0x3ff);
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to at least 65520: infinity
  if (magnitude < 0x33000001) return sign;            // at most half the smallest subnormal
  const int exponent = static_cast<int>(magnitude >> 23);
  const int shift = exponent < 113 ? 126 - exponent : 13;  // bits dropped from the significand
  const uint32_t significand =
      exponent < 113 ? (magnitude & 0x7fffff) | 0x800000 : magnitude - (112u << 23);
  const uint32_t odd = (significand >> shift) & 1;
  return sign | static_cast<uint16_t>((significand + (1u << (shift - 1)) - 1 + odd) >> shift);
}
template <>
D3NET_INLINE Bits16 pack<float16>(Vec<float> v) {
  const Bits32 u = reinterpret_cast<Bits32>(v);
  Bits16 bits;
  for (int i = 0; i < kLanes<float>; ++i) bits[i] = to_half(u[i]);
  return bits;
}
#endif

template <class A, class T, class = std::enable_if_t<sizeof(T) == 2>>
D3NET_INLINE Vec<float> load(const T* p) {
  Bits16 bits;
  std::memcpy(&bits, p, sizeof bits);
  return unpack<T>(bits);
}
template <class A, class T, class = std::enable_if_t<sizeof(T) == 2>>
D3NET_INLINE void store(T* p, Vec<float> v) {
  const Bits16 bits = pack<T>(v);
  std::memcpy(p, &bits, sizeof bits);
}

/// Lanes first <= l < last from memory, zeros elsewhere; touches only those elements.
template <class A, class T>
D3NET_INLINE Vec<A> load_lanes(const T* p, int64_t first, int64_t last) {
#if D3NET_VECTOR_BYTES == 64
  const auto mask = static_cast<__mmask16>((1u << last) - (1u << first));
  if constexpr (std::is_same_v<T, float>) return (Vec<A>)_mm512_maskz_loadu_ps(mask, p);
  if constexpr (std::is_same_v<T, double>)
    return (Vec<A>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p);
  if constexpr (sizeof(T) == 2) return unpack<T>((Bits16)_mm256_maskz_loadu_epi16(mask, p));
#endif
  T buffer[kLanes<A>] = {};
  for (int64_t i = first; i < last; ++i) buffer[i] = p[i];
  return load<A>(buffer);
}
template <class A, class T>
D3NET_INLINE void store_lanes(T* p, Vec<A> v, int64_t first, int64_t last) {
#if D3NET_VECTOR_BYTES == 64
  const auto mask = static_cast<__mmask16>((1u << last) - (1u << first));
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(p, mask, (__m512)v);
  if constexpr (std::is_same_v<T, double>)
    return _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), (__m512d)v);
  if constexpr (sizeof(T) == 2) return _mm256_mask_storeu_epi16(p, mask, (__m256i)pack<T>(v));
#endif
  T buffer[kLanes<A>];
  store<A>(buffer, v);
  for (int64_t i = first; i < last; ++i) p[i] = buffer[i];
}

/// The first n lanes from memory, zeros above; touches nothing beyond n elements.
template <class A, class T>
D3NET_INLINE Vec<A> load_first(const T* p, int64_t n) {
#if D3NET_VECTOR_BYTES == 32
  const Mask<A> lanes = first_lanes<A>(n);
  if constexpr (std::is_same_v<T, float>) return (Vec<A>)_mm256_maskload_ps(p, (__m256i)lanes);
  if constexpr (std::is_same_v<T, double>) return (Vec<A>)_mm256_maskload_pd(p, (__m256i)lanes);
#endif
  return load_lanes<A>(p, 0, n < kLanes<A> ? n : kLanes<A>);
}
template <class A, class T>
D3NET_INLINE void store_first(T* p, Vec<A> v, int64_t n) {
#if D3NET_VECTOR_BYTES == 32
  const Mask<A> lanes = first_lanes<A>(n);
  if constexpr (std::is_same_v<T, float>) return _mm256_maskstore_ps(p, (__m256i)lanes, (__m256)v);
  if constexpr (std::is_same_v<T, double>)
    return _mm256_maskstore_pd(p, (__m256i)lanes, (__m256d)v);
#endif
  store_lanes<A>(p, v, 0, n < kLanes<A> ? n : kLanes<A>);
}

// ---- pairs: two bfloat16 in each lane, the first in its lower half ------------------------------

/// Whether code for this instruction set may multiply pairs; has_pair_products() says whether the
/// CPU at hand does.
constexpr bool kPairs = D3NET_VECTOR_BYTES == 64;

#if D3NET_VECTOR_BYTES == 64
inline bool has_pair_products() { return __builtin_cpu_supports("avx512bf16"); }

/// sum + a.first * b.first + a.second * b.second; in assembler, since the surrounding code is for
/// CPUs that may lack the instruction.
D3NET_INLINE Vec<float> add_pair_products(Vec<float> sum, Vec<float> a, Vec<float> b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
D3NET_INLINE Vec<float> broadcast_pair(const float* p) {
  int32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return (Vec<float>)_mm512_set1_epi32(bits);
}
/// Neighbours in memory: those of `low` in the lower lanes.
D3NET_INLINE Vec<float> round_neighbours(Vec<float> low, Vec<float> high) {
  Vec<float> pairs;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(pairs) : "v"(low), "v"(high));
  return pairs;
}
D3NET_INLINE Vec<float> round_to_pairs(Vec<float> first, Vec<float> second) {
  return reinterpret_cast<Vec<float>>(to_bfloat16(first) | to_bfloat16(second) << 16);
}
#else
inline bool has_pair_products() { return false; }
#endif

template <class A, class T>
D3NET_INLINE A load_one(const T* p) {
  if constexpr (std::is_same_v<T, A>) return *p;
  return load_first<A>(p, 1)[0];
}
template <class A, class T>
D3NET_INLINE void store_one(T* p, A value) {
  store_first<A>(p, broadcast(value), 1);
}

// ---- arithmetic ---------------------------------------------------------------------------------

/// a * b + c, which GCC and Clang contract to one instruction where the target has it.
template <class V>
D3NET_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}

/// The larger of a bound, which is a number, and v; NaN passes: the instructions return their
/// second operand next to NaN (maskz, since GCC 12 warns falsely).
template <class A>
D3NET_INLINE Vec<A> at_least(Vec<A> bound, Vec<A> v) {
#if D3NET_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<A, float>)
    return (Vec<A>)_mm512_maskz_max_ps(0xffff, (__m512)bound, (__m512)v);
  else
    return (Vec<A>)_mm512_maskz_max_pd(0xff, (__m512d)bound, (__m512d)v);
#elif D3NET_VECTOR_BYTES == 32
  if constexpr (std::is_same_v<A, float>)
    return (Vec<A>)_mm256_max_ps((__m256)bound, (__m256)v);
  else
    return (Vec<A>)_mm256_max_pd((__m256d)bound, (__m256d)v);
#else
  return v < bound ? bound : v;
#endif
}

/// NaN passes, as in torch.relu.
template <class V>
D3NET_INLINE V relu(V v) {
  return v <= 0 ? V{} : v;
}

/// Lane l of the result is lane Index::of(l) of the 2 * lanes values (a, b).
template <class Index, class V>
D3NET_INLINE V shuffle(V a, V b) {
  return [&]<int... l>(std::integer_sequence<int, l...>) __attribute__((always_inline)) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, Index::of(l)...);
#else
    return __builtin_shuffle(a, b, decltype(a < b){Index::of(l)...});
#endif
  }(std::make_integer_sequence<int, sizeof(V) / sizeof(a[0])>{});
}

template <int distance>
struct Swap {
  static constexpr int of(int lane) { return lane ^ distance; }
};

/// Lanes 0, 2, ... of (a, b), or 1, 3, ...
template <int first>
struct EverySecond {
  static constexpr int of(int lane) { return 2 * lane + first; }
};
/// Lanes of a and b in turns, from their first lanes or from those of their upper halves on.
template <int lanes, bool upper>
struct InTurns {
  static constexpr int of(int lane) {
    return lane / 2 + (lane % 2 ? lanes : 0) + (upper ? lanes / 2 : 0);
  }
};

/// Vectors of `count` (a power of 2) values in turns become one vector of each value ...
template <int count, class V>
D3NET_INLINE void take_apart(V (&r)[count]) {
  for (int done = 1; done < count; done *= 2) {
    V next[count];
    unroll<count / 2>([&](auto i) __attribute__((always_inline)) {
      next[i] = shuffle<EverySecond<0>>(r[2 * i], r[2 * i + 1]);
      next[i + count / 2] = shuffle<EverySecond<1>>(r[2 * i], r[2 * i + 1]);
    });
    unroll<count>([&](auto i) __attribute__((always_inline)) { r[i] = next[i]; });
  }
}
/// ... and back.
template <int count, class V>
D3NET_INLINE void put_in_turns(V (&r)[count]) {
  constexpr int lanes = sizeof(V) / sizeof(r[0][0]);
  for (int done = 1; done < count; done *= 2) {
    V next[count];
    unroll<count / 2>([&](auto i) __attribute__((always_inline)) {
      next[2 * i] = shuffle<InTurns<lanes, false>>(r[i], r[i + count / 2]);
      next[2 * i + 1] = shuffle<InTurns<lanes, true>>(r[i], r[i + count / 2]);
    });
    unroll<count>([&](auto i) __attribute__((always_inline)) { r[i] = next[i]; });
  }
}

/// Sum of all lanes, by halves.
template <class A>
D3NET_INLINE A sum_lanes(Vec<A> v) {
  constexpr int n = kLanes<A>;
  if constexpr (n >= 16) v += shuffle<Swap<8>>(v, v);
  if constexpr (n >= 8) v += shuffle<Swap<4>>(v, v);
  if constexpr (n >= 4) v += shuffle<Swap<2>>(v, v);
  return v[0] + v[1];
}

/// Lanes with bit `distance` clear (upper = false) or set from a, then from b.
template <int lanes, int distance, bool upper>
struct Half {
  static constexpr int of(int lane) {
    const int from = lane & distance ? lanes : 0;
    return from + (lane & ~distance) + (upper ? distance : 0);
  }
};

/// Lane i of the result is the sum of all lanes of r[i].
template <class A>
D3NET_INLINE Vec<A> sum_lanes_of_each(Vec<A> (&r)[kLanes<A>]) {
  constexpr int n = kLanes<A>;
  constexpr int steps = n == 16 ? 4 : n == 8 ? 3 : n == 4 ? 2 : 1;
  unroll<steps>([&](auto step) __attribute__((always_inline)) {
    constexpr int s = 1 << step;
    unroll<n / 2 / s>([&](auto i) __attribute__((always_inline)) {
      const Vec<A> a = r[2 * i * s], b = r[(2 * i + 1) * s];
      r[2 * i * s] = shuffle<Half<n, s, false>>(a, b) + shuffle<Half<n, s, true>>(a, b);
    });
  });
  return r[0];
}

/// The two rows of a 2x2 transpose whose elements are runs of `run` lanes.
template <int lanes, int run>
struct UpperRow {
  static constexpr int of(int lane) { return lane & run ? lanes + lane - run : lane; }
};
template <int lanes, int run>
struct LowerRow {
  static constexpr int of(int lane) { return lane & run ? lanes + lane : lane + run; }
};

/// In-register transpose of a kLanes x kLanes block, by 2x2 blocks of growing size.
template <class A>
D3NET_INLINE void transpose(Vec<A> (&r)[kLanes<A>]) {
  constexpr int n = kLanes<A>;
  constexpr int steps = n == 16 ? 4 : n == 8 ? 3 : n == 4 ? 2 : 1;
  unroll<steps>([&](auto step) __attribute__((always_inline)) {
    constexpr int s = 1 << step;
    unroll<n / 2>([&](auto pair) __attribute__((always_inline)) {
      constexpr int i = (pair / s) * 2 * s + pair % s;
      const Vec<A> a = r[i], b = r[i + s];
      r[i] = shuffle<UpperRow<n, s>>(a, b);
      r[i + s] = shuffle<LowerRow<n, s>>(a, b);
    });
  });
}

}  // namespace d3net::cpu::D3NET_ISA
