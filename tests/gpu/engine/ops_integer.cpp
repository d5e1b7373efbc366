// Integer, bit and move instructions. Names: opcode, modifiers that change the result, type.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "lanes.h"
#include "operations.h"

namespace gpu {

namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;

/// Wrapping arithmetic without signed overflow; 16-bit operands do not promote to int either.
template <class T>
constexpr auto wrap(T x) {
  using Wide = std::conditional_t<(sizeof(T) < 4), uint32_t, Unsigned<T>>;
  return static_cast<Wide>(x);
}

template <class T>
struct Twice;
template <>
struct Twice<int16_t> {
  using type = int32_t;
};
template <>
struct Twice<uint16_t> {
  using type = uint32_t;
};
template <>
struct Twice<int32_t> {
  using type = int64_t;
};
template <>
struct Twice<uint32_t> {
  using type = uint64_t;
};
template <>
struct Twice<int64_t> {
  using type = __int128;
};
template <>
struct Twice<uint64_t> {
  using type = unsigned __int128;
};

template <class T>
T high_half(T a, T b) {
  using Wide = typename Twice<T>::type;
  return static_cast<T>((static_cast<Wide>(a) * static_cast<Wide>(b)) >> (8 * sizeof(T)));
}

template <class T>
T quotient(T a, T b) {
  if (b == 0) return static_cast<T>(-1);  // what the hardware gives, and no trap here
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return static_cast<T>(-wrap(a));
  return a / b;
}

template <class T>
T remainder_of(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return 0;
  return a % b;
}

template <class T>
void arithmetic(const std::string& t) {
  binary<T, T, T>("add." + t, [](T a, T b) { return wrap(a) + wrap(b); });
  binary<T, T, T>("sub." + t, [](T a, T b) { return wrap(a) - wrap(b); });
  binary<T, T, T>("mul.lo." + t, [](T a, T b) { return wrap(a) * wrap(b); });
  binary<T, T, T>("mul.hi." + t, [](T a, T b) { return high_half(a, b); });
  ternary<T, T, T, T>("mad.lo." + t, [](T a, T b, T c) { return wrap(a) * wrap(b) + wrap(c); });
  ternary<T, T, T, T>("mad.hi." + t, [](T a, T b, T c) { return wrap(high_half(a, b)) + wrap(c); });
  binary<T, T, T>("div." + t, [](T a, T b) { return quotient(a, b); });
  binary<T, T, T>("rem." + t, [](T a, T b) { return remainder_of(a, b); });
  binary<T, T, T>("min." + t, [](T a, T b) { return std::min(a, b); });
  binary<T, T, T>("max." + t, [](T a, T b) { return std::max(a, b); });
  binary<T, T, uint32_t>("shr." + t, [](T a, uint32_t n) {
    constexpr uint32_t last = 8 * sizeof(T) - 1;
    if (n > last) return static_cast<T>(a < T{} ? -1 : 0);
    return static_cast<T>(a >> n);
  });
  comparison<T>("setp.eq." + t, [](T a, T b) { return a == b; });
  comparison<T>("setp.ne." + t, [](T a, T b) { return a != b; });
  comparison<T>("setp.lt." + t, [](T a, T b) { return a < b; });
  comparison<T>("setp.le." + t, [](T a, T b) { return a <= b; });
  comparison<T>("setp.gt." + t, [](T a, T b) { return a > b; });
  comparison<T>("setp.ge." + t, [](T a, T b) { return a >= b; });
  if constexpr (std::is_signed_v<T>) {
    unary<T, T>("neg." + t, [](T a) { return -wrap(a); });
    unary<T, T>("abs." + t, [](T a) { return a < 0 ? -wrap(a) : wrap(a); });
  }
  if constexpr (sizeof(T) < 8) {
    using Wide = typename Twice<T>::type;
    binary<Wide, T, T>("mul.wide." + t, [](T a, T b) { return wrap<Wide>(a) * wrap<Wide>(b); });
    ternary<Wide, T, T, Wide>(
        "mad.wide." + t, [](T a, T b, Wide c) { return wrap<Wide>(a) * wrap<Wide>(b) + wrap(c); });
  }
}

template <class T>
void bitwise(const std::string& t) {
  binary<T, T, T>("and." + t, [](T a, T b) { return a & b; });
  binary<T, T, T>("or." + t, [](T a, T b) { return a | b; });
  binary<T, T, T>("xor." + t, [](T a, T b) { return a ^ b; });
  unary<T, T>("not." + t, [](T a) { return ~a; });
  binary<T, T, uint32_t>("shl." + t, [](T a, uint32_t n) {
    return n >= 8 * sizeof(T) ? T{} : static_cast<T>(a << n);
  });
  unary<T, T>("mov." + t, [](T a) { return a; });
}

/// selp: operands d, a, b, predicate.
template <class T>
void select(const std::string& t) {
  register_operation("selp." + t, [](Warp& w, const Instruction& in, uint32_t mask) {
    const uint32_t p = w.predicate(in.operands[3]);
    T* d = w.reg<T>(in.operands[0]);
    const T *a = w.reg<T>(in.operands[1]), *b = w.reg<T>(in.operands[2]);
    for (int l = 0; l < lanes; ++l)
      if (mask >> l & 1) d[l] = p >> l & 1 ? a[l] : b[l];
  });
}

template <class T>
T extract(T a, uint32_t position, uint32_t length) {
  constexpr uint32_t width = 8 * sizeof(T);
  position &= 255;
  length &= 255;
  if (length == 0) return 0;
  using U = Unsigned<T>;
  U value = position >= width ? U{} : static_cast<U>(static_cast<U>(a) >> position);
  if (length < width) value &= (U{1} << length) - 1;
  if constexpr (std::is_signed_v<T>) {
    const uint32_t sign_at = std::min(position + length - 1, width - 1);
    const bool sign = static_cast<U>(a) >> sign_at & 1;
    const uint32_t known = position >= width ? 0 : std::min(length, width - position);
    if (sign && known < width) value |= ~U{0} << known;
  }
  return static_cast<T>(value);
}

template <class T>
T insert(T a, T b, uint32_t position, uint32_t length) {
  constexpr uint32_t width = 8 * sizeof(T);
  position &= 255;
  length &= 255;
  if (position >= width || length == 0) return b;
  const T ones = length >= width ? ~T{0} : (T{1} << length) - 1;
  const T field = ones << position;
  return (b & ~field) | (a << position & field);
}

template <class T>
void bit_field_insert(const char* name) {
  register_operation(name, [](Warp& w, const Instruction& in, uint32_t mask) {
    const uint32_t* position = w.reg<uint32_t>(in.operands[3]);
    const uint32_t* length = w.reg<uint32_t>(in.operands[4]);
    T* d = w.reg<T>(in.operands[0]);
    const T *a = w.reg<T>(in.operands[1]), *b = w.reg<T>(in.operands[2]);
    for (int l = 0; l < lanes; ++l)
      if (mask >> l & 1) d[l] = insert(a[l], b[l], position[l], length[l]);
  });
}

uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t choice = selector >> (4 * i) & 15;
    uint32_t byte = both >> (8 * (choice & 7)) & 255;
    if (choice & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}

void lop3(Warp& w, const Instruction& in, uint32_t mask) {
  const auto table = static_cast<uint32_t>(in.constants[0]);
  map3<uint32_t, uint32_t, uint32_t, uint32_t>(
      w, in, mask, [table](uint32_t a, uint32_t b, uint32_t c) {
        uint32_t result = 0;
        for (uint32_t i = 0; i < 8; ++i)
          if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
        return result;
      });
}

/// mov of a vector to one register: operands d, parts from the lowest on; and the other way round,
/// where a part that nobody wants has the place of `d` itself.
template <class Whole, class Part>
void pack(const std::string& name) {
  register_operation("pack." + name, [](Warp& w, const Instruction& in, uint32_t mask) {
    Whole* d = w.reg<Whole>(in.operands[0]);
    for (int l = 0; l < lanes; ++l) {
      if (!(mask >> l & 1)) continue;
      Whole value = 0;
      for (size_t i = 1; i < in.operands.size(); ++i)
        value |= static_cast<Whole>(w.reg<Part>(in.operands[i])[l]) << (8 * sizeof(Part) * (i - 1));
      d[l] = value;
    }
  });
  register_operation("unpack." + name, [](Warp& w, const Instruction& in, uint32_t mask) {
    const uint32_t from = in.operands.back();
    for (int l = 0; l < lanes; ++l) {
      if (!(mask >> l & 1)) continue;
      const Whole value = w.reg<Whole>(from)[l];
      for (size_t i = 0; i + 1 < in.operands.size(); ++i)
        if (in.operands[i] != from)
          w.reg<Part>(in.operands[i])[l] = static_cast<Part>(value >> (8 * sizeof(Part) * i));
    }
  });
}

/// Operations on predicates: operands d, a, b; bit i of constants[0] negates operand i + 1.
template <class F>
void on_predicates(const std::string& name, F) {
  register_operation(name, [](Warp& w, const Instruction& in, uint32_t mask) {
    const auto value = [&](size_t i) {
      const uint32_t p = w.predicate(in.operands[std::min(i, in.operands.size() - 1)]);
      return in.constants[0] >> (i - 1) & 1 ? ~p : p;
    };
    w.set_predicate(in.operands[0], mask, F{}(value(1), value(2)));
  });
}

}  // namespace

