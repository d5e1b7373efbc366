// The weight gradient of 3x3 kernels on tensor cores, first stage: a sum over pixels a product
//
//   d weight[k, c, tap] = sum over pixels of psi(x)[c, pixel + tap * d] * gradient[k, pixel]
//
// has channels as rows, outputs as columns and pixels as its inner dimension. A block owns 16
// channels of one source, their three rows of taps and up to 8 * kMostTiles outputs, and walks down
// its part of the map in steps of the dilation: a row of psi(x) is staged once and stays for the
// three rows of the gradient that it meets; the gradient is staged by outputs. A warp owns a row of
// taps and a row of the step. 16 bits are staged as in the forward pass (tensor.cuh), float32 by
// channels (geometry.h says why); the gradient of the bias is not rounded to TF32.
//
// Rows of taps that meet padding are left out. An infinity or a NaN of the gradient therefore stays
// out of them, while plain torch multiplies it with the padding's zeros and makes NaN.
#pragma once

#include "tensor.cuh"

namespace d3net::cuda::tensor {

template <class T, bool kRelu>
class WeightBlock {
  static constexpr int kElement = sizeof(T);  // bytes
  static constexpr bool kIsFloat = kElement == 4;
  static constexpr int N = kMostTiles, kRows = weight_rows(kElement);
  static constexpr int kRing = ring_rows(kElement), kGradientPitch = gradient_pitch(kElement);
  static constexpr int kRingBytes = ring_bytes(kElement);
  static constexpr int kWarps = weight_warps(kElement);
  // Threads that stage the source, the first of a block, and that copy the gradient, the last.
  static constexpr int kStaging = 96;
  static_assert(kStaging == kRingColumns / kPixelsALoad * (kWeightChunk / kSlot<T>)*kRows);
  static constexpr int kInner = kIsFloat ? 8 : 16;  // pixels of a product

 public:
  __device__ WeightBlock(const TensorWeightGradient& p, unsigned char* shared)
      : p_(p),
        job_(p.jobs[blockIdx.x % p.num_jobs]),
        shared_(shared),
        ring_(ptx::shared_address(shared)) {}

  __device__ void run() {
    const int part = blockIdx.x / p_.num_jobs;
    const int64_t walks = int64_t{p_.batch} * p_.tiles_w * job_.remainders;
    const int64_t steps = job_.live ? walks * job_.steps : 0;
    const int64_t end = (part + 1) * steps / p_.parts;
    for (int64_t at = part * steps / p_.parts; at < end;) {
      const int first = take_walk(at);
      const int last = static_cast<int>(min(end - at, int64_t{job_.steps - first})) + first;
      walk(first, last);
      at += last - first;
    }
    finish(part);
  }

 private:
  /// The walk of that step of the block's job; returns the step's place in it.
  __device__ int take_walk(int64_t at) {
    int64_t walk = at / job_.steps;
    first_row_ = static_cast<int>(walk % job_.remainders) * kRows;
    walk /= job_.remainders;
    column_ = static_cast<int>(walk % p_.tiles_w) * kColumns;
    n_ = static_cast<int>(walk / p_.tiles_w);
    return static_cast<int>(at % job_.steps);
  }

  __device__ void walk(int first, int last) {
    for (int i = first - 1; i <= first + 1; ++i) {
      load(i);
      store(i);
    }
    copy_gradient(first);
    for (int i = first; i < last; ++i) {
      ptx::wait_for_copies();
      __syncthreads();
      if (i + 1 < last) {
        copy_gradient(i + 1);
        load(i + 2);
      }
      multiply(i);
      if (i + 1 < last) store(i + 2);
    }
    __syncthreads();  // the next walk begins with other rows
  }

  /// The row of the map, or -1 where a step has none: outside, or of another remainder.
  __device__ int map_row(int step, int row) const {
    const int h = first_row_ + row + step * job_.stride;
    return step >= 0 && first_row_ + row < job_.stride && h < p_.height ? h : -1;
  }

