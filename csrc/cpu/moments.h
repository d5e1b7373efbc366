// Mean and variance over N, H and W, per channel: the batch statistics of a source.
//
// One pass: sums of x - p and (x - p)^2 in double, where p is the channel's first element, so that
// no mean however large cancels the variance away.
#pragma once

#include <cmath>
#include <vector>

#include "parallel.h"
#include "tile_io.h"

namespace d3net::cpu::D3NET_ISA {

/// Sums of x - p and its square, lane by lane.
template <class A>
class LaneSums {
  static constexpr int kParts = sizeof(double) / sizeof(A);
  static constexpr int kDoubles = kLanes<double>;

 public:
  explicit LaneSums(Vec<A> pivot) {
    for_parts(pivot, [&](auto i, Vec<double> p) __attribute__((always_inline)) { pivot_[i] = p; });
  }
  D3NET_INLINE void add(Vec<A> v) {
    for_parts(v, [&](auto i, Vec<double> x) __attribute__((always_inline)) {
      x -= pivot_[i];
      sum_[i] += x;
      square_[i] = fma(x, x, square_[i]);
    });
  }
  /// All lanes are one channel.
  void add_lanes_to(double* sums) const {
    for (int i = 0; i < kParts; ++i) {
      sums[0] += sum_lanes<double>(sum_[i]);
      sums[1] += sum_lanes<double>(square_[i]);
    }
  }
  /// Each of the first n lanes is a channel.
  void add_channels_to(double* sums, int64_t n) const {
    for (int64_t lane = 0; lane < n; ++lane) {
      sums[2 * lane] += sum_[lane / kDoubles][lane % kDoubles];
      sums[2 * lane + 1] += square_[lane / kDoubles][lane % kDoubles];
    }
  }

 private:
  template <class F>
  D3NET_INLINE static void for_parts(Vec<A> v, F&& f) {
    typedef A Part __attribute__((vector_size(kVectorBytes / kParts)));
    unroll<kParts>([&](auto i) __attribute__((always_inline)) {
      Part part;
      std::memcpy(&part, reinterpret_cast<const char*>(&v) + i * sizeof part, sizeof part);
      f(i, __builtin_convertvector(part, Vec<double>));
    });
  }

  Vec<double> pivot_[kParts], sum_[kParts] = {}, square_[kParts] = {};
};

constexpr int64_t kMomentParts = 16;  // of the rows, where channels are interleaved

/// moments[c] = {mean, biased variance}; the same bits for any number of threads.
template <class T>
void moments(const View& x, int64_t batch, int64_t channels, int64_t height, int64_t width,
             double* moments) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  const T* data = static_cast<const T*>(x.data);
  const bool interleaved = x.stride_c == 1 && x.stride_w != 1 && channels > 1;
  const int64_t rows = batch * height;
  const int64_t parts = interleaved ? std::min(kMomentParts, rows) : 1;
  std::vector<double> partial(static_cast<size_t>(parts * channels * 2));
  auto row = [&](int64_t i) { return data + i / height * x.stride_n + i % height * x.stride_h; };
  std::vector<A> pivots(static_cast<size_t>(round_up(channels, lanes)));
  for (int64_t c = 0; c < channels; ++c) {
    const A first = load_one<A>(data + c * x.stride_c);
    pivots[static_cast<size_t>(c)] = std::isfinite(first) ? first : A{0};
  }

  auto add_part = [&](int64_t part) {  // a range of rows, lanes are channels
    for (int64_t i = part * rows / parts; i < (part + 1) * rows / parts; ++i)
      for (int64_t c = 0; c < channels; c += lanes) {
        const int64_t n = std::min(lanes, channels - c);
        const T* from = row(i) + c;
        LaneSums<A> lane_sums(load(&pivots[static_cast<size_t>(c)]));
        for (int64_t w = 0; w < width; ++w, from += x.stride_w)
          lane_sums.add(n == lanes ? load<A>(from) : load_first<A>(from, n));
        lane_sums.add_channels_to(&partial[static_cast<size_t>((part * channels + c) * 2)], n);
      }
  };
  auto add_channel = [&](int64_t c) {  // all rows of a channel, lanes are pixels
    const Vec<A> pivot = broadcast(pivots[static_cast<size_t>(c)]);
    LaneSums<A> lane_sums(pivot);
    for (int64_t i = 0; i < rows; ++i) {
      const T* from = row(i) + c * x.stride_c;
      int64_t w = 0;
      if (x.stride_w == 1)
        for (; w + lanes <= width; w += lanes) lane_sums.add(load<A>(from + w));
      for (; w < width; w += lanes) {
        A values[lanes];
        store(values, pivot);
        for (int64_t k = 0; k < std::min(lanes, width - w); ++k)
          values[k] = load_one<A>(from + (w + k) * x.stride_w);
        lane_sums.add(load(values));
      }
    }
    lane_sums.add_lanes_to(&partial[static_cast<size_t>(c * 2)]);
  };

  auto program = [&](Crew::Worker& worker) {
    worker.each(interleaved ? parts : channels,
                [&](int64_t i, int64_t) { interleaved ? add_part(i) : add_channel(i); });
  };
  Crew::run(program, 0, rows * width * channels);

  const double count = static_cast<double>(rows * width);
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0, square = 0;
    for (int64_t part = 0; part < parts; ++part) {
      sum += partial[static_cast<size_t>((part * channels + c) * 2)];
      square += partial[static_cast<size_t>((part * channels + c) * 2 + 1)];
    }
    const double shifted_mean = sum / count;
    const double variance = square / count - shifted_mean * shifted_mean;
    moments[2 * c] = static_cast<double>(pivots[static_cast<size_t>(c)]) + shifted_mean;
    moments[2 * c + 1] = variance < 0 ? 0 : variance;  // NaN stays
  }
}

}  // namespace d3net::cpu::D3NET_ISA
