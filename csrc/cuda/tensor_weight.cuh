// The weight gradient of 3x3 kernels on tensor cores, first stage: a sum over pixels a product
//
//   d weight[k, c, tap] = sum over pixels of psi(x)[c, pixel + tap * d] * gradient[k, pixel]
//
// has channels as rows, outputs as columns and pixels as its inner dimension. A block owns 16
// channels of one source, one row of taps and up to 8 * kMostTiles outputs, and walks over the
// tiles of its part of the map: psi(x) is staged as in the forward pass (tensor.cuh), the gradient
// as it lies in memory. A warp owns a row of the tile; the warps' sums are added in their order at
// the end.
#pragma once

#include "tensor.cuh"

namespace d3net::cuda::tensor {

constexpr int kGradientPitch = kWeightRows * kColumns * 2 + 16;  // bytes of an output; odd in slots

template <class T, bool kRelu>
class WeightBlock : Block<Traits<T, 1, kWeightRows, kRelu>> {
  using Tr = Traits<T, 1, kWeightRows, kRelu>;
  using Base = Block<Tr>;
  static constexpr int N = kMostTiles;
  static_assert(kWeightRows == kWarps);

 public:
  __device__ WeightBlock(const TensorWeightGradient& p, unsigned char* shared)
      : Base(p.map, shared), p_(p), job_(p.jobs[blockIdx.x % p.num_jobs]) {}

  __device__ void run() {
    const int part = blockIdx.x / p_.num_jobs;
    int tile = job_.live ? part : p_.num_tiles;
    if (tile < p_.num_tiles) stage(tile, 0);
    for (int buffer = 0; tile < p_.num_tiles; buffer ^= 1) {
      ptx::wait_for_copies();
      __syncthreads();
      const int next = tile + p_.parts;
      if (next < p_.num_tiles) load(next, buffer ^ 1);
      multiply(buffer);
      if (next < p_.num_tiles) Base::store(job_.stage, buffer ^ 1);
      tile = next;
    }
    __syncthreads();
    finish(part);
  }

 private:
  __device__ void stage(int tile, int buffer) {
    load(tile, buffer);
    Base::store(job_.stage, buffer);
  }

  /// Pixels of the source to registers, the gradient to shared memory.
  __device__ void load(int tile, int buffer) {
    Base::column_ = tile % p_.map.tiles_w * kColumns;
    Base::row_ = tile / p_.map.tiles_w % p_.map.tiles_h * kWeightRows;
    Base::n_ = tile / p_.map.tiles_w / p_.map.tiles_h;
    Base::load(job_.stage);
    // A thread copies the same four pixels of every second output.
    constexpr int vectors = kColumns / kPixelsALoad, apart = kThreads / (vectors * kWeightRows);
    const int vector = threadIdx.x % vectors, y = threadIdx.x / vectors % kWeightRows;
    const int first = threadIdx.x / (vectors * kWeightRows);
    const int h = Base::row_ + y, w = Base::column_ + vector * kPixelsALoad;
    const bool inside = h < p_.map.height && w < p_.map.width;
    const T* from = static_cast<const T*>(p_.gradient.data);
    if (inside) from += direct::offset_of(p_.gradient, Base::n_, job_.first_output + first, h, w);
    uint32_t to = gradient_buffer(buffer) + first * kGradientPitch +
                  (y * kColumns + vector * kPixelsALoad) * 2;
    for (int k = first; k < 8 * tiles(); k += apart) {
      const bool there = inside && k < job_.outputs;
      ptx::copy_async_8(to, there ? from : p_.gradient.data, there ? 8 : 0);
      from += apart * p_.gradient.stride_c;
      to += apart * kGradientPitch;
    }
    ptx::commit_copies();
  }

  /// Of 8 outputs; those beyond are skipped.
  __device__ int tiles() const { return (job_.outputs + 7) / 8; }

  __device__ uint32_t gradient_buffer(int buffer) const {
    return Base::base_ + 2 * Tr::kStageBytes + buffer * 8 * N * kGradientPitch;
  }

  __device__ void multiply(int buffer) {
    const Stage& s = p_.map.stages[job_.stage];
    with_kind<Tr>(s.kind, [&](auto k) {
      if constexpr (Tr::kKinds.kind[k.value].taps != Taps::all)
        multiply<k.value>(s.dilation, buffer);
    });
  }

