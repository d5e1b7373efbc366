// The tensor-core convolution for 3x3 kernels on 16-bit maps in NCHW, forward and data gradient.
//
// An implicit GEMM with pixels as rows (a warp owns 16 columns of the tile) and outputs as columns,
// rounded up to 8. psi(x) is staged transposed, [half of 16 channels][row][column] in slots of
// 8 channels: any tap is then a shift of the address, and a fragment once loaded serves every row
// of outputs whose tap it is (Taps::all). Two buffers: while a stage is multiplied, the next one's
// pixels come to registers and its weights to shared memory; one barrier a stage.
//
// Bank conflicts: lanes of a store are {vector parity, half, row parity} and the pitches are
// 2 (row) and 1 (half) slots modulo 8, so eight lanes touch eight different slots modulo 8.
// ldmatrix reads 8 neighbouring slots at any shift.
#pragma once

#include <utility>

#include "direct.cuh"
#include "geometry.h"
#include "ptx.cuh"

namespace d3net::cuda::tensor {

constexpr int kThreads = 32 * kWarps;

/// What the staged pixels pass through.
enum class Prologue { none, affine, affine_relu };

/// The numbers of one kernel: kTiles x 8 outputs, kRows rows.
template <class T_, int kTiles_, int kRows_, Prologue kPrologue_>
struct Traits {
  using T = T_;
  static constexpr int kTiles = kTiles_, kRows = kRows_;
  static constexpr Prologue kPrologue = kPrologue_;
  static constexpr Kinds kKinds = kinds_of(kRows);
  static constexpr int kStageBytes = 16 * most_slots(kRows);
  static constexpr int kTapSlots = tap_slots(kTiles);
  static constexpr int kWeightBytes = 16 * 9 * kTapSlots;
  static_assert(kTiles <= kMostTiles, "plan.h splits more outputs into several jobs");
};

/// Calls f with the number, below kCount, as a compile-time constant.
template <class F, int... I>
__device__ inline void with_number(int number, F&& f, std::integer_sequence<int, I...>) {
  (void)((number == I && (f(std::integral_constant<int, I>{}), true)) || ...);
}
template <int kCount, class F>
__device__ inline void with_number(int number, F&& f) {
  with_number(number, f, std::make_integer_sequence<int, kCount>{});
}

/// psi's coefficients of half a chunk.
struct HalfPsi {
  float scale[8], shift[8];

  __device__ void load(const float* coefficients, int chunk, int half) {
    const float4* from = reinterpret_cast<const float4*>(coefficients + (chunk * 2 + half) * 16);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 a = __ldg(from + i), b = __ldg(from + 2 + i);
      scale[4 * i] = a.x, scale[4 * i + 1] = a.y, scale[4 * i + 2] = a.z, scale[4 * i + 3] = a.w;
      shift[4 * i] = b.x, shift[4 * i + 1] = b.y, shift[4 * i + 2] = b.z, shift[4 * i + 3] = b.w;
    }
  }
};

/// Pixel i of four neighbours.
template <class T>
__device__ inline float element(const uint2& four, int i) {
  const uint32_t two = i < 2 ? four.x : four.y;
  if constexpr (__is_same(T, bfloat16))
    return __uint_as_float(i % 2 ? two & 0xffff0000u : two << 16);
  else
    return __half2float(__ushort_as_half(static_cast<unsigned short>(i % 2 ? two >> 16 : two)));
}

/// Four neighbours of up to 8 channels; zeros for channels that are not there.
template <class T>
__device__ inline void load_pixels(uint2 (&raw)[8], const T* from, int64_t stride_c, int channels) {
#pragma unroll
  for (int c = 0; c < 8; ++c, from += stride_c)
    raw[c] = c < channels ? __ldg(reinterpret_cast<const uint2*>(from)) : uint2{0, 0};
}

/// psi of four neighbours of 8 channels to their slots: transposed.
template <class T, Prologue kPrologue>
__device__ inline void store_pixels(uint32_t to, const uint2 (&raw)[8], const HalfPsi& psi) {
#pragma unroll
  for (int pixel = 0; pixel < kPixelsALoad; ++pixel) {
    uint32_t slot[4];
#pragma unroll
    for (int c = 0; c < 8; c += 2) {
      if constexpr (kPrologue == Prologue::none) {
        const uint32_t low = pixel < 2 ? raw[c].x : raw[c].y;
        const uint32_t high = pixel < 2 ? raw[c + 1].x : raw[c + 1].y;
        slot[c / 2] = pixel % 2 ? ptx::high_halves(low, high) : ptx::low_halves(low, high);
      } else {
        slot[c / 2] = ptx::pack_two<T, kPrologue == Prologue::affine_relu>(
            fmaf(element<T>(raw[c], pixel), psi.scale[c], psi.shift[c]),
            fmaf(element<T>(raw[c + 1], pixel), psi.scale[c + 1], psi.shift[c + 1]));
      }
    }
    ptx::store_16_bytes(to + pixel * 16, slot);
  }
}