void register_integer_operations() {
  arithmetic<int16_t>("s16");
  arithmetic<uint16_t>("u16");
  arithmetic<int32_t>("s32");
  arithmetic<uint32_t>("u32");
  arithmetic<int64_t>("s64");
  arithmetic<uint64_t>("u64");
  bitwise<uint16_t>("b16");
  bitwise<uint32_t>("b32");
  bitwise<uint64_t>("b64");
  select<uint16_t>("b16");
  select<uint32_t>("b32");
  select<uint64_t>("b64");
  pack<uint32_t, uint16_t>("b32.b16");
  pack<uint64_t, uint32_t>("b64.b32");
  pack<uint64_t, uint16_t>("b64.b16");

  on_predicates("mov.pred", [](uint32_t a, uint32_t) { return a; });
  on_predicates("not.pred", [](uint32_t a, uint32_t) { return ~a; });
  on_predicates("and.pred", [](uint32_t a, uint32_t b) { return a & b; });
  on_predicates("or.pred", [](uint32_t a, uint32_t b) { return a | b; });
  on_predicates("xor.pred", [](uint32_t a, uint32_t b) { return a ^ b; });

  ternary<uint32_t, uint32_t, uint32_t, uint32_t>(
      "bfe.u32", [](uint32_t a, uint32_t p, uint32_t n) { return extract(a, p, n); });
  ternary<int32_t, int32_t, uint32_t, uint32_t>(
      "bfe.s32", [](int32_t a, uint32_t p, uint32_t n) { return extract(a, p, n); });
  ternary<uint64_t, uint64_t, uint32_t, uint32_t>(
      "bfe.u64", [](uint64_t a, uint32_t p, uint32_t n) { return extract(a, p, n); });
  ternary<int64_t, int64_t, uint32_t, uint32_t>(
      "bfe.s64", [](int64_t a, uint32_t p, uint32_t n) { return extract(a, p, n); });
  bit_field_insert<uint32_t>("bfi.b32");
  bit_field_insert<uint64_t>("bfi.b64");
  ternary<uint32_t, uint32_t, uint32_t, uint32_t>(
      "prmt.b32", [](uint32_t a, uint32_t b, uint32_t s) { return permute(a, b, s); });
  register_operation("lop3.b32", lop3);

  using U = uint32_t;
  ternary<U, U, U, U>("shf.l.wrap.b32", [](U a, U b, U n) {
    return static_cast<U>((uint64_t{b} << 32 | a) << (n & 31) >> 32);
  });
  ternary<U, U, U, U>("shf.r.wrap.b32", [](U a, U b, U n) {
    return static_cast<U>((uint64_t{b} << 32 | a) >> (n & 31));
  });
  ternary<U, U, U, U>("shf.l.clamp.b32", [](U a, U b, U n) {
    return n >= 32 ? a : static_cast<U>((uint64_t{b} << 32 | a) << n >> 32);
  });
  ternary<U, U, U, U>("shf.r.clamp.b32", [](U a, U b, U n) {
    return n >= 32 ? b : static_cast<U>((uint64_t{b} << 32 | a) >> n);
  });
  unary<U, U>("popc.b32", [](U a) { return __builtin_popcount(a); });
  unary<U, uint64_t>("popc.b64", [](uint64_t a) { return __builtin_popcountll(a); });
  unary<U, U>("clz.b32", [](U a) { return a ? __builtin_clz(a) : 32; });
  unary<U, uint64_t>("clz.b64", [](uint64_t a) { return a ? __builtin_clzll(a) : 64; });
  unary<U, U>("brev.b32", [](U a) {
    U r = 0;
    for (int i = 0; i < 32; ++i) r |= (a >> i & 1) << (31 - i);
    return r;
  });
  register_operation("activemask.b32", [](Warp& w, const Instruction& in, uint32_t mask) {
    U* d = w.reg<U>(in.operands[0]);
    for (int l = 0; l < lanes; ++l)
      if (mask >> l & 1) d[l] = mask;
  });
  register_operation("nop", [](Warp&, const Instruction&, uint32_t) {});
  register_operation("trap", [](Warp& w, const Instruction& in, uint32_t mask) {
    w.fail(in, mask, "the kernel traps: an assertion of its own failed");
  });
  register_operation("bra", nullptr, Kind::branch);
  register_operation("brx.idx", nullptr, Kind::branch_indexed);
  register_operation("ret", nullptr, Kind::exit);
}

}  // namespace gpu
