// Winograd's transforms of a tile, one axis at a time.
//
// For m outputs of a 3-tap row: y = A^T [(G w) * (B^T d)] with m + 2 products. F(2,3) uses the
// points 0, 1, -1, infinity; F(4,3) uses 0, +-5/8, +-3/2, infinity, whose rounding errors are a
// fifth of those of the usual 0, +-1, +-2. Weights are transformed in double.
#pragma once

#include "simd.h"

namespace d3net::cpu::D3NET_ISA {

/// As many doubles as a vector has floats.
typedef double WideDoubles __attribute__((vector_size(2 * kVectorBytes)));

// By reference: no ABI has a say in how such vectors are passed.
D3NET_INLINE void widen(Vec<float> v, WideDoubles& to) {
  to = __builtin_convertvector(v, WideDoubles);
}
D3NET_INLINE Vec<float> narrow(const WideDoubles& v) {
  return __builtin_convertvector(v, Vec<float>);
}

template <int outputs>
struct Winograd;

template <>
struct Winograd<2> {
  static constexpr int positions = 4;

  template <class V>
  static D3NET_INLINE void input(const V* d, V* t) {
    t[0] = d[0] - d[2];
    t[1] = d[1] + d[2];
    t[2] = d[2] - d[1];
    t[3] = d[1] - d[3];
  }
  template <class V>
  static D3NET_INLINE void output(const V* m, V* y) {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = (m[1] - m[2]) - m[3];
  }
  /// The transpose of output, for the weight gradient.
  template <class V>
  static D3NET_INLINE void spread(const V* y, V* m) {
    m[0] = y[0];
    m[1] = y[0] + y[1];
    m[2] = y[0] - y[1];
    m[3] = -y[1];
  }
  template <class V>
  static D3NET_INLINE void weight(const V* w, V* u) {
    const V outer = (w[0] + w[2]) / 2, inner = w[1] / 2;
    u[0] = w[0];
    u[1] = outer + inner;
    u[2] = outer - inner;
    u[3] = w[2];
  }
  /// The transpose of weight.
  template <class V>
  static D3NET_INLINE void gather_weight(const V* u, V* w) {
    const V sum = (u[1] + u[2]) / 2;
    w[0] = u[0] + sum;
    w[1] = (u[1] - u[2]) / 2;
    w[2] = sum + u[3];
  }
};

template <>
struct Winograd<4> {
  static constexpr int positions = 6;

  // Exact in float: the points, their squares and cubes.
  static constexpr float a = 0.625f, b = 1.5f;
  static constexpr float a2 = a * a, b2 = b * b, a3 = a2 * a, b3 = b2 * b;
  static constexpr double at_zero = 1.0 / (a2 * b2);
  static constexpr double at_a = 0.5 / (a2 * (a2 - b2)), at_b = 0.5 / (b2 * (b2 - a2));

  template <class V>
  static D3NET_INLINE void input(const V* d, V* t) {
    const V even_a = d[4] - b2 * d[2], odd_a = d[3] - b2 * d[1];
    const V even_b = d[4] - a2 * d[2], odd_b = d[3] - a2 * d[1];
    t[0] = a2 * b2 * d[0] + (d[4] - (a2 + b2) * d[2]);
    t[1] = even_a + a * odd_a;
    t[2] = even_a - a * odd_a;
    t[3] = even_b + b * odd_b;
    t[4] = even_b - b * odd_b;
    t[5] = a2 * b2 * d[1] + (d[5] - (a2 + b2) * d[3]);
  }
  template <class V>
  static D3NET_INLINE void output(const V* m, V* y) {
    const V sum_a = m[1] + m[2], difference_a = m[1] - m[2];
    const V sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    y[0] = m[0] + (sum_a + sum_b);
    y[1] = b * difference_b + a * difference_a;
    y[2] = b2 * sum_b + a2 * sum_a;
    y[3] = b3 * difference_b + (a3 * difference_a + m[5]);
  }
  template <class V>
  static D3NET_INLINE void spread(const V* y, V* m) {
    const V even_a = a2 * y[2] + y[0], odd_a = a3 * y[3] + a * y[1];
    const V even_b = b2 * y[2] + y[0], odd_b = b3 * y[3] + b * y[1];
    m[0] = y[0];
    m[1] = even_a + odd_a;
    m[2] = even_a - odd_a;
    m[3] = even_b + odd_b;
    m[4] = even_b - odd_b;
    m[5] = y[3];
  }
  template <class V>
  static D3NET_INLINE void weight(const V* w, V* u) {
    const V outer_a = at_a * (w[0] + a2 * w[2]), inner_a = (at_a * a) * w[1];
    const V outer_b = at_b * (w[0] + b2 * w[2]), inner_b = (at_b * b) * w[1];
    u[0] = at_zero * w[0];
    u[1] = outer_a + inner_a;
    u[2] = outer_a - inner_a;
    u[3] = outer_b + inner_b;
    u[4] = outer_b - inner_b;
    u[5] = w[2];
  }
  template <class V>
  static D3NET_INLINE void gather_weight(const V* u, V* w) {
    const V sum_a = at_a * (u[1] + u[2]), difference_a = (at_a * a) * (u[1] - u[2]);
    const V sum_b = at_b * (u[3] + u[4]), difference_b = (at_b * b) * (u[3] - u[4]);
    w[0] = at_zero * u[0] + (sum_a + sum_b);
    w[1] = difference_a + difference_b;
    w[2] = a2 * sum_a + (b2 * sum_b + u[5]);
  }
};

}  // namespace d3net::cpu::D3NET_ISA