__device__ inline void store_zeros(uint32_t to) {
#pragma unroll
  for (int pixel = 0; pixel < kPixelsALoad; ++pixel)
    ptx::store_16_bytes(to + pixel * 16, {0, 0, 0, 0});
}

template <class Tr>
class Block {
  using T = typename Tr::T;
  static constexpr int R = Tr::kRows, N = Tr::kTiles;

 public:
  __device__ Block(const TensorConvolve& p, unsigned char* shared)
      : p_(p), shared_(shared), base_(ptx::shared_address(shared)) {}

  /// This block's job and tile, by its number.
  __device__ void take_job() {
    int tile = blockIdx.x / p_.num_jobs;
    job_ = p_.jobs + blockIdx.x % p_.num_jobs;
    column_ = tile % p_.tiles_w * kColumns;
    tile /= p_.tiles_w;
    row_ = tile % p_.tiles_h * R;
    n_ = tile / p_.tiles_h;
  }

  __device__ void convolve() {
    const int end = job_->first_stage + job_->num_stages;
    int stage = next_live(job_->first_stage);
    load(stage);
    copy_weights(stage, 0);
    store(stage, 0);
    for (int buffer = 0; stage < end; buffer ^= 1) {
      ptx::wait_for_copies();
      __syncthreads();
      const int next = next_live(stage + 1);
      if (next < end) {
        load(next);
        copy_weights(next, buffer ^ 1);
      }
      multiply(stage, buffer);
      if (next < end) store(next, buffer ^ 1);
      stage = next;
    }
    __syncthreads();  // the epilogue uses the buffers again
  }

  __device__ void finish_forward();
  __device__ void finish_backward();

 private:
  struct Unit {  // kPixelsALoad pixels of one row that a thread loads, and their slot
    int row, column, slot;
    bool there;
  };

  template <int kKind>
  __device__ static Unit unit(int pass) {
    constexpr Kind kind = Tr::kKinds.kind[kKind];
    constexpr int pairs = kind.columns / (2 * kPixelsALoad), row_pairs = (kind.rows + 1) / 2;
    static_assert(kPrefetch * kThreads / 8 >= pairs * row_pairs, "does not fit the registers");
    const int t = threadIdx.x, i = t / 8 + pass * (kThreads / 8);
    const int row = i / pairs * 2 + (t >> 2 & 1);
    const int column = (i % pairs * 2 + (t & 1)) * kPixelsALoad;
    return {row, column, (t >> 1 & 1) * kind.half_pitch + row * kind.row_pitch + column,
            i < pairs * row_pairs && row < kind.rows};
  }

  /// The first stage from `stage` on that sees something of the map.
  __device__ int next_live(int stage) const {
    const int end = job_->first_stage + job_->num_stages;
    for (; stage < end; ++stage) {
      const Stage& s = p_.stages[stage];
      const int row = row_ + s.row, column = column_ + s.column;
      if (row + s.rows > 0 && row < p_.height && column + s.columns > 0 && column < p_.width) break;
    }
    return stage;
  }

  template <class F>
  __device__ static void with_kind(int number, F&& f) {
    with_number<Tr::kKinds.count>(number, f);
  }

  /// Pixels to registers.
  __device__ void load(int stage) {
    const Stage s = p_.stages[stage];
    const int half = threadIdx.x >> 1 & 1, channels = s.channels - 8 * half;
    const T* from = static_cast<const T*>(s.data) + n_ * s.stride_n + 8 * half * s.stride_c +
                    (row_ + s.row) * s.stride_h + column_ + s.column;
    with_kind(s.kind, [&](auto k) {
#pragma unroll
      for (int pass = 0; pass < kPrefetch; ++pass) {
        const Unit u = unit<k.value>(pass);
        const int h = row_ + s.row + u.row, w = column_ + s.column + u.column;
        inside_[pass] = u.there && h >= 0 && h < p_.height && w >= 0 && w < p_.width;
        if (!inside_[pass]) continue;
        const T* pixels = from + u.row * s.stride_h + u.column;
        if (channels >= 8)
          load_pixels(raw_[pass], pixels, s.stride_c, 8);
        else
          load_pixels(raw_[pass], pixels, s.stride_c, channels);
      }
    });
  }