  // What of the source a thread stages: kPixelsALoad pixels of a slot's channels. 16 bits: threads
  // are {vector parity, half, row} as in tensor.cuh, then pairs of vectors. float32: neighbours are
  // vectors of a row, which they store as they lie.
  static constexpr int kVectors = kRingColumns / kPixelsALoad;
  __device__ static int staged_slot() {
    return kIsFloat ? threadIdx.x / kVectors : threadIdx.x >> 1 & 1;
  }
  __device__ static int staged_row() { return kIsFloat ? 0 : threadIdx.x >> 2 & 1; }
  __device__ static int staged_column() {
    const int vector = kIsFloat ? threadIdx.x % kVectors : threadIdx.x / 8 * 2 + (threadIdx.x & 1);
    return vector * kPixelsALoad;
  }
  __device__ bool stages() const {
    return threadIdx.x < kStaging && staged_column() < job_.columns &&
           kSlot<T> * staged_slot() < job_.channels;
  }

  /// A step's pixels of the source to registers.
  __device__ void load(int step) {
    const int h = map_row(step, staged_row());
    const int w = column_ + job_.column + staged_column();
    there_ = stages() && h >= 0;
    inside_ = 0;
    if (!there_) return;
    const int first = kSlot<T> * staged_slot(), channels = job_.channels - first;
    const T* from = static_cast<const T*>(job_.data) + n_ * job_.stride_n + first * job_.stride_c +
                    h * job_.stride_h + w * job_.stride_w;
    if (job_.access != Access::rows) {
      inside_ = pixels_inside(w, p_.width);
      load_elements(raw_, from, job_.access, job_.stride_c, job_.stride_w, channels, inside_);
    } else if (lies_in(w, p_.width)) {
      inside_ = kAllInside;
      load_rows(raw_, from, job_.stride_c, channels);
    }
  }

  /// psi of the registers to the ring.
  __device__ void store(int step) {
    if (!there_) return;
    HalfPsi<T> psi;  // loaded anew: the registers do not hold it beside the sums
    const int slot = staged_slot(), row = (kRows * step + staged_row()) & (kRing - 1);
    const bool by_pixels = job_.access == Access::pixels;
    if constexpr (kIsFloat) {
      psi.load(p_.coefficients, job_.chunk, slot);
      const int channel = row * kWeightChunk + kSlot<T> * slot;
      store_channels<kRelu>(ring_ + (channel * kRingChannel + staged_column()) * 4,
                            kRingChannel * 4, raw_, by_pixels, psi, inside_);
    } else {
      if (by_pixels) pixels_to_rows<T>(raw_);
      psi.load(p_.coefficients, job_.chunk, slot);
      const uint32_t to = ring_ + (slot * kRingHalf + row * kRingPitch + staged_column()) * 16;
      if (inside_)
        store_pixels<T, kRelu ? Prologue::affine_relu : Prologue::affine>(to, raw_, psi);
      else
        store_zeros(to);
      if (job_.access != Access::rows) store_zeros_outside(to, inside_);
    }
  }

  __device__ uint32_t gradient_buffer(int step) const {
    return ring_ + kRingBytes + (step & 1) * 8 * N * kGradientPitch;
  }

  /// The number of a thread among those that copy; below 0 where it does not.
  __device__ static int copier() { return ptx::thread_anew() - (32 * kWarps - kStaging); }

