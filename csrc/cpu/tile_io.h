// Between tensors of any layout and dtype and the planar, zero-padded tiles of the microkernels.
#pragma once

#include <limits>

#include "../multidilated_conv.h"
#include "plan.h"
#include "simd.h"

namespace d3net::cpu::D3NET_ISA {

/// The type that sums of T are kept in.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

/// psi of a run of channels, in the form y = max(x * scale + shift, floor): without an affine part
/// scale is 1 and shift 0, without ReLU floor is -inf. NaN passes.
template <class A>
struct Activation {
  const A* scale = nullptr;  // null: 1 and 0
  const A* shift = nullptr;
  bool relu = false;

  Activation from_channel(int64_t c) const {
    return scale ? Activation{scale + c, shift + c, relu} : *this;
  }
  A floor() const { return relu ? A{0} : -std::numeric_limits<A>::infinity(); }
};

template <class A>
D3NET_INLINE Vec<A> activate(Vec<A> x, Vec<A> scale, Vec<A> shift, Vec<A> floor) {
  const Vec<A> y = fma(x, scale, shift);
  return y < floor ? floor : y;
}

/// The same taps seen from the input: outputs and channels swapped, both axes reversed.
inline Weight transposed(const Weight& w, int64_t kernel_h, int64_t kernel_w,
                         int64_t element_bytes) {
  const int64_t last = (kernel_h - 1) * w.stride_h + (kernel_w - 1) * w.stride_w;
  return {static_cast<const char*>(w.data) + last * element_bytes, w.stride_c, w.stride_k,
          -w.stride_h, -w.stride_w};
}

/// The part of a map that one task writes.
struct Tile {
  int64_t image, row, rows, col, cols;  // rows and cols inside the map
};

inline Tile tile_at(int64_t index, const Tiling& tiling, int64_t height, int64_t width) {
  const int64_t image = index / tiling.tiles(), in_image = index % tiling.tiles();
  const int64_t row = in_image / tiling.strips * tiling.rows;
  const int64_t col = in_image % tiling.strips * tiling.cols;
  return {image, row, std::min(tiling.rows, height - row), col, std::min(tiling.cols, width - col)};
}

/// Zeros from begin to end, and up to a vector beyond.
template <class A>
D3NET_INLINE void fill_zero(A* begin, A* end) {
  for (; begin < end; begin += kLanes<A>) store(begin, Vec<A>{});
}

/// Where one slot's row lies in the map and in the buffer; pointers are those of channel 0.
template <class A, class T>
struct RowCopy {
  const T* from;    // first column to copy
  A* to;            // the same column
  A *left, *right;  // the slot's ends; what is not copied between them becomes zero
  int64_t stride;   // between channels in the buffer
  int64_t count;    // columns to copy
};

/// Stages `channels` channels of x for a tile: slots as `window` lays them out, psi applied, zeros
/// outside the map. Slots of rows outside the map are left alone: no live tap reads them.
template <class T>
class Stager {
  using A = Accumulator<T>;
  static constexpr int kN = kLanes<A>;

 public:
  Stager(const View& x, int64_t height, int64_t width, int64_t dilation_h, int64_t kernel_h,
         const Tiling& tiling, const Window& window)
      : x_(x),
        height_(height),
        width_(width),
        dilation_h_(dilation_h),
        kernel_h_(kernel_h),
        tiling_(tiling),
        window_(window) {}

  void stage(const Tile& tile, int64_t channel, int64_t channels, Activation<A> psi, A* out) const {
    for (int64_t slot = 0; slot < window_.slots; ++slot)
      if (holds_row(slot, tile))
        stage_row(tile, slot, channel, channels, psi, out + slot * window_.pitch,
                  window_.channel_stride);
  }

