// Stands in for csrc/cuda/ptx.cuh where kernels are compiled for the CPU: the same functions, with
// the fragment layouts of engine/fragments.h instead of inline PTX.
#pragma once

#include <cstdint>

#include "fragments.h"
#include "numbers.cuh"

namespace d3net::cuda::ptx {

inline int thread_anew() { return static_cast<int>(threadIdx.x); }

namespace emulated {

inline char* shared_at(uint32_t address) {
  return reinterpret_cast<char*>(static_cast<uintptr_t>(address));
}

template <class T>
constexpr gpu::MatrixType type_of() {
  if (sizeof(T) == 4) return gpu::MatrixType::tf32;
  return __is_same(T, bfloat16) ? gpu::MatrixType::bf16 : gpu::MatrixType::f16;
}

template <class T, int K>
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragments {
    float* d;
    const uint32_t *a, *b;
  } mine{d, a, b};
  gpu::meet(0xffffffff, &mine, false, [](gpu::Fiber* lanes, unsigned) {
    const auto of = [&](int lane) { return static_cast<Fragments*>(lanes[lane].argument); };
    gpu::multiply_16x8<K>(
        type_of<T>(), [&](int lane, int r) { return of(lane)->a[r]; },
        [&](int lane, int r) { return of(lane)->b[r]; },
        [&](int lane, int i) { return of(lane)->d[i]; },
        [&](int lane, int i, float x) { of(lane)->d[i] = x; });
  });
}

/// Every lane reads the row it names itself: a sanitizer sees who reads what.
template <int kMatrices, bool kTransposed = false>
inline void load_matrices(uint32_t (&r)[kMatrices], uint32_t address) {
  struct Row {
    uint16_t elements[8];
    uint32_t* r;
  } mine{{}, r};
  if (gpu::machine.self->lane < 8 * kMatrices) {
    if (address % 16) gpu::die("ldmatrix: row address not aligned to 16 bytes");
    const auto* from = reinterpret_cast<const uint16_t*>(shared_at(address));
    for (int i = 0; i < 8; ++i) mine.elements[i] = from[i];
  }
  gpu::meet(0xffffffff, &mine, false, [](gpu::Fiber* lanes, unsigned) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < kMatrices; ++i)
        static_cast<Row*>(lanes[lane].argument)->r[i] =
            gpu::matrix_pair(lane, kTransposed, [&](int row) -> const uint16_t* {
              return static_cast<Row*>(lanes[8 * i + row].argument)->elements;
            });
  });
}

}  // namespace emulated

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p));
}

template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::mma<T, 32 / sizeof(T)>(d, a, b);
}
template <class T>
inline void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::mma<T, 16 / sizeof(T)>(d, a, b);
}

inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  emulated::load_matrices(r, address);
}
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  emulated::load_matrices<4, true>(r, address);
}
inline void load_two_matrices(uint32_t& r0, uint32_t& r1, uint32_t address) {
  uint32_t r[2];
  emulated::load_matrices(r, address);
  r0 = r[0];
  r1 = r[1];
}

inline uint32_t load_word(uint32_t address) {
  if (address % 4) gpu::die("ld.shared.b32: address not aligned to 4 bytes");
  return *reinterpret_cast<const uint32_t*>(emulated::shared_at(address));
}

inline void store_16_bytes(uint32_t address, const uint32_t (&v)[4]) {
  if (address % 16) gpu::die("st.shared.v4: address not aligned to 16 bytes");
  auto* to = reinterpret_cast<uint32_t*>(emulated::shared_at(address));
  for (int i = 0; i < 4; ++i) to[i] = v[i];
}

inline uint32_t low_halves(uint32_t first, uint32_t second) {
  return (first & 0xffffu) | second << 16;
}
inline uint32_t high_halves(uint32_t first, uint32_t second) {
  return first >> 16 | (second & 0xffff0000u);
}

template <class T, bool kRelu>
inline uint32_t pack_two(float low, float high) {
  const auto one = [](float x) -> uint32_t {
    if (kRelu && x < 0) x = 0;
    return __is_same(T, bfloat16) ? gpu::float_to_bf16(x) : gpu::float_to_f16(x);
  };
  return one(low) | one(high) << 16;
}

template <bool kRelu>
inline uint32_t to_tf32(float v) {
  return gpu::float_to_tf32_away(kRelu && v < 0 ? 0 : v);
}

inline void copy_async_16(uint32_t to, const void* from, int bytes = 16) {
  if (to % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    gpu::die("cp.async: address not aligned to 16 bytes");
  gpu::start_copy({emulated::shared_at(to), static_cast<const char*>(from), bytes, 16 - bytes});
}
template <int kBytes>
inline void copy_async_16_at(uint32_t to, const void* from) {
  copy_async_16(to + kBytes, static_cast<const char*>(from) + kBytes);
}
inline void copy_async_8(uint32_t to, const void* from, int bytes) {
  if (to % 8 || reinterpret_cast<uintptr_t>(from) % 8)
    gpu::die("cp.async: address not aligned to 8 bytes");
  gpu::start_copy({emulated::shared_at(to), static_cast<const char*>(from), bytes, 8 - bytes});
}
inline void commit_copies() { gpu::commit_copies(); }
inline void wait_for_copies() { gpu::wait_for_copies(0); }

}  // namespace d3net::cuda::ptx