  /// A step's rows of the gradient to shared memory, zeros right of the map. What is missing from
  /// the last tile of 8 outputs stays as it is: nobody reads its sums.
  __device__ void copy_gradient(int step) const {
    if (copier() >= 0) {
      if (p_.access == Access::any)
        copy_gradient_elements(step);
      else if (p_.access == Access::pixels)
        copy_gradient_pixels(step);
      else if (kIsFloat || p_.wide_loads)
        copy_gradient<16>(step);
      else
        copy_gradient<8>(step);
    }
    ptx::commit_copies();
  }
  /// Neighbours in memory by neighbouring threads.
  __device__ void copy_gradient_elements(int step) const {
    constexpr int pixels = kRows * kColumns;
    const View& g = p_.gradient;
    const bool channels_inside = g.stride_c < g.stride_w;
    const uint32_t to = gradient_buffer(step) - ring_;
    for (int i = copier(); i < job_.outputs * pixels; i += kStaging) {
      const int k = channels_inside ? i % job_.outputs : i / pixels;
      const int pixel = channels_inside ? i / job_.outputs : i % pixels;
      const int h = map_row(step, pixel / kColumns), w = column_ + pixel % kColumns;
      if (h < 0) continue;
      T value = narrow<T>(0.f);
      if (w < p_.width)
        value =
            static_cast<const T*>(g.data)[direct::offset_of(g, n_, job_.first_output + k, h, w)];
      *reinterpret_cast<T*>(shared_ + to + k * kGradientPitch + pixel * kElement) = value;
    }
  }
  /// Squares of four pixels by four outputs: of a warp eight along the row by four, so that loads
  /// take whole sectors and each half's stores touch every bank once.
  __device__ void copy_gradient_pixels(int step) const {
    constexpr unsigned across = kColumns / kPixelsALoad / 8;  // warps that a row takes
    const View& g = p_.gradient;
    const unsigned lane = copier() % 32, fours = (job_.outputs + 15) / 16;
#pragma unroll 2  // without it ptxas spills a register on sm_90
    for (unsigned i = copier() / 32; i < across * kRows * fours; i += kStaging / 32) {
      const int row = i / across % kRows, output = (i / (across * kRows) * 4 + lane / 8) * 4;
      const int column = (i % across * 8 + lane % 8) * kPixelsALoad, w = column_ + column;
      const int h = map_row(step, row);
      if (h < 0 || output >= job_.outputs) continue;
      const T* from = static_cast<const T*>(g.data) +
                      direct::offset_of(g, n_, job_.first_output + output, h, w);
      Four<T> square[4];
#pragma unroll
      for (int e = 0; e < kPixelsALoad; ++e, from += g.stride_w)
        square[e] = w + e < p_.width ? __ldg(reinterpret_cast<const Four<T>*>(from)) : Four<T>{};
      transpose<T>(square);
      const uint32_t to = gradient_buffer(step) - ring_ + output * kGradientPitch +
                          (row * kColumns + column) * kElement;
#pragma unroll
      for (int k = 0; k < 4; ++k)
        *reinterpret_cast<Four<T>*>(shared_ + to + k * kGradientPitch) = square[k];
    }
  }
  template <int kBytes>
  __device__ void copy_gradient(int step) const {
    constexpr int pixels = kBytes / kElement, vectors = kColumns / pixels;
    constexpr int apart = kStaging / (vectors * kRows);
    const int t = copier(), vector = t % vectors, row = t / vectors % kRows;
    const int first = t / (vectors * kRows);
    const int h = map_row(step, row), w = column_ + vector * pixels;
    if (h < 0) return;
    const View& g = p_.gradient;
    // Where nothing is read the address does not count.
    const int bytes = w < p_.width ? kBytes : 0;
    const char* from =
        static_cast<const char*>(g.data) +
        (n_ * g.stride_n + (job_.first_output + first) * g.stride_c + h * g.stride_h + w) *
            kElement;
    uint32_t to = gradient_buffer(step) + first * kGradientPitch + row * kColumns * kElement +
                  vector * kBytes;
    const int64_t step_bytes = apart * g.stride_c * kElement;
#pragma unroll 4
    for (int k = first; k < job_.outputs; k += apart) {
      if constexpr (kBytes == 16)
        ptx::copy_async_16(to, from, bytes);
      else
        ptx::copy_async_8(to, from, bytes);
      from += step_bytes;
      to += apart * kGradientPitch;
    }
  }