  /// One slot, which holds a row, of each channel; channels `stride` apart in `out`.
  void stage_row(const Tile& tile, int64_t slot, int64_t channel, int64_t channels,
                 Activation<A> psi, A* out, int64_t stride) const {
    const int64_t first = std::max<int64_t>(0, tile.col - window_.reach);
    const int64_t last = std::min(width_, tile.col + tiling_.cols + window_.reach);
    const T* from = static_cast<const T*>(x_.data) + tile.image * x_.stride_n +
                    channel * x_.stride_c + row_of(slot, tile) * x_.stride_h + first * x_.stride_w;
    A* row = out + window_.lead;
    const RowCopy<A, T> copy{from,
                             row + (first - tile.col),
                             row - window_.reach,
                             row + tiling_.cols + window_.reach,
                             stride,
                             last - first};
    const bool gapless = x_.stride_c == 1 && x_.stride_w == channels;
    if (x_.stride_w == 1 || width_ == 1)
      copy_planar(copy, channels, psi);
    else if (gapless && channels == 2)
      copy_in_turns<2>(copy, psi);
    else if (gapless && channels == 4)
      copy_in_turns<4>(copy, psi);
    else if (gapless && channels == 8)
      copy_in_turns<8>(copy, psi);
    else if (x_.stride_c == 1)
      copy_interleaved(copy, channels, psi);
    else
      copy_strided(copy, channels, psi);
  }

  /// Calls run(address, bytes) for each run of memory that stage() would read, in its order.
  template <class F>
  void for_each_run(const Tile& tile, int64_t channel, int64_t channels, F&& run) const {
    const int64_t first = std::max<int64_t>(0, tile.col - window_.reach);
    const int64_t last = std::min(width_, tile.col + tiling_.cols + window_.reach);
    const bool planar = x_.stride_w == 1;
    if (!planar && x_.stride_c != 1) return;
    const int64_t runs = planar ? channels : last - first,
                  length = planar ? last - first : channels;
    const int64_t stride = planar ? x_.stride_c : x_.stride_w;
    const T* image = static_cast<const T*>(x_.data) + tile.image * x_.stride_n +
                     channel * x_.stride_c + first * x_.stride_w;
    for (int64_t slot = 0; slot < window_.slots; ++slot) {
      if (!holds_row(slot, tile)) continue;
      const T* row = image + row_of(slot, tile) * x_.stride_h;
      if (stride == length)
        run(row, runs * length * static_cast<int64_t>(sizeof(T)));
      else
        for (int64_t i = 0; i < runs; ++i)
          run(row + i * stride, length * static_cast<int64_t>(sizeof(T)));
    }
  }

  /// Whether a slot's row lies in the map; the others are never read.
  bool holds_row(int64_t slot, const Tile& tile) const {
    const int64_t y = row_of(slot, tile);
    return y >= 0 && y < height_;
  }

 private:
  int64_t row_of(int64_t slot, const Tile& tile) const {
    const int64_t above = kernel_h_ / 2 * dilation_h_;
    if (window_.tap_rows == dilation_h_) return tile.row - above + slot;
    const int64_t tap = slot / window_.tap_rows, r = slot % window_.tap_rows;
    return r < tile.rows ? tile.row - above + tap * dilation_h_ + r : -1;
  }

  /// Before the columns are copied (what is written beyond them is mended by the copy) ...
  static void zero_left(const RowCopy<A, T>& copy, int64_t channel) {
    const int64_t offset = channel * copy.stride;
    fill_zero(copy.left + offset, copy.to + offset);
  }
  /// ... and after it, which also clears what the last vector wrote too much.
  static void zero_right(const RowCopy<A, T>& copy, int64_t channel) {
    const int64_t offset = channel * copy.stride;
    fill_zero(copy.to + offset + copy.count, copy.right + offset);
  }

