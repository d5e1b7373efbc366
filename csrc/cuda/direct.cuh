// The general kernels: any dtype, layout, kernel size, dilation and number of sources, on every
// architecture. A thread keeps a few pixels times kDirectOutputs outputs in registers and reads its
// sources through L1; no shared memory but for the sums of the epilogue.
//
// They are the only path of float64, of architectures without mma.sync, and of shapes that the
// tensor-core kernels do not take.
#pragma once

#include "numbers.cuh"
#include "params.h"

namespace d3net::cuda::direct {

constexpr int kWarps = kDirectThreads / 32;

struct Pixel {
  int64_t n, h, w;
  bool inside;  // of the tensor: the last tile may be ragged
};

__device__ inline Pixel pixel_at(int64_t index, int64_t batch, int64_t height, int64_t width) {
  const int64_t row = index / width;
  return {row / height, row % height, index % width, index < batch * height * width};
}

__device__ inline int64_t offset_of(const View& v, int64_t n, int64_t c, int64_t h, int64_t w) {
  return n * v.stride_n + c * v.stride_c + h * v.stride_h + w * v.stride_w;
}

template <class T>
__device__ inline Accumulator<T> load(const View& v, const Pixel& at, int64_t c) {
  return widen(static_cast<const T*>(v.data)[offset_of(v, at.n, c, at.h, at.w)]);
}

template <class T>
__device__ inline void store(const View& v, const Pixel& at, int64_t c, Accumulator<T> value) {
  static_cast<T*>(v.data)[offset_of(v, at.n, c, at.h, at.w)] = narrow<T>(value);
}

/// Sums over the block of kCount values a thread holds; total[i] is valid in every thread.
template <int kCount, class A>
__device__ inline void block_sums(const A (&values)[kCount], A (*by_warp)[kCount],
                                  A (&total)[kCount]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const A sum = warp_sum(values[i]);
    if (lane == 0) by_warp[warp][i] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    total[i] = by_warp[0][i];
    for (int warp = 1; warp < kWarps; ++warp) total[i] += by_warp[warp][i];
  }
  __syncthreads();  // by_warp may be used again
}

/// A thread's pixels and its tile of outputs of one convolution.
template <class T, bool kBackward>
class Tile {
  using A = Accumulator<T>;

 public:
  __device__ explicit Tile(const Convolve& p) : p_(p), convolution_(p.convolutions) {
    const int64_t tile = blockIdx.x % p.num_tiles;
    auto tiles = [](const Convolution& c) {
      return (c.out_channels + kDirectOutputs - 1) / kDirectOutputs;
    };
    while (convolution_->first_tile + tiles(*convolution_) <= tile) ++convolution_;
    first_output_ = (tile - convolution_->first_tile) * kDirectOutputs;
    for (int i = 0; i < kDirectPixels; ++i)
      at_[i] = pixel_at(pixel_tile() * kDirectTile + i * kDirectThreads + threadIdx.x, p.batch,
                        p.height, p.width);
  }

  /// sums_ = the convolution of all its sources, source after source, tap after tap.
  __device__ void convolve() {
    const Convolution& c = *convolution_;
    int64_t channel = 0;
    for (int64_t i = 0; i < c.num_sources; ++i) {
      const Source& source = p_.sources[c.first_source + i];
      for (int64_t h = 0; h < p_.kernel_h; ++h)
        for (int64_t w = 0; w < p_.kernel_w; ++w) add_tap(source, channel, h, w);
      channel += source.channels;
    }
  }

  /// Forward: adds the bias, writes the result and, if wanted, this tile's part of the moments.
  __device__ void finish_forward() {
    const A* bias = static_cast<const A*>(p_.bias);
#pragma unroll
    for (int j = 0; j < kDirectOutputs; ++j) {
      const int64_t k = first_output_ + j;
      if (k >= convolution_->out_channels) break;
      const A b = bias ? bias[k] : A{0};
      for (int i = 0; i < kDirectPixels; ++i) {
        sums_[i][j] = widen(narrow<T>(sums_[i][j] + b));  // the moments are those of the result
        if (at_[i].inside) store<T>(convolution_->out, at_[i], k, sums_[i][j]);
      }
    }
    if (p_.partial) write_moments();
  }

