// Element-wise operations: one function of scalars, applied to the active lanes of a warp.
#pragma once

#include <string>

#include "machine.h"

namespace gpu {

template <class D, class A, class F>
inline void map1(Warp& w, const Instruction& in, uint32_t mask, F f) {
  D* d = w.reg<D>(in.operands[0]);
  const A* a = w.reg<A>(in.operands[1]);
  if (mask == all_lanes) {
#pragma GCC ivdep
    for (int l = 0; l < lanes; ++l) d[l] = static_cast<D>(f(a[l]));
  } else {
    for (int l = 0; l < lanes; ++l)
      if (mask >> l & 1) d[l] = static_cast<D>(f(a[l]));
  }
}

template <class D, class A, class B, class F>
inline void map2(Warp& w, const Instruction& in, uint32_t mask, F f) {
  D* d = w.reg<D>(in.operands[0]);
  const A* a = w.reg<A>(in.operands[1]);
  const B* b = w.reg<B>(in.operands[2]);
  if (mask == all_lanes) {
#pragma GCC ivdep
    for (int l = 0; l < lanes; ++l) d[l] = static_cast<D>(f(a[l], b[l]));
  } else {
    for (int l = 0; l < lanes; ++l)
      if (mask >> l & 1) d[l] = static_cast<D>(f(a[l], b[l]));
  }
}

template <class D, class A, class B, class C, class F>
inline void map3(Warp& w, const Instruction& in, uint32_t mask, F f) {
  D* d = w.reg<D>(in.operands[0]);
  const A* a = w.reg<A>(in.operands[1]);
  const B* b = w.reg<B>(in.operands[2]);
  const C* c = w.reg<C>(in.operands[3]);
  if (mask == all_lanes) {
#pragma GCC ivdep
    for (int l = 0; l < lanes; ++l) d[l] = static_cast<D>(f(a[l], b[l], c[l]));
  } else {
    for (int l = 0; l < lanes; ++l)
      if (mask >> l & 1) d[l] = static_cast<D>(f(a[l], b[l], c[l]));
  }
}

// A stateless function object becomes a handler: no captures, hence only its type is needed.

template <class D, class A, class F>
void unary(const std::string& name, F) {
  register_operation(name, [](Warp& w, const Instruction& in, uint32_t mask) {
    map1<D, A>(w, in, mask, [](A a) { return F{}(a); });
  });
}

template <class D, class A, class B, class F>
void binary(const std::string& name, F) {
  register_operation(name, [](Warp& w, const Instruction& in, uint32_t mask) {
    map2<D, A, B>(w, in, mask, [](A a, B b) { return F{}(a, b); });
  });
}

template <class D, class A, class B, class C, class F>
void ternary(const std::string& name, F) {
  register_operation(name, [](Warp& w, const Instruction& in, uint32_t mask) {
    map3<D, A, B, C>(w, in, mask, [](A a, B b, C c) { return F{}(a, b, c); });
  });
}

/// setp: two predicates, each combined with a third. operands: p, q or p again, a, b, and a
/// predicate c that is combined by constants[0] (0 none, 1 and, 2 or, 3 xor), negated if
/// constants[1].
inline void set_compared(Warp& w, const Instruction& in, uint32_t mask, uint32_t p, uint32_t q) {
  if (in.constants[0]) {
    uint32_t c = w.predicate(in.operands[4]);
    if (in.constants[1]) c = ~c;
    const auto combine = [&](uint32_t x) {
      return in.constants[0] == 1 ? x & c : in.constants[0] == 2 ? x | c : x ^ c;
    };
    p = combine(p);
    q = combine(q);
  }
  if (in.operands[1] != in.operands[0]) w.set_predicate(in.operands[1], mask, q);
  w.set_predicate(in.operands[0], mask, p);
}

/// q is the opposite of p.
template <class A, class F>
void comparison(const std::string& name, F) {
  register_operation(name, [](Warp& w, const Instruction& in, uint32_t mask) {
    const A* a = w.reg<A>(in.operands[2]);
    const A* b = w.reg<A>(in.operands[3]);
    uint32_t truth = 0;
    for (int l = 0; l < lanes; ++l) truth |= uint32_t(F{}(a[l], b[l])) << l;
    set_compared(w, in, mask, truth, ~truth);
  });
}

/// Of two halves of a register: p is about the low ones, q about the high ones.
template <class F>
void comparison_of_pairs(const std::string& name, F) {
  register_operation(name, [](Warp& w, const Instruction& in, uint32_t mask) {
    const uint32_t* a = w.reg<uint32_t>(in.operands[2]);
    const uint32_t* b = w.reg<uint32_t>(in.operands[3]);
    uint32_t low = 0, high = 0;
    for (int l = 0; l < lanes; ++l) {
      low |= uint32_t(F{}(uint16_t(a[l]), uint16_t(b[l]))) << l;
      high |= uint32_t(F{}(uint16_t(a[l] >> 16), uint16_t(b[l] >> 16))) << l;
    }
    set_compared(w, in, mask, low, high);
  });
}

}  // namespace gpu