  void copy_planar(const RowCopy<A, T>& copy, int64_t channels, Activation<A> psi) const {
    const int64_t count = copy.count;
    const Vec<A> floor = broadcast(psi.floor());
    for (int64_t c = 0; c < channels; ++c) {
      const Vec<A> scale = broadcast(psi.scale ? psi.scale[c] : A{1});
      const Vec<A> shift = broadcast(psi.scale ? psi.shift[c] : A{0});
      const T* from = copy.from + c * x_.stride_c;
      A* to = copy.to + c * copy.stride;
      zero_left(copy, c);
      int64_t i = 0;
      for (; i + kN <= count; i += kN)
        store(to + i, activate<A>(load<A>(from + i), scale, shift, floor));
      if (i < count)
        store(to + i, activate<A>(load_first<A>(from + i, count - i), scale, shift, floor));
      zero_right(copy, c);
    }
  }

  /// All channels of the tensor, so that pixels follow each other without a gap.
  template <int channels>
  void copy_in_turns(const RowCopy<A, T>& copy, Activation<A> psi) const {
    const Vec<A> floor = broadcast(psi.floor());
    for (int64_t c = 0; c < channels; ++c) zero_left(copy, c);
    for (int64_t i = 0; i < copy.count; i += kN) {
      const T* from = copy.from + channels * i;
      const int64_t rest = channels * (copy.count - i);
      Vec<A> block[channels];
      unroll<channels>([&](auto v) __attribute__((always_inline)) {
        block[v] = rest >= (v + 1) * kN ? load<A>(from + v * kN)
                   : rest > v * kN      ? load_first<A>(from + v * kN, rest - v * kN)
                                        : Vec<A>{};
      });
      take_apart(block);
      unroll<channels>([&](auto c) __attribute__((always_inline)) {
        const Vec<A> scale = broadcast(psi.scale ? psi.scale[c] : A{1});
        const Vec<A> shift = broadcast(psi.scale ? psi.shift[c] : A{0});
        store(copy.to + c * copy.stride + i, activate<A>(block[c], scale, shift, floor));
      });
    }
    for (int64_t c = 0; c < channels; ++c) zero_right(copy, c);
  }

  /// Channels adjacent in memory: lanes are channels until a register transpose makes them pixels.
  void copy_interleaved(const RowCopy<A, T>& copy, int64_t channels, Activation<A> psi) const {
    const int64_t count = copy.count;
    const Vec<A> floor = broadcast(psi.floor());
    for (int64_t c = 0; c < channels; ++c) zero_left(copy, c);
    for (int64_t c = 0; c < channels; c += kN) {
      const int64_t n = std::min<int64_t>(kN, channels - c);
      const Vec<A> scale = psi.scale ? load_first<A>(psi.scale + c, n) : broadcast(A{1});
      const Vec<A> shift = psi.scale ? load_first<A>(psi.shift + c, n) : Vec<A>{};
      A* to = copy.to + c * copy.stride;
      for (int64_t i = 0; i < count; i += kN) {
        Vec<A> block[kN] = {};
        const int64_t pixels = std::min<int64_t>(kN, count - i);
        const T* from = copy.from + i * x_.stride_w + c;
        if (n == kN && pixels == kN) {
          unroll<kN>([&](auto p) __attribute__((always_inline)) {
            block[p] = activate<A>(load<A>(from + p * x_.stride_w), scale, shift, floor);
          });
        } else {
          for (int64_t p = 0; p < pixels; ++p)
            block[p] = activate<A>(load_first<A>(from + p * x_.stride_w, n), scale, shift, floor);
        }
        transpose<A>(block);
        for (int64_t k = 0; k < n; ++k) store(to + k * copy.stride + i, block[k]);
      }
    }
    for (int64_t c = 0; c < channels; ++c) zero_right(copy, c);
  }

  void copy_strided(const RowCopy<A, T>& copy, int64_t channels, Activation<A> psi) const {
    const int64_t count = copy.count;
    const Vec<A> floor = broadcast(psi.floor());
    for (int64_t c = 0; c < channels; ++c) {
      const Vec<A> scale = broadcast(psi.scale ? psi.scale[c] : A{1});
      const Vec<A> shift = broadcast(psi.scale ? psi.shift[c] : A{0});
      zero_left(copy, c);
      for (int64_t i = 0; i < count; ++i) {
        const A value = load_one<A>(copy.from + c * x_.stride_c + i * x_.stride_w);
        copy.to[c * copy.stride + i] = activate<A>(broadcast(value), scale, shift, floor)[0];
      }
      zero_right(copy, c);
    }
  }

