// The tensor-core convolution for 3x3 kernels on maps of any layout, forward and data gradient: of
// 16 bits, or of float32 with products in TF32.
//
// An implicit GEMM with pixels as rows (a warp owns 16 columns of the tile) and outputs as columns,
// rounded up to 8. psi(x) is staged transposed, [half of a chunk][row][column] in slots of
// channels: any tap is then a shift of the address, and a fragment once loaded serves every row of
// outputs whose tap it is (Taps::all). Two buffers: while a stage is multiplied, the next one's
// pixels come to registers and its weights to shared memory; one barrier a stage.
//
// Bank conflicts: lanes of a store are {vector parity, half, row parity} and the pitches are
// 2 (row) and 1 (half) slots modulo 8, so eight lanes touch eight different slots modulo 8.
// ldmatrix reads 8 neighbouring slots at any shift.
#pragma once

#include "direct.cuh"
#include "staging.cuh"

namespace d3net::cuda::tensor {

constexpr int kThreads = 32 * kWarps;

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

/// Calls f with the number, below kCount, as a compile-time constant; found by bisection.
template <int kCount, int kFirst = 0, class F>
__device__ inline void with_number(int number, F&& f) {
  if constexpr (kCount == 1)
    f(std::integral_constant<int, kFirst>{});
  else if (number < kFirst + kCount / 2)
    with_number<kCount / 2, kFirst>(number, f);
  else
    with_number<kCount - kCount / 2, kFirst + kCount / 2>(number, f);
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
    fetch(stage, 0);
    store(stage, 0);
    for (int buffer = 0; stage < end; buffer ^= 1) {
      ptx::wait_for_copies();
      __syncthreads();
      const int next = next_live(stage + 1);
      if (next < end) fetch(next, buffer ^ 1);
      multiply(stage, buffer);
      if (next < end) store(next, buffer ^ 1);
      stage = next;
    }
    __syncthreads();  // the epilogue uses the buffers again
  }

  __device__ void finish_forward();  // tensor_epilogue.cuh
  __device__ void finish_backward();

 private:
  struct Unit {  // kPixelsALoad pixels of one row that a thread loads, and their slot
    int row, column, slot;
    bool there;
  };

