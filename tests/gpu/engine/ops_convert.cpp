// cvt. Names: "cvt", rounding, "relu" or "sat", destination type, source type.
//
// Registers may be wider than the types: constants[0] and constants[1] are the bytes of the
// destination and the source register.
#include <cmath>
#include <limits>
#include <type_traits>

#include "lanes.h"
#include "numbers.h"
#include "operations.h"

namespace gpu {

namespace {

uint64_t read_register(Warp& w, uint32_t place, int64_t bytes, int lane) {
  if (bytes == 2) return w.reg<uint16_t>(place)[lane];
  if (bytes == 4) return w.reg<uint32_t>(place)[lane];
  return w.reg<uint64_t>(place)[lane];
}

void write_register(Warp& w, uint32_t place, int64_t bytes, int lane, uint64_t value) {
  if (bytes == 2) w.reg<uint16_t>(place)[lane] = static_cast<uint16_t>(value);
  if (bytes == 4) w.reg<uint32_t>(place)[lane] = static_cast<uint32_t>(value);
  if (bytes == 8) w.reg<uint64_t>(place)[lane] = value;
}

template <class T>
T truncated(uint64_t value) {
  T result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

/// Signed values are extended by their sign, others by zeros.
template <class T>
uint64_t extended(T value) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<uint64_t>(value);
  } else {
    uint64_t result = 0;
    std::memcpy(&result, &value, sizeof value);
    return result;
  }
}

template <class D, class S, class F>
void convert(const std::string& name, F) {
  register_operation("cvt." + name, [](Warp& w, const Instruction& in, uint32_t mask) {
    if (in.constants[0] == sizeof(D) && in.constants[1] == sizeof(S)) {
      map1<D, S>(w, in, mask, [](S x) { return F{}(x); });
      return;
    }
    for (int l = 0; l < lanes; ++l) {
      if (!(mask >> l & 1)) continue;
      const S x = truncated<S>(read_register(w, in.operands[1], in.constants[1], l));
      write_register(w, in.operands[0], in.constants[0], l, extended(static_cast<D>(F{}(x))));
    }
  });
}

/// To the nearest integer the format holds; NaN becomes 0, as on the hardware for 32 bits.
template <class D>
D clamped(double x) {
  using Limits = std::numeric_limits<D>;
  if (std::isnan(x)) return 0;
  if (x <= static_cast<double>(Limits::min())) return Limits::min();
  if (x >= static_cast<double>(Limits::max())) return Limits::max();
  return static_cast<D>(x);
}

struct Float {
  using Store = float;
  static double load(float x) { return x; }
};
struct Double {
  using Store = double;
  static double load(double x) { return x; }
};
struct Half {
  using Store = uint16_t;
  static double load(uint16_t x) { return f16_to_float(x); }
};
struct Brain {
  using Store = uint16_t;
  static double load(uint16_t x) { return bf16_to_float(x); }
};

template <class D>
void to_integer(const std::string& d) {
  const auto from = [&](const std::string& s, auto load) {
    using S = typename decltype(load)::Store;
    using L = decltype(load);
    convert<D, S>("rni." + d + "." + s, [](S x) { return clamped<D>(std::nearbyint(L::load(x))); });
    convert<D, S>("rzi." + d + "." + s, [](S x) { return clamped<D>(std::trunc(L::load(x))); });
    convert<D, S>("rmi." + d + "." + s, [](S x) { return clamped<D>(std::floor(L::load(x))); });
    convert<D, S>("rpi." + d + "." + s, [](S x) { return clamped<D>(std::ceil(L::load(x))); });
  };
  from("f32", Float{});
  from("f64", Double{});
  from("f16", Half{});
  from("bf16", Brain{});
}

template <class S>
void from_integer(const std::string& s) {
  convert<uint8_t, S>("u8." + s, [](S x) { return static_cast<uint8_t>(x); });
  convert<int8_t, S>("s8." + s, [](S x) { return static_cast<int8_t>(x); });
  convert<uint16_t, S>("u16." + s, [](S x) { return static_cast<uint16_t>(x); });
  convert<int16_t, S>("s16." + s, [](S x) { return static_cast<int16_t>(x); });
  convert<uint32_t, S>("u32." + s, [](S x) { return static_cast<uint32_t>(x); });
  convert<int32_t, S>("s32." + s, [](S x) { return static_cast<int32_t>(x); });
  convert<uint64_t, S>("u64." + s, [](S x) { return static_cast<uint64_t>(x); });
  convert<int64_t, S>("s64." + s, [](S x) { return static_cast<int64_t>(x); });
  convert<float, S>("rn.f32." + s, [](S x) { return static_cast<float>(x); });
  convert<double, S>("rn.f64." + s, [](S x) { return static_cast<double>(x); });
  convert<uint16_t, S>(
      "rn.f16." + s, [](S x) { return float_to_f16(double_to_float_odd(static_cast<double>(x))); });
  convert<uint16_t, S>("rn.bf16." + s, [](S x) {
    return float_to_bf16(double_to_float_odd(static_cast<double>(x)));
  });
}

struct Keep {
  static float clip(float x) { return x; }
};
struct Relu {  // keeps a NaN
  static float clip(float x) { return x < 0 ? 0.f : x; }
};

/// float32 to a 16-bit format, and two of them to a pair whose high half is the first operand.
template <class Clip, class Narrow>
void narrow(const std::string& how, const std::string& to, Narrow) {
  using F = float;
  convert<uint16_t, F>(how + "." + to + ".f32", [](F x) { return Narrow{}(Clip::clip(x)); });
  binary<uint32_t, F, F>("cvt." + how + "." + to + "x2.f32", [](F high, F low) {
    return uint32_t{Narrow{}(Clip::clip(low))} | uint32_t{Narrow{}(Clip::clip(high))} << 16;
  });
}

}  // namespace

