// How pixels come to shared memory: loaded to registers from any layout, through psi, and stored
// transposed as slots of 8 channels of 16 bits, or of 4 of float32, rounded to TF32.
#pragma once

#include <type_traits>

#include "geometry.h"
#include "ptx.cuh"

namespace d3net::cuda::tensor {

/// What the staged pixels pass through.
enum class Prologue { none, affine, affine_relu };

/// Elements of 16 bytes: channels of a slot.
template <class T>
constexpr int kSlot = slot_channels(sizeof(T));

/// Four neighbouring elements as they are loaded.
template <class T>
using Four = std::conditional_t<sizeof(T) == 4, uint4, uint2>;

/// psi's coefficients of half a chunk.
template <class T>
struct HalfPsi {
  float scale[kSlot<T>], shift[kSlot<T>];

  __device__ void load(const float* coefficients, int chunk, int half) {
    constexpr int fours = kSlot<T> / 4;
    const float4* from =
        reinterpret_cast<const float4*>(coefficients) + (chunk * 2 + half) * 2 * fours;
#pragma unroll
    for (int i = 0; i < fours; ++i) {
      const float4 a = __ldg(from + i), b = __ldg(from + fours + i);
      scale[4 * i] = a.x, scale[4 * i + 1] = a.y, scale[4 * i + 2] = a.z, scale[4 * i + 3] = a.w;
      shift[4 * i] = b.x, shift[4 * i + 1] = b.y, shift[4 * i + 2] = b.z, shift[4 * i + 3] = b.w;
    }
  }
};

/// Number i of four neighbours.
template <class T>
__device__ inline float element(const Four<T>& four, int i) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w);
  } else {
    const uint32_t two = i < 2 ? four.x : four.y;
    if constexpr (__is_same(T, bfloat16))
      return __uint_as_float(i % 2 ? two & 0xffff0000u : two << 16);
    else
      return __half2float(__ushort_as_half(static_cast<unsigned short>(i % 2 ? two >> 16 : two)));
  }
}

/// Four neighbours one by one; zeros where `inside` has no bit.
template <class T>
__device__ inline Four<T> four_elements(const T* from, int64_t stride_w, uint32_t inside) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, unsigned short>;
  const Bits* bits = reinterpret_cast<const Bits*>(from);
  uint32_t pixel[kPixelsALoad];
#pragma unroll
  for (int i = 0; i < kPixelsALoad; ++i)
    pixel[i] = inside >> i & 1 ? __ldg(bits + i * stride_w) : 0u;
  if constexpr (sizeof(T) == 4)
    return {pixel[0], pixel[1], pixel[2], pixel[3]};
  else
    return {pixel[0] | pixel[1] << 16, pixel[2] | pixel[3] << 16};
}

/// Four neighbours of the channels of a slot as they lie in a map with that access: by rows, raw[c]
/// are those of channel c; by pixels, first come the channels of pixel 0. Zeros for channels that
/// are not there, and, but by rows, for pixels that `inside` has no bit for.
template <class T>
__device__ inline void load_rows(Four<T> (&raw)[kSlot<T>], const T* from, int64_t stride_c,
                                 int channels) {
#pragma unroll
  for (int c = 0; c < kSlot<T>; ++c, from += stride_c)
    raw[c] = c < channels ? __ldg(reinterpret_cast<const Four<T>*>(from)) : Four<T>{};
}
template <class T>
__device__ inline void load_elements(Four<T> (&raw)[kSlot<T>], const T* from, Access access,
                                     int64_t stride_c, int64_t stride_w, int channels,
                                     uint32_t inside) {
  if (access == Access::pixels) {
    constexpr int fours = kSlot<T> / 4;  // of a pixel
#pragma unroll
    for (int i = 0; i < kSlot<T>; ++i)
      raw[i] =
          (inside >> i / fours & 1) && i % fours * 4 < channels
              ? __ldg(reinterpret_cast<const Four<T>*>(from + i / fours * stride_w + i % fours * 4))
              : Four<T>{};
    return;
  }
#pragma unroll
  for (int c = 0; c < kSlot<T>; ++c, from += stride_c)
    raw[c] = four_elements(from, stride_w, c < channels ? inside : 0u);
}

/// Four by four elements, transposed.
template <class T>
__device__ inline void transpose(Four<T> (&square)[4]) {
  const Four<T> a = square[0], b = square[1], c = square[2], d = square[3];
  if constexpr (sizeof(T) == 4) {
    square[0] = {a.x, b.x, c.x, d.x};
    square[1] = {a.y, b.y, c.y, d.y};
    square[2] = {a.z, b.z, c.z, d.z};
    square[3] = {a.w, b.w, c.w, d.w};
  } else {
    square[0] = {ptx::low_halves(a.x, b.x), ptx::low_halves(c.x, d.x)};
    square[1] = {ptx::high_halves(a.x, b.x), ptx::high_halves(c.x, d.x)};
    square[2] = {ptx::low_halves(a.y, b.y), ptx::low_halves(c.y, d.y)};
    square[3] = {ptx::high_halves(a.y, b.y), ptx::high_halves(c.y, d.y)};
  }
}