  /// Backward: through psi of x, to the data gradient and, if wanted, to the sums for scale, shift.
  __device__ void finish_backward() {
    const Convolution& c = *convolution_;
    const A *scale = static_cast<const A*>(p_.scale), *shift = static_cast<const A*>(p_.shift);
    A sums[2 * kDirectOutputs] = {};
#pragma unroll
    for (int j = 0; j < kDirectOutputs; ++j) {
      const int64_t k = first_output_ + j;
      if (k >= c.out_channels) break;
      for (int i = 0; i < kDirectPixels; ++i) {
        if (!at_[i].inside) continue;
        A gradient = sums_[i][j];
        if (scale || p_.relu) {
          const A x = load<T>(c.x, at_[i], k);
          const A y = psi(x, scale, shift, c.channel + k, false);
          if (p_.relu && y <= 0) gradient = 0;
          sums[2 * j] += gradient * x;
          sums[2 * j + 1] += gradient;
        }
        if (c.out.data)
          store<T>(c.out, at_[i], k, scale ? gradient * scale[c.channel + k] : gradient);
      }
    }
    if (!p_.partial) return;
    __shared__ A by_warp[kWarps][2 * kDirectOutputs];
    A total[2 * kDirectOutputs];
    block_sums(sums, by_warp, total);
    write_partial<2>(c.channel, total);
  }

 private:
  __device__ int64_t pixel_tile() const { return blockIdx.x / p_.num_tiles; }

  __device__ void add_tap(const Source& source, int64_t channel, int64_t tap_h, int64_t tap_w) {
    const T* from[kDirectPixels];
    bool live[kDirectPixels], any = false;
    for (int i = 0; i < kDirectPixels; ++i) {
      const int64_t h = at_[i].h + (tap_h - p_.kernel_h / 2) * source.dilation_h;
      const int64_t w = at_[i].w + (tap_w - p_.kernel_w / 2) * source.dilation_w;
      live[i] = at_[i].inside && h >= 0 && h < p_.height && w >= 0 && w < p_.width;
      from[i] = static_cast<const T*>(source.x.data) + offset_of(source.x, at_[i].n, 0, h, w);
      any |= live[i];
    }
    if (!any) return;
    const int64_t padded =
        (convolution_->out_channels + kDirectOutputs - 1) / kDirectOutputs * kDirectOutputs;
    const int64_t taps = p_.kernel_h * p_.kernel_w;
    const A* weights = static_cast<const A*>(p_.weights) + convolution_->packed +
                       (channel * taps + tap_h * p_.kernel_w + tap_w) * padded + first_output_;
    for (int64_t c = 0; c < source.channels; ++c) {
      A value[kDirectPixels];
#pragma unroll
      for (int i = 0; i < kDirectPixels; ++i) {
        value[i] = A{0};
        if (!live[i]) continue;  // the padding is zero after psi
        value[i] = widen(from[i][c * source.x.stride_c]);
        if constexpr (!kBackward)
          value[i] = psi(value[i], static_cast<const A*>(p_.scale), static_cast<const A*>(p_.shift),
                         channel + c, p_.relu);
      }
#pragma unroll
      for (int j = 0; j < kDirectOutputs; ++j) {
        const A weight = weights[c * taps * padded + j];
#pragma unroll
        for (int i = 0; i < kDirectPixels; ++i) sums_[i][j] = fma(value[i], weight, sums_[i][j]);
      }
    }
  }

  /// This tile's moments, see FinishMoments.
  __device__ void write_moments() {
    __shared__ A by_warp[kWarps][kDirectOutputs];
    A sums[kDirectOutputs] = {}, rests[kDirectOutputs] = {}, squares[kDirectOutputs] = {};
    A pivots[kDirectOutputs], total_rests[kDirectOutputs], total_squares[kDirectOutputs];
    A total[4 * kDirectOutputs];
    const int64_t pixels = p_.batch * p_.height * p_.width - pixel_tile() * kDirectTile;
    const A count = static_cast<A>(pixels < kDirectTile ? pixels : kDirectTile);
#pragma unroll
    for (int j = 0; j < kDirectOutputs; ++j)
      for (int i = 0; i < kDirectPixels; ++i)
        if (at_[i].inside) sums[j] += sums_[i][j];
    block_sums(sums, by_warp, pivots);
#pragma unroll
    for (int j = 0; j < kDirectOutputs; ++j) {
      pivots[j] /= count;
      for (int i = 0; i < kDirectPixels; ++i)
        if (at_[i].inside) {
          const A distance = sums_[i][j] - pivots[j];
          rests[j] += distance;
          squares[j] = fma(distance, distance, squares[j]);
        }
    }
    block_sums(rests, by_warp, total_rests);
    block_sums(squares, by_warp, total_squares);
#pragma unroll
    for (int j = 0; j < kDirectOutputs; ++j) {
      total[4 * j] = pivots[j];
      total[4 * j + 1] = total_rests[j];
      total[4 * j + 2] = total_squares[j];
      total[4 * j + 3] = count;
    }
    write_partial<4>(0, total);
  }

  /// kCount values of every output of the tile.
  template <int kCount>
  __device__ void write_partial(int64_t channel, const A (&values)[kCount * kDirectOutputs]) {
    A* to = static_cast<A*>(p_.partial) +
            (pixel_tile() * p_.partial_channels + channel + first_output_) * kCount;
    const int64_t channels = convolution_->out_channels - first_output_;
#pragma unroll
    for (int i = 0; i < kCount * kDirectOutputs; ++i)
      if (static_cast<int>(threadIdx.x) == i && i < kCount * channels) to[i] = values[i];
  }