  /// sums_ += the step's rows of the gradient times the rows of psi(x) under the row of taps.
  __device__ void multiply(int step) {
    const int warp = threadIdx.x / 32, tap_row = warp / kRows - 1, row = warp % kRows;
    const int h = map_row(step, row), x_row = h + tap_row * job_.row_dilation;
    if (h < 0 || x_row < 0 || x_row >= p_.height) return;
    if (tap_row != 0 && job_.row_dilation == 0) return;
    const int in_ring =
        (kRows * step + row + tap_row * min(job_.row_dilation, kRows)) & (kRing - 1);
    const int lane = threadIdx.x % 32, first = job_.taps == 1 ? 0 : -job_.column;
    uint32_t pixels = ring_;
    if constexpr (kIsFloat)  // the lane's first element of a fragment of psi(x)
      pixels += ((in_ring * kWeightChunk + lane / 4) * kRingChannel + first + lane % 4) * 4;
    else  // its row of the matrices {channels low, high} x {pixels low, high}, transposed
      pixels +=
          (lane / 8 % 2 * kRingHalf + in_ring * kRingPitch + first + lane / 16 * 8 + lane % 8) * 16;
    // Of the gradient: {pixels low, high} x {outputs of two tiles}.
    const uint32_t gradient = gradient_buffer(step) + (lane / 16 * 8 + lane % 8) * kGradientPitch +
                              row * kColumns * kElement + lane / 8 % 2 * 16;
    with_number<N>((job_.outputs + 7) / 8 - 1, [&](auto last) {
      constexpr int tiles = last.value + 1;
      if (job_.taps == 1)
        multiply<tiles, 1>(pixels, gradient);
      else
        multiply<tiles, 3>(pixels, gradient);
      if (job_.bias && tap_row == 0) add_to_bias<tiles>(gradient);
    });
  }

  template <int kTiles, int kTaps>
  __device__ void multiply(uint32_t pixels, uint32_t gradient) {
    const int columns = min(p_.width - column_, kColumns);
    const auto nothing = [](uint32_t (&)[4]) {};
    constexpr int apart = kIsFloat ? 32 : 256;  // bytes of psi(x) that the pixels of a product take
#pragma unroll
    for (int step = 0; step < kColumns / kInner; ++step)
      if ((step + 1) * kInner <= columns)
        multiply_some<kTiles, kTaps>(pixels + step * apart, gradient + step * 32, nothing);
    if (columns % kInner == 0) return;
    // Right of the map the gradient is zero, which would make NaN of an infinity of psi(x).
    constexpr int in_word = 4 / kElement;
    const int step = columns / kInner;
    const int first = columns % kInner - static_cast<int>(threadIdx.x % 4) * in_word;
    const uint32_t low = live_pixels(first), high = live_pixels(first - kInner / 2);
    multiply_some<kTiles, kTaps>(
        pixels + step * apart, gradient + step * 32,
        [&](uint32_t (&a)[4]) { a[0] &= low, a[1] &= low, a[2] &= high, a[3] &= high; });
  }

  /// A mask of a word's pixels, two of 16 bits or one, of which the first `count` are on the map.
  __device__ static uint32_t live_pixels(int count) {
    return count >= static_cast<int>(4 / kElement) ? ~0u : count == 1 ? 0xffffu : 0u;
  }