  /// psi of the registers to a buffer; zeros outside of the map, after psi.
  __device__ void store(int stage, int buffer) {
    const Stage& s = p_.stages[stage];
    const int half = threadIdx.x >> 1 & 1;
    if (s.channels <= 8 * half) return;  // multiply() does not read that half
    HalfPsi psi;
    if constexpr (Tr::kPrologue != Prologue::none) psi.load(p_.coefficients, s.chunk, half);
    with_kind(s.kind, [&](auto k) {
#pragma unroll
      for (int pass = 0; pass < kPrefetch; ++pass) {
        const Unit u = unit<k.value>(pass);
        if (!u.there) continue;
        const uint32_t to = base_ + buffer * Tr::kStageBytes + u.slot * 16;
        if (inside_[pass])
          store_pixels<T, Tr::kPrologue>(to, raw_[pass], psi);
        else
          store_zeros(to);
      }
    });
  }

  __device__ uint32_t weight_buffer(int buffer) const {
    return base_ + 2 * Tr::kStageBytes + buffer * Tr::kWeightBytes;
  }

  __device__ void copy_weights(int stage, int buffer) const {
    const Stage& s = p_.stages[stage];
    int slots = 0;
    with_kind(s.kind, [&](auto k) {
      constexpr Taps taps = Tr::kKinds.kind[k.value].taps;
      slots = Tr::kTapSlots * (taps == Taps::all ? 9 : taps == Taps::row ? 3 : 1);
    });
    const uint4* from = static_cast<const uint4*>(p_.weights) + s.weights + threadIdx.x;
    uint32_t to = weight_buffer(buffer) + threadIdx.x * 16;
    for (int i = threadIdx.x; i < slots; i += kThreads) {
      ptx::copy_async_16(to, from);
      from += kThreads, to += kThreads * 16;
    }
    ptx::commit_copies();
  }

  __device__ void multiply(int stage, int buffer) {
    const Stage s = p_.stages[stage];
    with_kind(s.kind, [&](auto k) {
      if (s.channels > 8)
        multiply<k.value, false>(s.dilation, buffer);
      else
        multiply<k.value, true>(s.dilation, buffer);
    });
  }

  /// sums_ += the staged rows times their taps. kHalf: up to 8 channels.
  template <int kKind, bool kHalf>
  __device__ void multiply(int dilation, int buffer) {
    constexpr Kind kind = Tr::kKinds.kind[kKind];
    constexpr int tap_rows = kind.taps == Taps::all ? 3 : 1;
    constexpr int tap_columns = kind.taps == Taps::one ? 1 : 3;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int d = kind.taps == Taps::all ? kind.dilation : dilation;
    const uint32_t pixels =
        base_ + buffer * Tr::kStageBytes +
        ((kHalf ? 0 : lane / 16 * kind.half_pitch) + warp * 16 + kind.halo + lane % 16) * 16;
    const uint32_t weights =
        weight_buffer(buffer) + ((lane / 8 % 2) * 8 * N + lane / 16 * 8 + lane % 8) * 16;
#pragma unroll
    for (int column = 0; column < tap_columns; ++column) {
      uint32_t b[tap_rows][N + 1][2];
#pragma unroll
      for (int row = 0; row < tap_rows; ++row) {
        if (!tap_row_counts<kKind>(row)) continue;
        const uint32_t tap = weights + (row * tap_columns + column) * Tr::kTapSlots * 16;
#pragma unroll
        for (int j = 0; j + 1 < N; j += 2) {
          uint32_t two_tiles[4];
          ptx::load_matrices(two_tiles, tap + j * 8 * 16);
          b[row][j][0] = two_tiles[0], b[row][j][1] = two_tiles[1];
          b[row][j + 1][0] = two_tiles[2], b[row][j + 1][1] = two_tiles[3];
        }
        if (N % 2) ptx::load_two_matrices(b[row][N - 1][0], b[row][N - 1][1], tap + (N - 1) * 128);
      }
      const uint32_t shifted = pixels + (tap_columns == 1 ? 0 : (column - 1) * d) * 16;
#pragma unroll
      for (int y = 0; y < kind.rows; ++y) {
        uint32_t a[4];
        if constexpr (kHalf)
          ptx::load_two_matrices(a[0], a[1], shifted + y * kind.row_pitch * 16);
        else
          ptx::load_matrices(a, shifted + y * kind.row_pitch * 16);
#pragma unroll
        for (int row = 0; row < tap_rows; ++row) {
          const int out = output_row<kKind>(y, row);
          if (out < 0 || out >= R) continue;
#pragma unroll
          for (int j = 0; j < N; ++j)
            if constexpr (kHalf)
              ptx::mma_k8<T>(sums_[out][j], a, b[row][j]);
            else
              ptx::mma_k16<T>(sums_[out][j], a, b[row][j]);
        }
      }
    }
  }