  const Convolve& p_;
  const Convolution* convolution_;
  int64_t first_output_;
  Pixel at_[kDirectPixels];
  A sums_[kDirectPixels][kDirectOutputs] = {};
};

template <class T>
__device__ inline void forward(const Convolve& p) {
  Tile<T, false> tile(p);
  tile.convolve();
  tile.finish_forward();
}

template <class T>
__device__ inline void backward_data(const Convolve& p) {
  Tile<T, true> tile(p);
  tile.convolve();
  tile.finish_backward();
}

/// One block: kGradientOutputs outputs, up to kGradientTaps taps of one channel, one part of the
/// rows. The last group of columns is the bias gradient, which sees ones instead of a source.
template <class T>
__device__ inline void backward_weight(const WeightGradient& p) {
  using A = Accumulator<T>;
  const int64_t taps = p.kernel_h * p.kernel_w, columns = p.in_channels * taps + 1;
  const int64_t groups_a_channel = (taps + kGradientTaps - 1) / kGradientTaps;
  const int64_t groups = p.in_channels * groups_a_channel + 1;
  const int64_t output_tiles = (p.out_channels + kGradientOutputs - 1) / kGradientOutputs;
  const int64_t group = blockIdx.x % groups, tile = blockIdx.x / groups % output_tiles;
  const int64_t part = blockIdx.x / groups / output_tiles;
  const bool is_bias = group == groups - 1;
  const int64_t channel = group / groups_a_channel;  // in_channels for the bias
  const int64_t first_tap = group % groups_a_channel * kGradientTaps;
  const int64_t first_output = tile * kGradientOutputs;

  // Which source, and where its channel starts.
  const Source* source = p.sources;
  int64_t local = channel;
  while (!is_bias && local >= source->channels) local -= source++->channels;
  const T* x = static_cast<const T*>(source->x.data) + (is_bias ? 0 : local * source->x.stride_c);
  int64_t shift_h[kGradientTaps], shift_w[kGradientTaps];
  bool wanted[kGradientTaps];
#pragma unroll
  for (int t = 0; t < kGradientTaps; ++t) {
    const int64_t tap = first_tap + t;
    wanted[t] = is_bias ? t == 0 : tap < taps;
    shift_h[t] = is_bias ? 0 : (tap / p.kernel_w - p.kernel_h / 2) * source->dilation_h;
    shift_w[t] = is_bias ? 0 : (tap % p.kernel_w - p.kernel_w / 2) * source->dilation_w;
  }

  A sums[kGradientTaps * kGradientOutputs] = {};
  const int64_t rows = p.batch * p.height;
  for (int64_t row = part * rows / p.parts; row < (part + 1) * rows / p.parts; ++row) {
    const int64_t n = row / p.height, h = row % p.height;
    for (int64_t w = threadIdx.x; w < p.width; w += kDirectThreads) {
      A value[kGradientTaps];
#pragma unroll
      for (int t = 0; t < kGradientTaps; ++t) {
        const int64_t y = h + shift_h[t], z = w + shift_w[t];
        value[t] = A{is_bias ? A{1} : A{0}};
        if (is_bias || !wanted[t] || y < 0 || y >= p.height || z < 0 || z >= p.width) continue;
        value[t] = psi(widen(x[offset_of(source->x, n, 0, y, z)]), static_cast<const A*>(p.scale),
                       static_cast<const A*>(p.shift), channel, p.relu);
      }
#pragma unroll
      for (int j = 0; j < kGradientOutputs; ++j) {
        if (first_output + j >= p.out_channels) break;
        const A gradient = load<T>(p.gradient, {n, h, w, true}, first_output + j);
#pragma unroll
        for (int t = 0; t < kGradientTaps; ++t)
          sums[t * kGradientOutputs + j] = fma(value[t], gradient, sums[t * kGradientOutputs + j]);
      }
    }
  }

  __shared__ A by_warp[kWarps][kGradientTaps * kGradientOutputs];
  A total[kGradientTaps * kGradientOutputs];
  block_sums(sums, by_warp, total);
  A* to = static_cast<A*>(p.partial) + part * p.out_channels * columns;
#pragma unroll
  for (int t = 0; t < kGradientTaps; ++t)
#pragma unroll
    for (int j = 0; j < kGradientOutputs; ++j)
      if (static_cast<int>(threadIdx.x) == t * kGradientOutputs + j && wanted[t] &&
          first_output + j < p.out_channels)
        to[(first_output + j) * columns +
           (is_bias ? columns - 1 : channel * taps + first_tap + t)] =
            total[t * kGradientOutputs + j];
}

}  // namespace d3net::cuda::direct
