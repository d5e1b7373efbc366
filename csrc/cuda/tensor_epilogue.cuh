// What follows the products of the tensor-core convolution: bias, moments and the result of the
// forward pass; psi's derivative, its sums and the result of the data gradient.
#pragma once

#include "tensor.cuh"

namespace d3net::cuda::tensor {

/// Four neighbours of a result.
template <class T>
__device__ inline Four<T> rounded(const float4& v) {
  if constexpr (sizeof(T) == 4)
    return {__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)};
  else
    return {ptx::pack_two<T, false>(v.x, v.y), ptx::pack_two<T, false>(v.z, v.w)};
}

/// Writes value(output, pixel of the tile) to a result that has not Access::rows. By pixels four
/// channels at once, of a warp four times four of eight pixels: whole sectors.
template <class Tr>
template <class F>
__device__ void Block<Tr>::write_elements(const View& out, F&& value) const {
  auto write = [&](unsigned output, unsigned pixel, auto&& store) {
    const int h = row_ + pixel / kColumns, w = column_ + pixel % kColumns;
    if (output < job_->outputs && lies_in(h, p_.height) && lies_in(w, p_.width))
      store(static_cast<T*>(out.data) + direct::offset_of(out, n_, output, h, w));
  };
  const unsigned outputs = job_->outputs;
  if (p_.results == Access::pixels) {
    const unsigned lane = threadIdx.x % 32;
    for (unsigned i = threadIdx.x / 32; i < (outputs + 15) / 16 * (R * kColumns / 8); i += kWarps) {
      const unsigned output = i / (R * kColumns / 8) * 16 + lane / 8 * 4;
      const unsigned pixel = i % (R * kColumns / 8) * 8 + lane % 8;
      write(output, pixel, [&](T* to) {
        *reinterpret_cast<Four<T>*>(to) =
            rounded<T>({value(output, pixel), value(output + 1, pixel), value(output + 2, pixel),
                        value(output + 3, pixel)});
      });
    }
    return;
  }
  const bool channels_inside = out.stride_c < out.stride_w;  // neighbours by neighbouring threads
  for (unsigned i = threadIdx.x; i < outputs * R * kColumns; i += kThreads) {
    const unsigned output = channels_inside ? i % outputs : i / (R * kColumns);
    const unsigned pixel = channels_inside ? i / outputs : i % (R * kColumns);
    write(output, pixel, [&](T* to) { *to = narrow<T>(value(output, pixel)); });
  }
}

