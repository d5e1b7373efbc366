// How pixels of 16-bit maps come to shared memory: loaded to registers from any layout, through
// psi, and stored transposed as slots of 8 channels.
#pragma once

#include "geometry.h"
#include "ptx.cuh"

namespace d3net::cuda::tensor {

/// What the staged pixels pass through.
enum class Prologue { none, affine, affine_relu };

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

/// Four neighbours one by one; zeros where `inside` has no bit.
template <class T>
__device__ inline uint2 four_elements(const T* from, int64_t stride_w, uint32_t inside) {
  const unsigned short* bits = reinterpret_cast<const unsigned short*>(from);
  uint32_t pixel[kPixelsALoad];
#pragma unroll
  for (int i = 0; i < kPixelsALoad; ++i)
    pixel[i] = inside >> i & 1 ? __ldg(bits + i * stride_w) : 0u;
  return {pixel[0] | pixel[1] << 16, pixel[2] | pixel[3] << 16};
}

/// Four neighbours of up to 8 channels as they lie in a map with that access: by rows, raw[c] are
/// those of channel c; by pixels, raw[2 * i] and the next one are the channels of pixel i. Zeros
/// for channels that are not there, and, but by rows, for pixels that `inside` has no bit for.
template <class T>
__device__ inline void load_rows(uint2 (&raw)[8], const T* from, int64_t stride_c, int channels) {
#pragma unroll
  for (int c = 0; c < 8; ++c, from += stride_c)
    raw[c] = c < channels ? __ldg(reinterpret_cast<const uint2*>(from)) : uint2{0, 0};
}
template <class T>
__device__ inline void load_elements(uint2 (&raw)[8], const T* from, Access access,
                                     int64_t stride_c, int64_t stride_w, int channels,
                                     uint32_t inside) {
  if (access == Access::pixels) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      raw[i] = (inside >> i / 2 & 1) && i % 2 * 4 < channels
                   ? __ldg(reinterpret_cast<const uint2*>(from + i / 2 * stride_w + i % 2 * 4))
                   : uint2{0, 0};
    return;
  }
#pragma unroll
  for (int c = 0; c < 8; ++c, from += stride_c)
    raw[c] = four_elements(from, stride_w, c < channels ? inside : 0u);
}

/// Pixels as load_elements leaves them by pixels, to how it leaves them by rows.
__device__ inline void pixels_to_rows(uint2 (&raw)[8]) {
  uint2 rows[8];
#pragma unroll
  for (int c = 0; c < 8; c += 2) {
    auto two_channels = [&](int pixel) {
      const uint2& four = raw[2 * pixel + c / 4];
      return c % 4 ? four.y : four.x;
    };
    rows[c] = {ptx::low_halves(two_channels(0), two_channels(1)),
               ptx::low_halves(two_channels(2), two_channels(3))};
    rows[c + 1] = {ptx::high_halves(two_channels(0), two_channels(1)),
                   ptx::high_halves(two_channels(2), two_channels(3))};
  }
#pragma unroll
  for (int c = 0; c < 8; ++c) raw[c] = rows[c];
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

/// The same where `inside` has no bit.
__device__ inline void store_zeros_outside(uint32_t to, uint32_t inside) {
#pragma unroll
  for (int pixel = 0; pixel < kPixelsALoad; ++pixel)
    if (!(inside >> pixel & 1)) ptx::store_16_bytes(to + pixel * 16, {0, 0, 0, 0});
}

}  // namespace d3net::cuda::tensor