  /// The row of outputs that input row y of the stage serves as the tap of that row.
  template <int kKind>
  __device__ static constexpr int output_row(int y, int row) {
    constexpr Kind kind = Tr::kKinds.kind[kKind];
    return kind.first_row + y - (kind.taps == Taps::all ? (row - 1) * kind.dilation : 0);
  }
  /// Whether the stage has any work for that row of taps.
  template <int kKind>
  __device__ static constexpr bool tap_row_counts(int row) {
    for (int y = 0; y < Tr::kKinds.kind[kKind].rows; ++y)
      if (output_row<kKind>(y, row) >= 0 && output_row<kKind>(y, row) < R) return true;
    return false;
  }

  const TensorConvolve& p_;
  unsigned char* shared_;
  uint32_t base_;
  const Job* job_;
  int n_, row_, column_;
  float sums_[R][N][4] = {};  // pixels lane / 4 and + 8 of the warp's, outputs lane % 4 * 2 and + 1
  uint2 raw_[kPrefetch][8];
  bool inside_[kPrefetch];
};

/// Adds the bias, writes the result through shared memory in rows, and this warp's part of the
/// moments: (sum, sum of squares about the part's own mean, count).
template <class Tr>
__device__ void Block<Tr>::finish_forward() {
  constexpr int pitch = R * kColumns * 2 + 16;  // bytes of an output
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int rows = min(R, p_.height - row_);
  const int columns = min(16, max(0, p_.width - column_ - warp * 16));
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int output = j * 8 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float bias =
          p_.bias && output + i < job_->outputs ? p_.bias[job_->channel + output + i] : 0.f;
      float sum = 0;
#pragma unroll
      for (int y = 0; y < R; ++y)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int pixel = lane / 4 + 8 * e;
          const T rounded = narrow<T>(sums_[y][j][2 * e + i] + bias);
          *reinterpret_cast<T*>(shared_ + (output + i) * pitch +
                                (y * kColumns + warp * 16 + pixel) * 2) = rounded;
          sums_[y][j][2 * e + i] = widen(rounded);  // the moments are those of the result
          if (y < rows && pixel < columns) sum += sums_[y][j][2 * e + i];
        }
      if (!p_.partial) continue;
      const float count = static_cast<float>(rows * columns);
      for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
      const float mean = count > 0 ? sum / count : 0.f;
      float squares = 0;
#pragma unroll
      for (int y = 0; y < R; ++y)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float distance = sums_[y][j][2 * e + i] - mean;
          if (y < rows && lane / 4 + 8 * e < columns) squares = fmaf(distance, distance, squares);
        }
      for (int step = 4; step < 32; step *= 2) squares += __shfl_xor_sync(~0u, squares, step);
      if (lane / 4 == 0 && output + i < job_->outputs) {
        const int64_t part = static_cast<int64_t>(blockIdx.x / p_.num_jobs) * kWarps + warp;
        float* to =
            p_.partial + (part * p_.partial_channels + job_->partial_channel + output + i) * 3;
        to[0] = sum, to[1] = squares, to[2] = count;
      }
    }
  }
  __syncthreads();
  // 8 pixels a thread, as 16 bytes where the rows of the result are aligned to that.
  constexpr int vectors = kColumns / 8;
  const View& out = job_->out;
  for (int i = threadIdx.x; i < job_->outputs * R * vectors; i += kThreads) {
    const int vector = i % vectors, y = i / vectors % R, output = i / (vectors * R);
    const int h = row_ + y, w = column_ + vector * 8;
    if (h >= p_.height || w >= p_.width) continue;
    T* to = static_cast<T*>(out.data) + direct::offset_of(out, n_, output, h, w);
    const void* from = shared_ + output * pitch + (y * kColumns + vector * 8) * 2;
    if (p_.wide_stores) {
      *reinterpret_cast<uint4*>(to) = *static_cast<const uint4*>(from);
    } else {
      const uint2* halves = static_cast<const uint2*>(from);
      *reinterpret_cast<uint2*>(to) = halves[0];
      if (w + 4 < p_.width) *reinterpret_cast<uint2*>(to + 4) = halves[1];
    }
  }
}