  View x_;
  int64_t height_, width_, dilation_h_, kernel_h_;
  const Tiling& tiling_;
  const Window& window_;
};

/// Writes a row of all channels of a tensor in channels_last.
template <int channels, class T, class A>
D3NET_INLINE void write_in_turns(T* to, const A* acc, int64_t acc_plane, int64_t cols,
                                 const A* bias) {
  constexpr int n = kLanes<A>;
  for (int64_t i = 0; i < cols; i += n, to += channels * n) {
    Vec<A> block[channels];
    unroll<channels>([&](auto c) __attribute__((always_inline)) {
      block[c] = load(acc + c * acc_plane + i) + broadcast(bias ? bias[c] : A{0});
    });
    put_in_turns(block);
    const int64_t rest = channels * (cols - i);
    unroll<channels>([&](auto v) __attribute__((always_inline)) {
      if (rest > v * n) store_first<A>(to + v * n, block[v], rest - v * n);
    });
  }
}

/// Writes planar rows acc[channel][row][col] of a tile to a tensor, adding bias if there is one.
template <class T>
void write_tile(const View& out, const Tile& tile, int64_t channel, int64_t channels,
                const Accumulator<T>* acc, int64_t acc_plane, int64_t acc_row,
                const Accumulator<T>* bias) {
  using A = Accumulator<T>;
  constexpr int n = kLanes<A>;
  auto bias_of = [&](int64_t c)
                     __attribute__((always_inline)) { return bias ? bias[channel + c] : A{0}; };
  for (int64_t r = 0; r < tile.rows; ++r) {
    T* row = static_cast<T*>(out.data) + tile.image * out.stride_n + channel * out.stride_c +
             (tile.row + r) * out.stride_h + tile.col * out.stride_w;
    const A* acc_r = acc + r * acc_row;
    if (out.stride_w == 1) {
      for (int64_t c = 0; c < channels; ++c) {
        const Vec<A> b = broadcast(bias_of(c));
        T* to = row + c * out.stride_c;
        const A* from = acc_r + c * acc_plane;
        int64_t i = 0;
        for (; i + n <= tile.cols; i += n) store<A>(to + i, load(from + i) + b);
        if (i < tile.cols) store_first<A>(to + i, load(from + i) + b, tile.cols - i);
      }
    } else if (out.stride_w == channels && channels == 2) {
      write_in_turns<2>(row, acc_r, acc_plane, tile.cols, bias ? bias + channel : nullptr);
    } else if (out.stride_w == channels && channels == 4) {
      write_in_turns<4>(row, acc_r, acc_plane, tile.cols, bias ? bias + channel : nullptr);
    } else {  // dense outputs are NCHW or channels_last: stride_c == 1
      for (int64_t c = 0; c < channels; c += n) {
        const int64_t outs = std::min<int64_t>(n, channels - c);
        for (int64_t i = 0; i < tile.cols; i += n) {
          Vec<A> block[n] = {};
          for (int64_t k = 0; k < outs; ++k)
            block[k] = load(acc_r + (c + k) * acc_plane + i) + broadcast(bias_of(c + k));
          transpose<A>(block);
          const int64_t pixels = std::min<int64_t>(n, tile.cols - i);
          for (int64_t p = 0; p < pixels; ++p) {
            T* to = row + (i + p) * out.stride_w + c;
            if (outs == n)
              store<A>(to, block[p]);
            else
              store_first<A>(to, block[p], outs);
          }
        }
      }
    }
  }
}

}  // namespace d3net::cpu::D3NET_ISA