void register_convert_operations() {
  from_integer<uint8_t>("u8");
  from_integer<int8_t>("s8");
  from_integer<uint16_t>("u16");
  from_integer<int16_t>("s16");
  from_integer<uint32_t>("u32");
  from_integer<int32_t>("s32");
  from_integer<uint64_t>("u64");
  from_integer<int64_t>("s64");
  to_integer<uint8_t>("u8");
  to_integer<int8_t>("s8");
  to_integer<uint16_t>("u16");
  to_integer<int16_t>("s16");
  to_integer<uint32_t>("u32");
  to_integer<int32_t>("s32");
  to_integer<uint64_t>("u64");
  to_integer<int64_t>("s64");

  const auto bf16 = [](float x) { return float_to_bf16(x); };
  const auto f16 = [](float x) { return float_to_f16(x); };
  const auto bf16_zero = [](float x) { return float_to_bf16_toward_zero(x); };
  const auto f16_zero = [](float x) { return float_to_f16_toward_zero(x); };
  narrow<Keep>("rn", "bf16", bf16);
  narrow<Relu>("rn.relu", "bf16", bf16);
  narrow<Keep>("rz", "bf16", bf16_zero);
  narrow<Relu>("rz.relu", "bf16", bf16_zero);
  narrow<Keep>("rn", "f16", f16);
  narrow<Relu>("rn.relu", "f16", f16);
  narrow<Keep>("rz", "f16", f16_zero);
  narrow<Relu>("rz.relu", "f16", f16_zero);
  convert<uint16_t, double>("rn.f16.f64",
                            [](double x) { return float_to_f16(double_to_float_odd(x)); });
  convert<uint16_t, double>("rn.bf16.f64",
                            [](double x) { return float_to_bf16(double_to_float_odd(x)); });
  convert<float, uint16_t>("f32.bf16", [](uint16_t x) { return bf16_to_float(x); });
  convert<float, uint16_t>("f32.f16", [](uint16_t x) { return f16_to_float(x); });
  convert<double, uint16_t>("f64.f16", [](uint16_t x) { return double{f16_to_float(x)}; });
  convert<double, float>("f64.f32", [](float x) { return double{x}; });
  convert<float, double>("rn.f32.f64", [](double x) { return static_cast<float>(x); });
  convert<float, float>("f32.f32", [](float x) { return x; });
  convert<float, float>("sat.f32.f32",
                        [](float x) { return x > 0 ? std::fmin(x, 1.f) : 0.f; });  // NaN gives 0
  convert<float, float>("rni.f32.f32", [](float x) { return std::nearbyint(x); });
  convert<float, float>("rzi.f32.f32", [](float x) { return std::trunc(x); });
  convert<float, float>("rmi.f32.f32", [](float x) { return std::floor(x); });
  convert<float, float>("rpi.f32.f32", [](float x) { return std::ceil(x); });
  convert<double, double>("rni.f64.f64", [](double x) { return std::nearbyint(x); });
  convert<double, double>("rzi.f64.f64", [](double x) { return std::trunc(x); });
  convert<double, double>("rmi.f64.f64", [](double x) { return std::floor(x); });
  convert<double, double>("rpi.f64.f64", [](double x) { return std::ceil(x); });
  convert<uint32_t, float>("rna.tf32.f32", [](float x) { return float_to_tf32_away(x); });
  convert<uint32_t, float>("rn.tf32.f32", [](float x) { return float_to_tf32_even(x); });
}

}  // namespace gpu
