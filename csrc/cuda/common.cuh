// What surrounds a convolution: tables and coefficients to device memory, packed weights, and the
// second stage of every sum. Small work, so dtypes are told apart at run time.
#pragma once

#include "geometry.h"
#include "numbers.cuh"
#include "params.h"
#include "ptx.cuh"

namespace d3net::cuda {

__device__ inline int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ inline void upload(const Upload& p) {
  for (int i = threadIdx.x; i < p.words; i += blockDim.x) p.to[i] = p.data[i];
}

__device__ inline void widen_vector(const Widen& p) {
  const int64_t i = thread_index();
  if (i < p.size)
    store_as(p.to_double ? DType::float64 : DType::float32, p.to, i,
             load_as(p.from.dtype, p.from.data, i * p.from.stride));
}

__device__ inline void pack(const Pack& p) {
  const int64_t i = thread_index();
  if (i >= p.size) return;
  const Convolution* c = p.convolutions;
  for (int64_t next = 1; next < p.num_convolutions && p.convolutions[next].packed <= i; ++next)
    c = p.convolutions + next;
  const int64_t padded = (c->out_channels + kDirectOutputs - 1) / kDirectOutputs * kDirectOutputs;
  const int64_t taps = p.kernel_h * p.kernel_w, local = i - c->packed;
  const int64_t k = local % padded, tap = local / padded % taps, channel = local / padded / taps;
  const Weight& w = c->weight;
  const int64_t from = k * w.stride_k + channel * w.stride_c + tap / p.kernel_w * w.stride_h +
                       tap % p.kernel_w * w.stride_w;
  store_as(p.dtype == DType::float64 ? DType::float64 : DType::float32, p.to, i,
           k < c->out_channels ? load_as(p.dtype, w.data, from) : 0.0);
}

/// One element of the weights a thread; the first ones also write a coefficient of psi.
__device__ inline void pack_chunks(const PackChunks& p) {
  const int64_t i = thread_index();
  const int outputs = 8 * p.tiles, slot = p.slot_channels;
  const int64_t of_chunk = int64_t{9} * 2 * slot * outputs;
  if (i >= p.num_chunks * of_chunk) return;
  {
    const Chunk& chunk = p.chunks[i / of_chunk];
    const int local = static_cast<int>(i % of_chunk);
    const int c = local % slot + local / slot / outputs % 2 * slot, k = local / slot % outputs;
    const int tap = local / slot / outputs / 2;
    const Weight& w = chunk.weight;
    const bool there = k < chunk.outputs && c < chunk.channels;
    double value =
        there
            ? load_as(p.dtype, w.data,
                      k * w.stride_k + c * w.stride_c + tap / 3 * w.stride_h + tap % 3 * w.stride_w)
            : 0.0;
    if (p.dtype == DType::float32)
      value = __uint_as_float(ptx::to_tf32<false>(static_cast<float>(value)));
    store_as(p.dtype, p.weights, i, value);
  }
  if (i >= p.num_chunks * 4 * slot) return;
  const Chunk& chunk = p.chunks[i / (4 * slot)];
  const int local = static_cast<int>(i % (4 * slot));
  const int c = local % slot + local / (2 * slot) * slot;
  const bool is_shift = local / slot % 2;
  double value = 0;  // channels that are not there must stay zero
  if (c < chunk.channels) {
    const Vector& v = is_shift ? p.shift : p.scale;
    const bool given = v.data && chunk.channel >= 0;
    value = given ? load_as(v.dtype, v.data, (chunk.channel + c) * v.stride) : is_shift ? 0.0 : 1.0;
  }
  p.coefficients[i] = static_cast<float>(value);
}

__device__ inline double partial_at(const void* partial, bool from_double, int64_t i) {
  return load_as(from_double ? DType::float64 : DType::float32, partial, i);
}

/// kFinishColumns neighbours a block; each of kFinishLanes threads adds every kFinishLanes-th part.
__device__ inline void finish(const Finish& p) {
  __shared__ double sums[kFinishLanes][kFinishColumns];
  const int column = threadIdx.x % kFinishColumns, lane = threadIdx.x / kFinishColumns;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kFinishColumns + column;
  const int64_t size = p.rows * p.columns;
  double sum = 0;
  if (i < size)
    for (int64_t part = lane; part < p.parts; part += kFinishLanes)
      sum += partial_at(p.partial, p.from_double, part * size + i);
  sums[lane][column] = sum;
  __syncthreads();
  if (lane > 0 || i >= size) return;
  for (int other = 1; other < kFinishLanes; ++other) sum += sums[other][column];
  const int64_t row = i / p.columns, local = i % p.columns;
  const bool is_last = local == p.columns - 1;
  const Vector& to = is_last ? p.last : p.body;
  if (to.data)
    store_as(to.dtype, to.data, (is_last ? row : row * (p.columns - 1) + local) * to.stride, sum);
}

/// One block a channel: the mean first, then the squares about it from those about the pivots.
__device__ inline void finish_moments(const FinishMoments& p) {
  __shared__ double by_warp[kMomentsThreads / 32];
  const int64_t channel = blockIdx.x;
  auto at = [&](int64_t part, int i) {
    return partial_at(p.partial, p.from_double, (part * p.channels + channel) * 4 + i);
  };
  auto average = [&](double sum) {
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) by_warp[threadIdx.x / 32] = sum;
    __syncthreads();
    double total = 0;
    for (int warp = 0; warp < kMomentsThreads / 32; ++warp) total += by_warp[warp];
    __syncthreads();  // by_warp may be used again
    return total / static_cast<double>(p.pixels);
  };
  double sum = 0, squares = 0;
  for (int64_t part = threadIdx.x; part < p.parts; part += kMomentsThreads)
    sum += at(part, 3) * at(part, 0) + at(part, 1);
  const double mean = average(sum);
  for (int64_t part = threadIdx.x; part < p.parts; part += kMomentsThreads) {
    const double distance = at(part, 0) - mean;
    squares += at(part, 2) + distance * (2 * at(part, 1) + at(part, 3) * distance);
  }
  const double variance = average(squares);
  if (threadIdx.x > 0) return;
  store_as(p.mean.dtype, p.mean.data, channel * p.mean.stride, mean);
  store_as(p.variance.dtype, p.variance.data, channel * p.variance.stride, variance);
}

}  // namespace d3net::cuda
