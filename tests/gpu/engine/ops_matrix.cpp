// Tensor core instructions and ldmatrix.
#include <algorithm>
#include <cstring>
#include <vector>

#include "fragments.h"
#include "lanes.h"
#include "operations.h"

namespace gpu {

namespace {

/// operands: 4 of D, K / 2 of A in registers (K / 4 for 16 bit), half as many of B, 4 of C.
template <MatrixType type, int K>
void mma(Warp& w, const Instruction& in, uint32_t) {
  constexpr int b_registers = type == MatrixType::tf32 ? K / 4 : K / 8;
  constexpr int a_at = 4, b_at = a_at + 2 * b_registers, c_at = b_at + b_registers;
  const auto words = [&](int first) {
    return
        [&w, &in, first](int lane, int r) { return w.reg<uint32_t>(in.operands[first + r])[lane]; };
  };
  multiply_16x8<K>(
      type, words(a_at), words(b_at),
      [&](int lane, int i) { return w.reg<float>(in.operands[c_at + i])[lane]; },
      [&](int lane, int i, float x) { w.reg<float>(in.operands[i])[lane] = x; });
}

/// operands: 2 of D, A, B, 2 of C.
void mma_f64(Warp& w, const Instruction& in, uint32_t) {
  const double *a = w.reg<double>(in.operands[2]), *b = w.reg<double>(in.operands[3]);
  multiply_8x8_f64([&](int lane) { return a[lane]; }, [&](int lane) { return b[lane]; },
                   [&](int lane, int i) { return w.reg<double>(in.operands[4 + i])[lane]; },
                   [&](int lane, int i, double x) { w.reg<double>(in.operands[i])[lane] = x; });
}

using MatrixRow = uint16_t[8];

/// operands: destinations, address; lane 8 i + r gives the address of row r of matrix i.
/// constants: space, offset, bytes of the address register, transposed.
void ldmatrix(Warp& w, const Instruction& in, uint32_t) {
  const int number = static_cast<int>(in.operands.size()) - 1;
  const uint32_t place = in.operands[number];
  SharedMemory& shared = w.block->shared;
  Traffic& count = w.block->launch.counts[in.index].shared;
  MatrixRow rows[4 * 8];
  ++count.requests;
  for (int i = 0; i < number; ++i) {
    int banks[32] = {}, most = 0;
    std::vector<uint64_t> seen;
    for (int lane = 8 * i; lane < 8 * i + 8; ++lane) {
      const bool wide = in.constants[2] == 8;
      uint64_t address = wide ? w.reg<uint64_t>(place)[lane] : w.reg<uint32_t>(place)[lane];
      address = (address & ~window_mask) + static_cast<uint64_t>(in.constants[1]);
      const uint32_t who = 1u << lane;
      if (address % 16) w.fail(in, who, "row address not aligned to 16 bytes");
      if (address > shared.size() || shared.size() - address < 16)
        w.fail(in, who,
               "row at " + std::to_string(address) + " outside the " +
                   std::to_string(shared.size()) + " bytes of shared memory of this launch");
      std::memcpy(rows[lane], shared.data() + address, 16);
      const std::string problem = shared.access(w.index, address, 16, false);
      if (!problem.empty()) w.fail(in, who, problem);
      if (std::find(seen.begin(), seen.end(), address) != seen.end()) continue;
      seen.push_back(address);
      for (uint64_t word = address / 4; word < address / 4 + 4; ++word)
        most = std::max(most, ++banks[word % 32]);
    }
    count.units += most;
    count.ideal += 1;
    count.bytes += 8 * 16;
  }
  for (int i = 0; i < number; ++i)
    for (int lane = 0; lane < lanes; ++lane)
      w.reg<uint32_t>(in.operands[i])[lane] = matrix_pair(
          lane, in.constants[3] != 0, [&](int r) -> const uint16_t* { return rows[8 * i + r]; });
}

/// operands: address, then 1, 2 or 4 matrices; constants as of ldmatrix.
void stmatrix(Warp& w, const Instruction& in, uint32_t) {
  const int number = static_cast<int>(in.operands.size()) - 1;
  SharedMemory& shared = w.block->shared;
  Traffic& count = w.block->launch.counts[in.index].shared;
  ++count.requests;
  for (int i = 0; i < number; ++i) {
    int banks[32] = {}, most = 0;
    const uint32_t* pairs = w.reg<uint32_t>(in.operands[i + 1]);
    for (int r = 0; r < 8; ++r) {
      const int lane = 8 * i + r;
      const bool wide = in.constants[2] == 8;
      const uint32_t place = in.operands[0];
      uint64_t address = wide ? w.reg<uint64_t>(place)[lane] : w.reg<uint32_t>(place)[lane];
      address = (address & ~window_mask) + static_cast<uint64_t>(in.constants[1]);
      const uint32_t who = 1u << lane;
      if (address % 16) w.fail(in, who, "row address not aligned to 16 bytes");
      if (address > shared.size() || shared.size() - address < 16)
        w.fail(in, who,
               "row at " + std::to_string(address) + " outside the " +
                   std::to_string(shared.size()) + " bytes of shared memory of this launch");
      uint16_t row[8];  // lane 4 r + c / 2 holds columns c and c + 1 of row r
      for (int c = 0; c < 8; ++c) {
        const int holder = in.constants[3] ? 4 * c + r / 2 : 4 * r + c / 2;
        const int half = in.constants[3] ? r % 2 : c % 2;
        row[c] = static_cast<uint16_t>(pairs[holder] >> 16 * half);
      }
      if (std::memcmp(shared.data() + address, row, sizeof row) != 0) {
        const std::string problem = shared.access(w.index, address, 16, true);
        if (!problem.empty()) w.fail(in, who, problem);
      }
      std::memcpy(shared.data() + address, row, sizeof row);
      for (uint64_t word = address / 4; word < address / 4 + 4; ++word)
        most = std::max(most, ++banks[word % 32]);
    }
    count.units += most;
    count.ideal += 1;
    count.bytes += 8 * 16;
  }
}

// wgmma: D (64 x N) += A (64 x 16) B (16 x N) of four warps; A from registers or shared memory, B
// from shared memory, through matrix descriptors (PTX ISA, "Matrix Descriptor Format").

/// Address of element (row or column `mn`, `k`) of 16-bit elements in the tile of a descriptor.
uint64_t descriptor_address(uint64_t descriptor, int mn, int k, bool transposed) {
  const auto field = [&](int shift) { return (descriptor >> shift & 0x3fff) << 4; };
  const uint64_t start = field(0), leading = field(16), stride = field(32);
  const int mode = static_cast<int>(descriptor >> 62);  // 0 none, 1, 2, 3: 128, 64, 32 bytes
  const int width = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 16;
  uint64_t address = start;
  if (transposed) {
    const int per_row = width / 2;
    address += (mn % per_row) * 2 + (k % 8) * width;
    // Without swizzling the two offsets change places.
    address += mode ? mn / per_row * leading + k / 8 * stride
                    : mn / per_row * stride + k / 8 * leading;
  } else {
    address += mn / 8 * stride + (mn % 8) * width;
    address += mode ? uint64_t(k) * 2 : k / 8 * leading + (k % 8) * 2;
  }
  const uint64_t swizzle = mode == 1 ? 7 : mode == 2 ? 3 : mode == 3 ? 1 : 0;
  return address ^ (address >> 7 & swizzle) << 4;
}

/// constants: type, N, A in registers, A transposed, B transposed.
/// operands: N / 2 of D, descriptor or 4 registers of A, descriptor of B, predicate scale-d.
void wgmma(Warp& first, const Instruction& in, uint32_t) {
  const auto type = static_cast<MatrixType>(in.constants[0]);
  const int n = static_cast<int>(in.constants[1]);
  const bool a_in_registers = in.constants[2];
  const int a_at = n / 2, b_at = a_at + (a_in_registers ? 4 : 1);
  Block& block = *first.block;
  SharedMemory& shared = block.shared;
  const auto number = [&](uint64_t address) {
    if (address + 2 > shared.size())
      first.fail(in, all_lanes,
                 "descriptor reaches shared address " + std::to_string(address) + " of " +
                     std::to_string(shared.size()));
    const std::string problem = shared.access(first.index, address, 2, false);
    if (!problem.empty()) first.fail(in, all_lanes, problem);
    uint16_t x;
    std::memcpy(&x, shared.data() + address, 2);
    return half_of(type, x, 0);
  };
  const auto descriptor = [&](int at) { return first.reg<uint64_t>(in.operands[at])[0]; };
  static thread_local double a[64][16], b[16][256];
  for (int k = 0; k < 16; ++k) {
    for (int column = 0; column < n; ++column)
      b[k][column] = number(descriptor_address(descriptor(b_at), column, k, in.constants[4]));
    if (!a_in_registers)
      for (int row = 0; row < 64; ++row)
        a[row][k] = number(descriptor_address(descriptor(a_at), row, k, in.constants[3]));
  }
  for (int i = 0; i < 4; ++i) {
    Warp& w = block.warps[first.index + i];
    for (int lane = 0; a_in_registers && lane < lanes; ++lane)
      for (int e = 0; e < 8; ++e) {
        const auto [row, column] = a16_position(lane, e / 2, e % 2);
        const uint32_t pair = w.reg<uint32_t>(in.operands[a_at + e / 2])[lane];
        a[16 * i + row][column] = half_of(type, pair, e % 2);
      }
    const uint32_t accumulate = w.predicate(in.operands[b_at + 1]);
    for (int lane = 0; lane < lanes; ++lane)
      for (int e = 0; e < n / 2; ++e) {
        const auto [row, column] = c_position(lane, e % 4);
        float& d = w.reg<float>(in.operands[e])[lane];
        double sum = accumulate >> lane & 1 ? d : 0;
        for (int k = 0; k < 16; ++k) sum += a[16 * i + row][k] * b[k][e / 4 * 8 + column];
        d = static_cast<float>(sum);
      }
  }
}

}  // namespace

void register_matrix_operations() {
  const Kind whole = Kind::all_lanes_meet;
  register_operation("mma.m16n8k16.bf16", mma<MatrixType::bf16, 16>, whole);
  register_operation("mma.m16n8k8.bf16", mma<MatrixType::bf16, 8>, whole);
  register_operation("mma.m16n8k16.f16", mma<MatrixType::f16, 16>, whole);
  register_operation("mma.m16n8k8.f16", mma<MatrixType::f16, 8>, whole);
  register_operation("mma.m16n8k8.tf32", mma<MatrixType::tf32, 8>, whole);
  register_operation("mma.m16n8k4.tf32", mma<MatrixType::tf32, 4>, whole);
  register_operation("mma.m8n8k4.f64", mma_f64, whole);
  register_operation("ldmatrix", ldmatrix, whole);
  register_operation("stmatrix", stmatrix, whole);
  register_operation("wgmma", wgmma, Kind::warpgroup_meets);
}

}  // namespace gpu