  template <int kKind>
  __device__ static Unit unit(int pass) {
    constexpr Kind kind = Tr::kKinds.kind[kKind];
    constexpr unsigned pairs = kind.columns / (2 * kPixelsALoad), row_pairs = (kind.rows + 1) / 2;
    static_assert(kPrefetch * kThreads / 8 >= pairs * row_pairs, "does not fit the registers");
    const unsigned t = threadIdx.x, i = t / 8 + pass * (kThreads / 8);
    const int row = i / pairs * 2 + (t >> 2 & 1);
    const int column = (i % pairs * 2 + (t & 1)) * kPixelsALoad;
    const int half = t >> 1 & 1;
    return {row, column, half * kind.half_pitch + row * kind.row_pitch + column,
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
  __device__ void write_elements(const View& out, F&& value) const;

  template <class F>
  __device__ static void with_kind(int number, F&& f) {
    with_number<Tr::kKinds.count>(number, f);
  }

  /// Pixels to registers, and weights to a buffer.
  __device__ void fetch(int stage, int buffer) {
    const Stage s = p_.stages[stage];
    with_kind(s.kind, [&](auto k) {
      load<k.value>(s);
      copy_weights<k.value>(s, buffer);
    });
    ptx::commit_copies();
  }

  template <int kKind>
  __device__ void load(const Stage& s) {
    const int half = threadIdx.x >> 1 & 1, channels = s.channels - kSlot<T> * half;
    const T* from = static_cast<const T*>(s.data) + n_ * s.stride_n + kSlot<T> * half * s.stride_c +
                    (row_ + s.row) * s.stride_h + (column_ + s.column) * s.stride_w;
#pragma unroll
    for (int pass = 0; pass < kPrefetch; ++pass) {
      const Unit u = unit<kKind>(pass);
      const int h = row_ + s.row + u.row, w = column_ + s.column + u.column;
      inside_[pass] = 0;
      to_[pass] = u.there ? u.slot * 16 : -1;
      if (!u.there || !lies_in(h, p_.height)) continue;
      const T* pixels = from + u.row * s.stride_h;
      if (s.access != Access::rows) {
        inside_[pass] = pixels_inside(w, p_.width);
        load_elements(raw_[pass], pixels + u.column * s.stride_w, s.access, s.stride_c, s.stride_w,
                      channels, inside_[pass]);
      } else if (lies_in(w, p_.width)) {
        inside_[pass] = kAllInside;
        if (channels >= kSlot<T>)
          load_rows(raw_[pass], pixels + u.column, s.stride_c, kSlot<T>);
        else
          load_rows(raw_[pass], pixels + u.column, s.stride_c, channels);
      }
    }
  }

  /// psi of the registers to a buffer; zeros outside of the map, after psi.
  __device__ void store(int stage, int buffer) {
    const Stage& s = p_.stages[stage];
    const int half = threadIdx.x >> 1 & 1;
    if (s.channels <= kSlot<T> * half) return;  // multiply() does not read that half
    HalfPsi<T> psi;
    if constexpr (Tr::kPrologue != Prologue::none) psi.load(p_.coefficients, s.chunk, half);
    constexpr bool is_float = sizeof(T) == 4;
    const bool by_pixels = s.access == Access::pixels;
    if constexpr (!is_float)
      if (by_pixels)
        for (auto& raw : raw_) pixels_to_rows<T>(raw);
#pragma unroll
    for (int pass = 0; pass < kPrefetch; ++pass) {
      if (to_[pass] < 0) continue;
      const uint32_t to = base_ + buffer * Tr::kStageBytes + to_[pass];
      if (inside_[pass]) {
        if (is_float && by_pixels)
          store_pixels<T, Tr::kPrologue, is_float>(to, raw_[pass], psi);
        else
          store_pixels<T, Tr::kPrologue>(to, raw_[pass], psi);
      } else {
        store_zeros(to);
      }
      if (s.access != Access::rows) store_zeros_outside(to, inside_[pass]);
    }
  }

  __device__ uint32_t weight_buffer(int buffer) const {
    return base_ + 2 * Tr::kStageBytes + buffer * Tr::kWeightBytes;
  }

  template <int kKind>
  __device__ void copy_weights(const Stage& s, int buffer) const {
    constexpr Taps taps = Tr::kKinds.kind[kKind].taps;
    copy_slots<Tr::kTapSlots*(taps == Taps::all   ? 9
                              : taps == Taps::row ? 3
                                                  : 1)>(
        weight_buffer(buffer) + threadIdx.x * 16,
        static_cast<const uint4*>(p_.weights) + s.weights + threadIdx.x);
  }
  template <int kSlots, int kFirst = 0>
  __device__ static void copy_slots(uint32_t to, const uint4* from) {
    if constexpr (kFirst < kSlots) {
      if (kFirst + kThreads <= kSlots || threadIdx.x < kSlots - kFirst)
        ptx::copy_async_16_at<kFirst * 16>(to, from);
      copy_slots<kSlots, kFirst + kThreads>(to, from);
    }
  }

  __device__ void multiply(int stage, int buffer) {
    if (column_ + static_cast<int>(threadIdx.x / 32) * 16 >= p_.width) return;  // nothing to sum
    const Stage s = p_.stages[stage];
    with_kind(s.kind, [&](auto k) {
      if (s.channels > kSlot<T>)
        multiply<k.value, false>(s.dilation, buffer);
      else
        multiply<k.value, true>(s.dilation, buffer);
    });
  }

  /// sums_ += the staged rows times their taps. kHalf: up to half a chunk.
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
              ptx::mma_half<T>(sums_[out][j], a, b[row][j]);
            else
              ptx::mma<T>(sums_[out][j], a, b[row][j]);
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
  Four<T> raw_[kPrefetch][kSlot<T>];
  uint32_t inside_[kPrefetch];  // a bit a pixel
  int to_[kPrefetch];           // where they go in a buffer, in bytes; -1 where there are none
};

}  // namespace d3net::cuda::tensor
