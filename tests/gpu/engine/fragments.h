// Which lane holds which element of the operands of mma.sync, and its arithmetic.
//
// From the figures of the PTX ISA, section "Matrix multiply-accumulate operation using mma
// instruction". Both routes, PTX and C++ source, take the layouts from here. With g = lane / 4 and
// t = lane % 4, D (m x 8) = A (m x k) B (k x 8) + C.
#pragma once

#include "numbers.h"

namespace gpu {

enum class MatrixType { bf16, f16, tf32, f64 };

struct Position {
  int row, column;
};

/// Element `half` of register `r` of A, 16-bit elements, two a register.
constexpr Position a16_position(int lane, int r, int half) {
  return {lane / 4 + 8 * (r & 1), 2 * (lane % 4) + half + 8 * (r >> 1)};
}
/// The same of B; row counts k.
constexpr Position b16_position(int lane, int r, int half) {
  return {2 * (lane % 4) + half + 8 * r, lane / 4};
}
/// Register `r` of A with one element a register (tf32, f64 with 16 rows).
constexpr Position a32_position(int lane, int r) {
  return {lane / 4 + 8 * (r & 1), lane % 4 + 4 * (r >> 1)};
}
constexpr Position b32_position(int lane, int r) { return {lane % 4 + 4 * r, lane / 4}; }
/// Accumulator `i`; every type and k.
constexpr Position c_position(int lane, int i) {
  return {lane / 4 + 8 * (i >> 1), 2 * (lane % 4) + (i & 1)};
}

inline float half_of(MatrixType type, uint32_t pair, int half) {
  const auto x = static_cast<uint16_t>(half ? pair >> 16 : pair);
  return type == MatrixType::bf16 ? bf16_to_float(x) : f16_to_float(x);
}

/// One m16n8k<K> product of 32 lanes. Registers come as functions of (lane, register); products are
/// exact and the sum is rounded to float once, where the hardware truncates along the way: take
/// tolerances from theory, never from here.
template <int K, class A, class B, class C, class D>
inline void multiply_16x8(MatrixType type, A a, B b, C c, D d) {
  double left[16][K], right[K][8], sum[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    if (type == MatrixType::tf32) {
      for (int r = 0; r < K / 2; ++r) {
        const auto [row, column] = a32_position(lane, r);
        left[row][column] = tf32_to_float(a(lane, r));
      }
      for (int r = 0; r < K / 4; ++r) {
        const auto [row, column] = b32_position(lane, r);
        right[row][column] = tf32_to_float(b(lane, r));
      }
    } else {
      for (int e = 0; e < K / 2; ++e) {
        const auto [row, column] = a16_position(lane, e / 2, e % 2);
        left[row][column] = half_of(type, a(lane, e / 2), e % 2);
      }
      for (int e = 0; e < K / 4; ++e) {
        const auto [row, column] = b16_position(lane, e / 2, e % 2);
        right[row][column] = half_of(type, b(lane, e / 2), e % 2);
      }
    }
    for (int i = 0; i < 4; ++i) {
      const auto [row, column] = c_position(lane, i);
      sum[row][column] = c(lane, i);
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < K; ++k)
      for (int column = 0; column < 8; ++column)
        sum[row][column] += left[row][k] * right[k][column];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const auto [row, column] = c_position(lane, i);
      d(lane, i, static_cast<float>(sum[row][column]));
    }
}

/// mma.m8n8k4.f64: one element of A and B and two of C a lane.
template <class A, class B, class C, class D>
inline void multiply_8x8_f64(A a, B b, C c, D d) {
  double sum[32][2];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 2; ++i) {
      const int row = lane / 4, column = 2 * (lane % 4) + i;
      sum[lane][i] = c(lane, i);
      for (int k = 0; k < 4; ++k)
        sum[lane][i] = std::fma(a(row * 4 + k), b(column * 4 + k), sum[lane][i]);
    }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 2; ++i) d(lane, i, sum[lane][i]);
}

/// Element pair that lane `lane` receives of an 8x8 matrix of 16-bit elements whose rows are
/// `row(i)` (ldmatrix), transposed or not.
template <class Row>
inline uint32_t matrix_pair(int lane, bool transposed, Row row) {
  const int i = lane / 4, j = 2 * (lane % 4);
  const uint16_t low = transposed ? row(j)[i] : row(i)[j];
  const uint16_t high = transposed ? row(j + 1)[i] : row(i)[j + 1];
  return low | uint32_t{high} << 16;
}

}  // namespace gpu