/// Adds the bias, writes the result through shared memory in rows, and this warp's part of the
/// moments, see FinishMoments.
template <class Tr>
__device__ void Block<Tr>::finish_forward() {
  constexpr int bytes = sizeof(T), pitch = R * kColumns * bytes + 16;  // of an output
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
#pragma unroll
      for (int y = 0; y < R; ++y)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const T rounded = narrow<T>(sums_[y][j][2 * e + i] + bias);
          *reinterpret_cast<T*>(shared_ + (output + i) * pitch +
                                (y * kColumns + warp * 16 + lane / 4 + 8 * e) * bytes) = rounded;
          sums_[y][j][2 * e + i] = widen(rounded);  // the moments are those of the result
        }
      if (!p_.partial) continue;
      // Of the distances to the mean, or that of the first row, which is near enough.
      float pivot = 0, rest = 0, squares = 0;
      auto add_pixels = [&](auto is_whole) {
        auto for_pixels = [&](int end, auto&& f) {
#pragma unroll
          for (int y = 0; y < R; ++y)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (y < end && (is_whole.value || lane / 4 + 8 * e < columns))
                f(sums_[y][j][2 * e + i]);
        };
        const int first_rows = is_whole.value ? 1 : rows;
        for_pixels(first_rows, [&](float v) { pivot += v; });
        for (int step = 4; step < 32; step *= 2) pivot += __shfl_xor_sync(~0u, pivot, step);
        pivot /= static_cast<float>(first_rows * max(columns, 1));
        for_pixels(is_whole.value ? R : rows, [&](float v) {
          rest += v - pivot;
          squares = fmaf(v - pivot, v - pivot, squares);
        });
      };
      if (rows == R && columns == 16)
        add_pixels(std::true_type{});
      else
        add_pixels(std::false_type{});
      // One exchange leaves a sum to each half of the warp, two more add over its pixels.
      const bool upper = lane & 16;
      float sum = upper ? squares : rest;
      sum += __shfl_xor_sync(~0u, upper ? rest : squares, 16);
      sum += __shfl_xor_sync(~0u, sum, 8);
      sum += __shfl_xor_sync(~0u, sum, 4);
      if (lane / 4 % 4 == 0 && output + i < job_->outputs) {
        const int64_t part = static_cast<int64_t>(blockIdx.x / p_.num_jobs) * kWarps + warp;
        float2* to = reinterpret_cast<float2*>(p_.partial) +
                     (part * p_.partial_channels + job_->partial_channel + output + i) * 2 + upper;
        const float count = static_cast<float>(rows * columns);
        *to = upper ? float2{sum, count} : float2{pivot, sum};
      }
    }
  }
  __syncthreads();
  const View& out = job_->out;
  if (p_.results != Access::rows) {
    write_elements(out, [&](int output, int pixel) {
      return widen(*reinterpret_cast<const T*>(shared_ + output * pitch + pixel * bytes));
    });
    return;
  }
  // 16 bytes a thread, at once where the rows of the result are aligned to that.
  constexpr unsigned pixels = kSlot<T>, vectors = kColumns / pixels;
  for (unsigned i = threadIdx.x; i < job_->outputs * R * vectors; i += kThreads) {
    const int vector = i % vectors, y = i / vectors % R, output = i / (vectors * R);
    const int h = row_ + y, w = column_ + vector * pixels;
    if (h >= p_.height || w >= p_.width) continue;
    T* to = static_cast<T*>(out.data) + direct::offset_of(out, n_, output, h, w);
    const void* from = shared_ + output * pitch + (y * kColumns + vector * pixels) * bytes;
    if (bytes == 4 || p_.wide_stores) {
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
  const bool through_psi = p_.scale || p_.relu, by_rows = p_.results == Access::rows;
  const bool plain = through_psi && by_rows && job.out.data;  // the common case, without branches
  const float least_kept = p_.relu ? __uint_as_float(1) : -INFINITY;  // by the ReLU: above zero
  const int rows = min(R, p_.height - row_);
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
    auto pass_rows = [&](auto is_plain) {
#pragma unroll
      for (int y = 0; y < R; ++y) {
        if (y >= rows) break;
        float4* at = reinterpret_cast<float4*>(staged + output * pitch + y * kColumns + vector);
        const float4 four = *at;
        float gradient[4] = {four.x, four.y, four.z, four.w};
        if (is_plain.value || through_psi) {
          const T* row = x + y * job.x.stride_h;
          Four<T> pixels;
          if (is_plain.value || by_rows) {
            pixels = __ldg(reinterpret_cast<const Four<T>*>(row));
          } else {
            const uint32_t inside = pixels_inside(column_ + vector, p_.width);
            pixels = four_elements(row, job.x.stride_w, inside);
#pragma unroll
            for (int e = 0; e < 4; ++e) gradient[e] = inside >> e & 1 ? gradient[e] : 0.f;
          }
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float v = element<T>(pixels, e);
            gradient[e] = fmaf(v, scale, shift) < least_kept ? 0.f : gradient[e];  // NaN passes
            to_scale = fmaf(gradient[e], v, to_scale);
            to_shift += gradient[e];
          }
        }
        if (!is_plain.value && !job.out.data) continue;
        const float4 result = {gradient[0] * scale, gradient[1] * scale, gradient[2] * scale,
                               gradient[3] * scale};
        if (is_plain.value || by_rows)
          *reinterpret_cast<Four<T>*>(out + y * job.out.stride_h) = rounded<T>(result);
        else
          *at = result;
      }
    };
    if (there && plain)
      pass_rows(std::true_type{});
    else if (there)
      pass_rows(std::false_type{});
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
  if (by_rows || !job.out.data) return;
  __syncthreads();
  write_elements(job.out, [&](int output, int pixel) { return staged[output * pitch + pixel]; });
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