  /// The pixels of a product, in a row; `mask` takes the fragments of psi(x).
  template <int kTiles, int kTaps, class Mask>
  __device__ void multiply_some(uint32_t pixels, uint32_t gradient, Mask&& mask) {
    uint32_t b[kTiles + 1][2];
    load_gradient<kTiles>(b, gradient);
    if constexpr (kIsFloat) {
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i)
        b[i / 2][i % 2] = ptx::to_tf32<false>(__uint_as_float(b[i / 2][i % 2]));
    }
    const int d = job_.dilation * (kIsFloat ? 4 : 16);
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      uint32_t a[4];
      load_psi(a, pixels + (kTaps == 1 ? 0 : (tap - 1) * d));
      mask(a);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) ptx::mma<T>(sums_[tap][j], a, b[j]);
    }
  }

  /// A fragment of psi(x): {channels low, high} x {pixels low, high}.
  __device__ static void load_psi(uint32_t (&a)[4], uint32_t at) {
    if constexpr (kIsFloat) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[i] = ptx::load_word(at + i % 2 * 8 * kRingChannel * 4 + i / 2 * kInner / 2 * 4);
    } else {
      ptx::load_matrices_transposed(a, at);
    }
  }

  /// The first column of sums_[3] holds the sums: of float32 a quarter in each of four lanes.
  template <int kTiles>
  __device__ void add_to_bias(uint32_t gradient) {
    const uint32_t one = __is_same(T, bfloat16) ? 0x3f803f80u : 0x3c003c00u;
    const uint32_t ones[4] = {one, one, one, one};
    for (int step = 0; step < kColumns / kInner; ++step) {
      uint32_t b[kTiles + 1][2];
      load_gradient<kTiles>(b, gradient + step * 32);
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        if constexpr (kIsFloat)
          sums_[3][j][0] += __uint_as_float(b[j][0]) + __uint_as_float(b[j][1]);
        else
          ptx::mma<T>(sums_[3][j], ones, b[j]);
    }
  }

  /// Fragments of a product's pixels of the gradient; kTiles tiles of 8 outputs.
  template <int kTiles>
  __device__ static void load_gradient(uint32_t (&b)[kTiles + 1][2], uint32_t at) {
#pragma unroll
    for (int j = 0; j + 1 < kTiles; j += 2) {
      uint32_t two_tiles[4];
      ptx::load_matrices(two_tiles, at + j * 8 * kGradientPitch);
      b[j][0] = two_tiles[0], b[j][1] = two_tiles[1];
      b[j + 1][0] = two_tiles[2], b[j + 1][1] = two_tiles[3];
    }
    if (kTiles % 2)
      ptx::load_two_matrices(b[kTiles - 1][0], b[kTiles - 1][1],
                             at + (kTiles - 1) * 8 * kGradientPitch);
  }

  /// Adds the sums of the rows of a step and writes this part: for an output, the channels' taps
  /// are neighbours in shared memory as in the result.
  __device__ void finish(int part) {
    constexpr int pitch = kSumsPitch;
    float* staged = reinterpret_cast<float*>(shared_);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int tap_row = warp / kRows, taps = job_.taps;
    for (int row = 0; row < kRows; ++row) {
      __syncthreads();
      if (warp % kRows != row) continue;
      auto add = [&](int at, float v) { staged[at] = row == 0 ? v : staged[at] + v; };
#pragma unroll
      for (int j = 0; j < N; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int k = j * 8 + lane % 4 * 2 + e % 2, channel = lane / 4 + e / 2 * 8;
#pragma unroll
          for (int tap = 0; tap < 3; ++tap)
            if (tap < taps) add(k * pitch + (channel * 3 + tap_row) * taps + tap, sums_[tap][j][e]);
          if (!kIsFloat && tap_row == 1 && channel == 0) add(k * pitch + pitch - 1, sums_[3][j][e]);
        }
      if (kIsFloat && tap_row == 1) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
          float sum = sums_[3][j][0];
          sum += __shfl_xor_sync(~0u, sum, 1);
          sum += __shfl_xor_sync(~0u, sum, 2);
          if (lane % 4 == 0) add((j * 8 + lane / 4) * pitch + pitch - 1, sum);
        }
      }
    }
    __syncthreads();
    float* to =
        p_.partial + (static_cast<int64_t>(part) * p_.outputs + job_.first_output) * p_.columns;
    const int values = job_.channels * 3 * taps;
    for (int k = warp; k < job_.outputs; k += kWarps) {
      float* row = to + k * p_.columns;
      for (int i = lane; i < values; i += 32)
        row[job_.first_column + (taps == 3 ? i : i * 3)] = staged[k * pitch + i];
      if (job_.bias && lane == 0) row[p_.columns - 1] = staged[k * pitch + pitch - 1];
    }
  }

  const TensorWeightGradient& p_;
  const WeightJob job_;
  unsigned char* shared_;
  uint32_t ring_;
  Four<T> raw_[kSlot<T>];
  bool there_ = false;
  uint32_t inside_ = 0;  // a bit a pixel
  int n_ = 0, column_ = 0, first_row_ = 0;
  float sums_[4][N][4] = {};  // three taps and the bias; channels lane / 4 and + 8
};

template <class T, bool kRelu>
__device__ inline void backward_weight(const TensorWeightGradient& p, unsigned char* shared) {
  WeightBlock<T, kRelu> block(p, shared);
  block.run();
}

}  // namespace d3net::cuda::tensor
