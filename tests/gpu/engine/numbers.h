// Number formats of the GPU in portable C++: bfloat16, float16, tf32 and their roundings.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace gpu {

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float bf16_to_float(uint16_t x) { return bits<float>(uint32_t{x} << 16); }

inline uint16_t float_to_bf16(float x) {
  if (std::isnan(x)) return 0x7fff;  // the canonical NaN of PTX
  const auto u = bits<uint32_t>(x);
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

inline uint16_t float_to_bf16_toward_zero(float x) {
  return std::isnan(x) ? 0x7fff : static_cast<uint16_t>(bits<uint32_t>(x) >> 16);
}

inline float f16_to_float(uint16_t x) { return static_cast<float>(bits<_Float16>(x)); }

inline uint16_t float_to_f16(float x) {
  return std::isnan(x) ? 0x7fff : bits<uint16_t>(static_cast<_Float16>(x));
}

inline uint16_t float_to_f16_toward_zero(float x) {
  const uint16_t nearest = float_to_f16(x);
  // Halves of one sign are ordered as integers: step back where rounding went away from zero.
  return std::fabs(f16_to_float(nearest)) > std::fabs(x) ? nearest - 1 : nearest;
}

/// Rounds to float such that a second rounding to a shorter format is as if done at once.
inline float double_to_float_odd(double x) {
  const float nearest = static_cast<float>(x);
  if (std::isnan(x) || std::isinf(nearest) || nearest == x) return nearest;
  auto u = bits<uint32_t>(nearest);
  if (std::fabs(static_cast<double>(nearest)) > std::fabs(x)) --u;
  return bits<float>(u | 1);
}

/// What the tensor cores read of a tf32 operand: the low 13 bits do not count.
inline float tf32_to_float(uint32_t x) { return bits<float>(x & 0xffffe000u); }

/// cvt.rna.tf32: to nearest, ties away from zero.
inline uint32_t float_to_tf32_away(float x) {
  if (std::isnan(x)) return 0x7fffffff;
  const auto u = bits<uint32_t>(x);
  return std::isinf(x) ? u : (u + 0x1000) & 0xffffe000u;
}

/// cvt.rn.tf32: to nearest, ties to even.
inline uint32_t float_to_tf32_even(float x) {
  if (std::isnan(x)) return 0x7fffffff;
  const auto u = bits<uint32_t>(x);
  return std::isinf(x) ? u : (u + 0xfff + (u >> 13 & 1)) & 0xffffe000u;
}

}  // namespace gpu