  template <int kKind>
  __device__ void multiply(int dilation, int buffer) {
    constexpr Kind kind = Tr::kKinds.kind[kKind];
    constexpr int taps = kind.taps == Taps::row ? 3 : 1;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, used = tiles();
    // Matrices of a fragment of psi(x): {channels low, high} x {pixels low, high}, transposed.
    const uint32_t pixels = Base::base_ + buffer * Tr::kStageBytes +
                            (lane / 8 % 2 * kind.half_pitch + warp * kind.row_pitch + kind.halo +
                             lane / 16 * 8 + lane % 8) *
                                16;
    // Of the gradient: {pixels low, high} x {outputs of two tiles}.
    const uint32_t gradient = gradient_buffer(buffer) +
                              (lane / 16 * 8 + lane % 8) * kGradientPitch +
                              (warp * kColumns + lane / 8 % 2 * 8) * 2;
#pragma unroll
    for (int step = 0; step < kColumns / 16; ++step) {
      uint32_t b[N + 1][2];
#pragma unroll
      for (int j = 0; j < N; j += 2) {
        if (j >= used) break;
        uint32_t two_tiles[4];
        const uint32_t at = gradient + j * 8 * kGradientPitch + step * 32;
        if (j + 1 < N)
          ptx::load_matrices(two_tiles, at);
        else
          ptx::load_two_matrices(two_tiles[0], two_tiles[1], at);
        b[j][0] = two_tiles[0], b[j][1] = two_tiles[1];
        if (j + 1 < N) b[j + 1][0] = two_tiles[2], b[j + 1][1] = two_tiles[3];
      }
#pragma unroll
      for (int tap = 0; tap < taps; ++tap) {
        uint32_t a[4];
        ptx::load_matrices_transposed(
            a, pixels + (step * 16 + (taps == 1 ? 0 : (tap - 1) * dilation)) * 16);
#pragma unroll
        for (int j = 0; j < N; ++j)
          if (j < used) ptx::mma_k16<T>(sums_[tap][j], a, b[j]);
      }
      if (!job_.bias) continue;
      const uint32_t one = __is_same(T, bfloat16) ? 0x3f803f80u : 0x3c003c00u;
      const uint32_t ones[4] = {one, one, one, one};
#pragma unroll
      for (int j = 0; j < N; ++j)
        if (j < used) ptx::mma_k16<T>(sums_[3][j], ones, b[j]);
    }
  }

  /// Adds the warps' sums and writes this part: columns (channel, tap), and the bias as the last.
  __device__ void finish(int part) {
    constexpr int rows = 4 * 16, pitch = 8 * N;  // rows: three taps and the bias, 16 channels each
    float* staged = reinterpret_cast<float*>(Base::shared_);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int tap = 0; tap < 4; ++tap)
#pragma unroll
      for (int j = 0; j < N; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          staged[(warp * rows + tap * 16 + lane / 4 + e / 2 * 8) * pitch + j * 8 + lane % 4 * 2 +
                 e % 2] = sums_[tap][j][e];
    __syncthreads();
    const int channels = p_.map.stages[job_.stage].channels;
    for (int i = threadIdx.x; i < rows * pitch; i += kThreads) {
      const int k = i % pitch, channel = i / pitch % 16, tap = i / pitch / 16;
      const bool is_bias = tap == 3;
      if (k >= job_.outputs ||
          (is_bias ? !job_.bias || channel > 0 : channel >= channels || tap >= job_.taps))
        continue;
      float sum = staged[i];
      for (int other = 1; other < kWarps; ++other) sum += staged[other * rows * pitch + i];
      const int64_t column =
          is_bias ? p_.columns - 1 : job_.first_column + static_cast<int64_t>(channel) * 9 + tap;
      p_.partial[(static_cast<int64_t>(part) * p_.outputs + job_.first_output + k) * p_.columns +
                 column] = sum;
    }
  }

  const TensorWeightGradient& p_;
  const WeightJob& job_;
  float sums_[4][N][4] = {};  // three taps and the bias; channels lane / 4 and + 8
};

template <class T, bool kRelu>
__device__ inline void backward_weight(const TensorWeightGradient& p, unsigned char* shared) {
  WeightBlock<T, kRelu> block(p, shared);
  block.run();
}

}  // namespace d3net::cuda::tensor
