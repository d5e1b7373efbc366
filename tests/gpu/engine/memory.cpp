#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace gpu {

namespace {
uint64_t sector(uint64_t address) { return address / sector_bytes; }
}  // namespace

void Buffer::touch(uint64_t address, uint64_t bytes, bool write) {
  auto& sectors = write ? written : read;
  for (uint64_t s = sector(address); s <= sector(address + bytes - 1); ++s)
    sectors[s - sector(begin)] = 1;
}

uint64_t Buffer::distinct_bytes(const std::vector<uint8_t>& sectors) const {
  uint64_t sum = 0;
  for (size_t i = 0; i < sectors.size(); ++i) {
    if (!sectors[i]) continue;
    const uint64_t first = (sector(begin) + i) * sector_bytes;
    sum += std::min(first + sector_bytes, end) - std::max(first, begin);
  }
  return sum;
}

GlobalMemory::GlobalMemory(std::vector<Buffer> buffers) : buffers_(std::move(buffers)) {
  for (auto& buffer : buffers_) {
    if (buffer.begin == buffer.end) continue;
    const size_t sectors = sector(buffer.end - 1) - sector(buffer.begin) + 1;
    buffer.read.assign(sectors, false);
    buffer.written.assign(sectors, false);
  }
}

Buffer* GlobalMemory::find(uint64_t address, uint64_t bytes) {
  const auto holds = [&](const Buffer& b) {
    return address >= b.begin && address < b.end && b.end - address >= bytes;
  };
  if (last_ && holds(*last_)) return last_;
  const auto found = std::find_if(buffers_.begin(), buffers_.end(), holds);
  return found == buffers_.end() ? nullptr : last_ = &*found;
}

SharedMemory::SharedMemory(size_t bytes, int warps, bool check_races, int cell_bytes)
    : size_(bytes),
      warps_(warps),
      check_races_(check_races),
      cell_bytes_(cell_bytes),
      data_(static_cast<char*>(std::aligned_alloc(1024, (bytes + 1024) / 1024 * 1024))),
      cells_(check_races ? (bytes + cell_bytes_ - 1) / cell_bytes_ : 0),
      clocks_(static_cast<size_t>(warps) * warps) {}

void SharedMemory::reset() {
  std::memset(data_.get(), 0xff, size_);  // NaN in every floating format, -1 in integers
  std::fill(cells_.begin(), cells_.end(), Cell{});
  std::fill(clocks_.begin(), clocks_.end(), 0);
  for (int warp = 0; warp < warps_; ++warp) own_clock(warp) = 1;
}

std::string SharedMemory::access(int warp, uint64_t address, int bytes, bool write) {
  if (!check_races_) return {};
  const uint32_t now = own_clock(warp);
  for (uint64_t i = address / cell_bytes_; i <= (address + bytes - 1) / cell_bytes_; ++i) {
    Cell& cell = cells_[i];
    if (cell.in_flight)
      return "touches shared memory that a cp.async of warp " + std::to_string(cell.in_flight - 1) +
             " is still writing: a wait is missing or too weak";
    if (!ordered(warp, cell.writer, cell.write_clock))
      return "races with a write of warp " + std::to_string(cell.writer) +
             " to the same shared memory: no barrier between them";
    if (write) {
      const bool last = ordered(warp, cell.reader, cell.read_clock);
      if (!last || !ordered(warp, cell.other_reader, cell.other_read_clock))
        return "overwrites shared memory that warp " +
               std::to_string(last ? cell.other_reader : cell.reader) +
               " reads: no barrier between them";
      cell.writer = static_cast<uint8_t>(warp);
      cell.write_clock = now;
    } else {
      if (cell.reader != warp) {
        cell.other_reader = cell.reader;
        cell.other_read_clock = cell.read_clock;
      }
      cell.reader = static_cast<uint8_t>(warp);
      cell.read_clock = now;
    }
  }
  return {};
}

std::string SharedMemory::start_copy(int warp, uint64_t address, int bytes) {
  std::string problem = access(warp, address, bytes, true);
  if (problem.empty() && check_races_)
    for (uint64_t i = address / cell_bytes_; i <= (address + bytes - 1) / cell_bytes_; ++i)
      cells_[i].in_flight = static_cast<uint8_t>(warp + 1);
  return problem;
}

void SharedMemory::finish_copy(int warp, uint64_t address, int bytes) {
  if (!check_races_) return;
  for (uint64_t i = address / cell_bytes_; i <= (address + bytes - 1) / cell_bytes_; ++i) {
    cells_[i].in_flight = 0;
    cells_[i].writer = static_cast<uint8_t>(warp);
    cells_[i].write_clock = own_clock(warp);
  }
}

void SharedMemory::synchronise(const std::vector<int>& warps) {
  if (!check_races_) return;
  std::vector<uint32_t> joined(warps_, 0);
  for (const int warp : warps)
    for (int other = 0; other < warps_; ++other)
      joined[other] = std::max(joined[other], clocks_[static_cast<size_t>(warp) * warps_ + other]);
  for (const int warp : warps) {
    std::copy(joined.begin(), joined.end(), clocks_.begin() + static_cast<size_t>(warp) * warps_);
    ++own_clock(warp);
  }
}

}  // namespace gpu