/// 16-bit pixels as load_elements leaves them by pixels, to how it leaves them by rows.
template <class T>
__device__ inline void pixels_to_rows(Four<T> (&raw)[8]) {
  Four<T> low[4] = {raw[0], raw[2], raw[4], raw[6]}, high[4] = {raw[1], raw[3], raw[5], raw[7]};
  transpose<T>(low);
  transpose<T>(high);
#pragma unroll
  for (int c = 0; c < 4; ++c) raw[c] = low[c], raw[4 + c] = high[c];
}

constexpr uint32_t kAllInside = (1u << kPixelsALoad) - 1;

/// 0 <= place < size, in one comparison.
__device__ inline bool lies_in(int place, int size) {
  return static_cast<uint32_t>(place) < static_cast<uint32_t>(size);
}

/// A bit for each of four neighbours from column w on that lies on a map of that width.
__device__ inline uint32_t pixels_inside(int w, int width) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kPixelsALoad; ++i) bits |= (lies_in(w + i, width) ? 1u : 0u) << i;
  return bits;
}

/// psi of four neighbours of a slot's channels to their slots: transposed, unless they came by
/// pixels in float32, whose four channels are a slot already.
template <class T, Prologue kPrologue, bool kByPixels = false>
__device__ inline void store_pixels(uint32_t to, const Four<T> (&raw)[kSlot<T>],
                                    const HalfPsi<T>& psi) {
  constexpr bool relu = kPrologue == Prologue::affine_relu;
#pragma unroll
  for (int pixel = 0; pixel < kPixelsALoad; ++pixel) {
    auto x = [&](int c) {
      return kByPixels ? element<T>(raw[pixel], c) : element<T>(raw[c], pixel);
    };
    auto psi_of = [&](int c) { return fmaf(x(c), psi.scale[c], psi.shift[c]); };
    uint32_t slot[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4 && kPrologue == Prologue::none) {
        slot[i] = ptx::to_tf32<false>(x(i));
      } else if constexpr (sizeof(T) == 4) {
        slot[i] = ptx::to_tf32<relu>(psi_of(i));
      } else if constexpr (kPrologue == Prologue::none) {
        const uint32_t low = pixel < 2 ? raw[2 * i].x : raw[2 * i].y;
        const uint32_t high = pixel < 2 ? raw[2 * i + 1].x : raw[2 * i + 1].y;
        slot[i] = pixel % 2 ? ptx::high_halves(low, high) : ptx::low_halves(low, high);
      } else {
        slot[i] = ptx::pack_two<T, relu>(psi_of(2 * i), psi_of(2 * i + 1));
      }
    }
    ptx::store_16_bytes(to + pixel * 16, slot);
  }
}

/// psi of four neighbours of a slot's channels of float32, rounded to TF32, to rows of channels
/// that lie `pitch` bytes apart; zeros where `inside` has no bit.
template <bool kRelu>
__device__ inline void store_channels(uint32_t to, uint32_t pitch, const uint4 (&raw)[4],
                                      bool by_pixels, const HalfPsi<tf32>& psi, uint32_t inside) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    uint32_t row[kPixelsALoad];
#pragma unroll
    for (int pixel = 0; pixel < kPixelsALoad; ++pixel) {
      const float x = by_pixels ? element<tf32>(raw[pixel], c) : element<tf32>(raw[c], pixel);
      const uint32_t y = ptx::to_tf32<kRelu>(fmaf(x, psi.scale[c], psi.shift[c]));
      row[pixel] = inside >> pixel & 1 ? y : 0u;
    }
    ptx::store_16_bytes(to + c * pitch, row);
  }
}

__device__ inline void store_zeros(uint32_t to) {
#pragma unroll
  for (int pixel = 0; pixel < kPixelsALoad; ++pixel)
    ptx::store_16_bytes(to + pixel * 16, {0, 0, 0, 0});
}

/// The same where `inside` has no bit.
__device__ inline void store_zeros_outside(uint32_t to, uint32_t inside) {
#pragma unroll
  for (int pixel = 0; pixel < kPixelsALoad; ++pixel)
    if (!(inside >> pixel & 1)) ptx::store_16_bytes(to + pixel * 16, {0, 0, 0, 0});
}

}  // namespace d3net::cuda::tensor
