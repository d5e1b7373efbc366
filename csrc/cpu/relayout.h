// Copies between tensors of any strides and rows of adjacent channels.
#pragma once

#include "parallel.h"
#include "tile_io.h"

namespace d3net::cpu::D3NET_ISA {

/// One row of a map, (width, channels) with any strides, to pixels of `pitch` adjacent channels.
template <class From, class To>
void to_adjacent_channels(const From* from, int64_t stride_w, int64_t stride_c, int64_t width,
                          int64_t channels, To* to, int64_t pitch) {
  using A = Accumulator<From>;
  constexpr int lanes = kLanes<A>;
  if (stride_c == 1) {
    for (int64_t x = 0; x < width; ++x)
      for (int64_t c = 0; c < channels; c += lanes)
        store_first<A>(to + x * pitch + c, load_first<A>(from + x * stride_w + c, channels - c),
                       channels - c);
    return;
  }
  for (int64_t x = 0; x < width; x += lanes) {
    const int64_t columns = std::min<int64_t>(lanes, width - x);
    for (int64_t c = 0; c < channels; c += lanes) {
      const int64_t planes = std::min<int64_t>(lanes, channels - c);
      Vec<A> block[lanes] = {};
      for (int64_t i = 0; i < planes; ++i) {
        const From* row = from + x * stride_w + (c + i) * stride_c;
        if (stride_w == 1) {
          block[i] = load_first<A>(row, columns);
        } else {
          A values[lanes] = {};
          for (int64_t j = 0; j < columns; ++j) values[j] = load_one<A>(row + j * stride_w);
          block[i] = load(values);
        }
      }
      transpose<A>(block);
      for (int64_t j = 0; j < columns; ++j)
        store_first<A>(to + (x + j) * pitch + c, block[j], planes);
    }
  }
}

template <class T>
void to_channels_last(const View& x, int64_t batch, int64_t channels, int64_t height, int64_t width,
                      T* to) {
  auto program = [&](Crew::Worker& worker) {
    worker.each(batch * height, [&](int64_t i, int64_t) {
      const T* from =
          static_cast<const T*>(x.data) + i / height * x.stride_n + i % height * x.stride_h;
      to_adjacent_channels(from, x.stride_w, x.stride_c, width, channels, to + i * width * channels,
                           channels);
    });
  };
  Crew::run(program, 0, batch * height * width * channels);
}

}  // namespace d3net::cpu::D3NET_ISA
