// Memory as the kernels see it: registered global buffers and one block's shared memory.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace gpu {

constexpr int sector_bytes = 32;  // what the L2 cache moves at least

/// One buffer that the kernel may touch. Addresses are those of the host.
struct Buffer {
  uint64_t begin = 0, end = 0;
  bool writable = false;
  std::string name;
  std::vector<uint8_t> read, written;  // by sector, from `begin` rounded down to a sector

  void touch(uint64_t address, uint64_t bytes, bool write);
  /// Bytes of the sectors touched, inside the buffer.
  uint64_t distinct_bytes(const std::vector<uint8_t>& sectors) const;
};

class GlobalMemory {
 public:
  explicit GlobalMemory(std::vector<Buffer> buffers);
  /// The buffer that holds all of [address, address + bytes); null where there is none.
  Buffer* find(uint64_t address, uint64_t bytes);
  const std::vector<Buffer>& buffers() const { return buffers_; }

 private:
  std::vector<Buffer> buffers_;
  Buffer* last_ = nullptr;
};

/// Shared memory of one block: poisoned, of the launch's true size, with the state of a race
/// detector for every cell: a few bytes that no store takes apart.
///
/// Two accesses of different warps to the same bytes, one of them a write, must be ordered by
/// barriers; every warp carries a vector clock for that. A destination of cp.async is in flight
/// from its issue to the wait of the thread that issued it: nobody may touch it.
class SharedMemory {
 public:
  SharedMemory(size_t bytes, int warps, bool check_races, int cell_bytes);
  void reset();
  char* data() { return data_.get(); }
  size_t size() const { return size_; }

  /// Empty, or what is wrong with this access.
  std::string access(int warp, uint64_t address, int bytes, bool write);
  std::string start_copy(int warp, uint64_t address, int bytes);
  void finish_copy(int warp, uint64_t address, int bytes);
  /// A barrier of these warps has completed.
  void synchronise(const std::vector<int>& warps);

 private:
  struct Cell {  // the last write, and the last reads by two different warps
    uint32_t write_clock = 0, read_clock = 0, other_read_clock = 0;
    uint8_t writer = 0, reader = 0, other_reader = 0;
    uint8_t in_flight = 0;
  };
  bool ordered(int warp, int before, uint32_t clock) const {
    return clock <= clocks_[static_cast<size_t>(warp) * warps_ + before];
  }
  uint32_t& own_clock(int warp) { return clocks_[static_cast<size_t>(warp) * warps_ + warp]; }

  size_t size_;
  int warps_;
  bool check_races_;
  uint64_t cell_bytes_;
  struct Free {
    void operator()(char* p) const { ::free(p); }
  };
  std::unique_ptr<char, Free> data_;
  std::vector<Cell> cells_;
  std::vector<uint32_t> clocks_;
};

}  // namespace gpu
