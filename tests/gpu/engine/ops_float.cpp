// Floating point arithmetic. Names: opcode, "ftz" or "nan" where they change the result, type.
#include <algorithm>
#include <cmath>

#include "lanes.h"
#include "numbers.h"
#include "operations.h"

namespace gpu {

namespace {

/// A format: how it lies in a register, and the type in which its arithmetic is exact enough that
/// one rounding back gives the correctly rounded result.
struct F32 {
  using Store = float;
  static float load(Store x) { return x; }
  static Store store(float x) { return x; }
  using Compute = float;
};
struct F32Flushed {  // .ftz: subnormal inputs and results become zero, with their sign
  using Store = float;
  static float load(Store x) {
    return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x;
  }
  static Store store(float x) { return load(x); }
  using Compute = float;
};
struct F64 {
  using Store = double;
  static double load(Store x) { return x; }
  static Store store(double x) { return x; }
  using Compute = double;
};
struct BF16 {
  using Store = uint16_t;
  static double load(Store x) { return bf16_to_float(x); }
  static Store store(double x) { return float_to_bf16(double_to_float_odd(x)); }
  using Compute = double;
};
struct F16 {
  using Store = uint16_t;
  static double load(Store x) { return f16_to_float(x); }
  static Store store(double x) { return float_to_f16(double_to_float_odd(x)); }
  using Compute = double;
};
/// Two 16-bit numbers in one register.
template <class Half>
struct Pair {};

template <class F, class Op>
struct Apply {
  using S = typename F::Store;
  S operator()(S a) const { return F::store(Op{}(F::load(a))); }
  S operator()(S a, S b) const { return F::store(Op{}(F::load(a), F::load(b))); }
  S operator()(S a, S b, S c) const { return F::store(Op{}(F::load(a), F::load(b), F::load(c))); }
};
template <class Half, class Op>
struct Apply<Pair<Half>, Op> {
  template <class... T>
  uint32_t operator()(T... x) const {
    const Apply<Half, Op> one;
    return one(static_cast<uint16_t>(x)...) | uint32_t{one(static_cast<uint16_t>(x >> 16)...)}
                                                  << 16;
  }
};
template <class F>
struct StoreOf {
  using type = typename F::Store;
};
template <class Half>
struct StoreOf<Pair<Half>> {
  using type = uint32_t;
};

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Sub {
  template <class T>
  T operator()(T a, T b) const {
    return a - b;
  }
};
struct Mul {
  template <class T>
  T operator()(T a, T b) const {
    return a * b;
  }
};
struct Div {
  template <class T>
  T operator()(T a, T b) const {
    return a / b;
  }
};
struct Fma {
  template <class T>
  T operator()(T a, T b, T c) const {
    return std::fma(a, b, c);
  }
};
struct FmaRelu {
  template <class T>
  T operator()(T a, T b, T c) const {
    const T x = std::fma(a, b, c);
    return x < 0 ? T{0} : x;
  }
};
struct Min {  // a NaN loses, and -0 is below +0
  template <class T>
  T operator()(T a, T b) const {
    return a == b ? (std::signbit(a) ? a : b) : std::fmin(a, b);
  }
};
struct Max {
  template <class T>
  T operator()(T a, T b) const {
    return a == b ? (std::signbit(a) ? b : a) : std::fmax(a, b);
  }
};
struct MinNaN {
  template <class T>
  T operator()(T a, T b) const {
    return std::isnan(a) || std::isnan(b) ? T(NAN) : Min{}(a, b);
  }
};
struct MaxNaN {
  template <class T>
  T operator()(T a, T b) const {
    return std::isnan(a) || std::isnan(b) ? T(NAN) : Max{}(a, b);
  }
};
struct Sqrt {
  template <class T>
  T operator()(T a) const {
    return std::sqrt(a);
  }
};
struct Rsqrt {
  template <class T>
  T operator()(T a) const {
    return 1 / std::sqrt(a);
  }
};
struct Rcp {
  template <class T>
  T operator()(T a) const {
    return 1 / a;
  }
};
struct Exp2 {
  template <class T>
  T operator()(T a) const {
    return std::exp2(a);
  }
};
struct Log2 {
  template <class T>
  T operator()(T a) const {
    return std::log2(a);
  }
};
struct Sin {
  template <class T>
  T operator()(T a) const {
    return std::sin(a);
  }
};
struct Cos {
  template <class T>
  T operator()(T a) const {
    return std::cos(a);
  }
};
struct Tanh {
  template <class T>
  T operator()(T a) const {
    return std::tanh(a);
  }
};
struct Neg {
  template <class T>
  T operator()(T a) const {
    return -a;
  }
};
struct Abs {
  template <class T>
  T operator()(T a) const {
    return std::fabs(a);
  }
};

template <class F, class Op>
void one(const std::string& name) {
  using S = typename StoreOf<F>::type;
  unary<S, S>(name, Apply<F, Op>{});
}
template <class F, class Op>
void two(const std::string& name) {
  using S = typename StoreOf<F>::type;
  binary<S, S, S>(name, Apply<F, Op>{});
}
template <class F, class Op>
void three(const std::string& name) {
  using S = typename StoreOf<F>::type;
  ternary<S, S, S, S>(name, Apply<F, Op>{});
}

/// What every format has.
template <class F>
void arithmetic(const std::string& t) {
  two<F, Add>("add." + t);
  two<F, Sub>("sub." + t);
  two<F, Mul>("mul." + t);
  two<F, Min>("min." + t);
  two<F, Max>("max." + t);
  two<F, MinNaN>("min.nan." + t);
  two<F, MaxNaN>("max.nan." + t);
  three<F, Fma>("fma." + t);
  one<F, Neg>("neg." + t);
  one<F, Abs>("abs." + t);
}

template <class F>
void functions(const std::string& t) {
  two<F, Div>("div." + t);
  one<F, Sqrt>("sqrt." + t);
  one<F, Rsqrt>("rsqrt." + t);
  one<F, Rcp>("rcp." + t);
  one<F, Exp2>("ex2." + t);
  one<F, Log2>("lg2." + t);
  one<F, Sin>("sin." + t);
  one<F, Cos>("cos." + t);
  one<F, Tanh>("tanh." + t);
}

template <class F>
struct Compared {
  template <class Test>
  static void by(const std::string& name, Test) {
    using S = typename F::Store;
    comparison<S>(name, [](S a, S b) { return Test{}(F::load(a), F::load(b)); });
  }
};
template <class Half>
struct Compared<Pair<Half>> {
  template <class Test>
  static void by(const std::string& name, Test) {
    comparison_of_pairs(
        name, [](uint16_t a, uint16_t b) { return Test{}(Half::load(a), Half::load(b)); });
  }
};

/// Comparisons: the plain ones are false for a NaN, those with a trailing u are true.
template <class F>
void comparisons(const std::string& t) {
  using C = Compared<F>;
  C::by("setp.eq." + t, [](auto a, auto b) { return a == b; });
  C::by("setp.ne." + t, [](auto a, auto b) { return a < b || a > b; });
  C::by("setp.lt." + t, [](auto a, auto b) { return a < b; });
  C::by("setp.le." + t, [](auto a, auto b) { return a <= b; });
  C::by("setp.gt." + t, [](auto a, auto b) { return a > b; });
  C::by("setp.ge." + t, [](auto a, auto b) { return a >= b; });
  C::by("setp.equ." + t, [](auto a, auto b) { return !(a < b || a > b); });
  C::by("setp.neu." + t, [](auto a, auto b) { return !(a == b); });
  C::by("setp.ltu." + t, [](auto a, auto b) { return !(a >= b); });
  C::by("setp.leu." + t, [](auto a, auto b) { return !(a > b); });
  C::by("setp.gtu." + t, [](auto a, auto b) { return !(a <= b); });
  C::by("setp.geu." + t, [](auto a, auto b) { return !(a < b); });
  C::by("setp.num." + t, [](auto a, auto b) { return !std::isnan(a) && !std::isnan(b); });
  C::by("setp.nan." + t, [](auto a, auto b) { return std::isnan(a) || std::isnan(b); });
}

}  // namespace

void register_float_operations() {
  arithmetic<F32>("f32");
  arithmetic<F32Flushed>("ftz.f32");
  arithmetic<F64>("f64");
  arithmetic<BF16>("bf16");
  arithmetic<F16>("f16");
  arithmetic<Pair<BF16>>("bf16x2");
  arithmetic<Pair<F16>>("f16x2");
  functions<F32>("f32");
  functions<F32Flushed>("ftz.f32");
  functions<F64>("f64");
  comparisons<F32>("f32");
  comparisons<F32Flushed>("ftz.f32");
  comparisons<F64>("f64");
  comparisons<BF16>("bf16");
  comparisons<F16>("f16");
  comparisons<Pair<BF16>>("bf16x2");
  comparisons<Pair<F16>>("f16x2");
  three<BF16, FmaRelu>("fma.relu.bf16");
  three<F16, FmaRelu>("fma.relu.f16");
  three<Pair<BF16>, FmaRelu>("fma.relu.bf16x2");
  three<Pair<F16>, FmaRelu>("fma.relu.f16x2");
}

}  // namespace gpu