/// Through psi of x to the data gradient and this block's part of the sums for scale and shift. The
/// gradient of psi goes through shared memory in float: the sums take it unrounded, and a warp
/// then reads x and writes the result in rows of one channel.
template <class Tr>
__device__ void Block<Tr>::finish_backward() {
  constexpr int pitch = R * kColumns + 4;  // floats of an output
  float* staged = reinterpret_cast<float*>(shared_);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int j = 0; j < N; ++j)
#pragma unroll
    for (int y = 0; y < R; ++y)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        staged[(j * 8 + lane % 4 * 2 + e % 2) * pitch + y * kColumns + warp * 16 + lane / 4 +
               e / 2 * 8] = sums_[y][j][e];
  __syncthreads();
  // Half a warp takes an output: 16 vectors of a row, row by row.
  static_assert(kColumns / kPixelsALoad == 16);
  const Job job = *job_;
  const int first = warp * 2 + lane / 16, vector = lane % 16 * kPixelsALoad;
  const bool relu = p_.relu, through_psi = p_.scale || relu;
  auto at = [&](const View& v) {
    return static_cast<T*>(v.data) +
           (v.data ? direct::offset_of(v, n_, first, row_, column_ + vector) : 0);
  };
  const T* x = at(job.x);
  T* out = at(job.out);
  for (int i = 0; i < N; ++i, x += 8 * job.x.stride_c, out += 8 * job.out.stride_c) {
    const int output = first + 8 * i;
    const bool there = output < job.outputs && column_ + vector < p_.width;
    const float scale = there && p_.scale ? p_.scale[job.channel + output] : 1.f;
    const float shift = there && p_.scale ? p_.shift[job.channel + output] : 0.f;
    float to_scale = 0, to_shift = 0;
#pragma unroll
    for (int y = 0; y < R; ++y) {
      if (!there || row_ + y >= p_.height) continue;
      const float4 four =
          *reinterpret_cast<const float4*>(staged + output * pitch + y * kColumns + vector);
      float gradient[4] = {four.x, four.y, four.z, four.w};
      if (through_psi) {
        const uint2 pixels = __ldg(reinterpret_cast<const uint2*>(x + y * job.x.stride_h));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float v = element<T>(pixels, e);
          const bool cut = relu & (fmaf(v, scale, shift) <= 0);  // NaN passes; no branch
          gradient[e] = cut ? 0.f : gradient[e];
          to_scale = fmaf(gradient[e], v, to_scale);
          to_shift += gradient[e];
        }
      }
      if (!job.out.data) continue;
      const uint2 result = {ptx::pack_two<T, false>(gradient[0] * scale, gradient[1] * scale),
                            ptx::pack_two<T, false>(gradient[2] * scale, gradient[3] * scale)};
      *reinterpret_cast<uint2*>(out + y * job.out.stride_h) = result;
    }
    if (!p_.partial) continue;
    // One exchange leaves a sum to each quarter of the warp, three more add over its lanes.
    const bool upper = lane & 8;
    float sum = upper ? to_shift : to_scale;
    sum += __shfl_xor_sync(~0u, upper ? to_scale : to_shift, 8);
    for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane % 8 == 0 && output < job.outputs)
      p_.partial[(static_cast<int64_t>(blockIdx.x / p_.num_jobs) * p_.partial_channels +
                  job.partial_channel + output) *
                     2 +
                 upper] = sum;
  }
}

template <class T, int kTiles, int kRows>
__device__ inline void backward_data(const TensorConvolve& p, unsigned char* shared) {
  Block<Traits<T, kTiles, kRows, Prologue::none>> block(p, shared);
  block.take_job();
  block.convolve();
  block.finish_backward();
}

template <class T, int kTiles, int kRows, bool kRelu>
__device__ inline void forward(const TensorConvolve& p, unsigned char* shared) {
  constexpr Prologue prologue = kRelu ? Prologue::affine_relu : Prologue::affine;
  Block<Traits<T, kTiles, kRows, prologue>> block(p, shared);
  block.take_job();
  block.convolve();
  block.finish_forward();
}

}  // namespace d3net::cuda::tensor
