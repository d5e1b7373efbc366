// The machine that executes a decoded PTX kernel: warps of 32 lanes, blocks, a launch.
//
// A warp instruction is executed for all its active lanes at once. Every lane has its own program
// counter, so divergent code and lanes that run at different speeds are possible; lanes meet again
// at `.sync` instructions, as on the hardware since Volta.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "memory.h"

namespace gpu {

constexpr int lanes = 32;
constexpr uint32_t all_lanes = 0xffffffff;
// Windows of generic addresses, far from any host address.
constexpr uint64_t shared_window = uint64_t{0x51} << 56, local_window = uint64_t{0x52} << 56,
                   param_window = uint64_t{0x53} << 56, window_mask = uint64_t{0xff} << 56;

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, uint32_t mask);

/// How the scheduler treats an instruction.
enum class Kind : uint8_t {
  plain,
  branch,
  branch_indexed,
  exit,
  all_lanes_meet,    // .aligned instructions that need the whole warp
  named_lanes_meet,  // .sync instructions with a member mask as their last operand
  block_barrier,
  warpgroup_meets,  // wgmma: four warps together
};

struct Instruction {
  Handler run = nullptr;
  Kind kind = Kind::plain;
  int32_t guard = -1;  // register of the predicate; -1: always
  bool guard_negated = false;
  std::vector<uint32_t> operands;  // places in the register file, in bytes
  std::vector<int64_t> constants;  // meaning depends on the instruction
  int line = 0;                    // of the PTX text
  int index = 0;
  std::string text;
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Accesses of one instruction to one memory.
struct Traffic {
  uint64_t requests = 0;  // warp instructions with an active lane
  uint64_t units = 0;     // 32-byte sectors (global) or wavefronts (shared)
  uint64_t ideal = 0;     // the least units for the same bytes
  uint64_t bytes = 0;     // all lanes together, repeated bytes counted again
};

/// What the counters of one instruction hold after a launch.
struct Count {
  uint64_t issued = 0;  // warp instructions
  Traffic global, shared;
};

enum class Order { forward, reverse, random };
enum class LaneMode { lockstep, forward, reverse, random };
enum class CopyMode { late, early, random };

struct Options {
  Order warps = Order::forward, blocks = Order::forward;
  LaneMode lanes = LaneMode::lockstep;
  CopyMode copies = CopyMode::late;
  bool check_races = true;
  uint64_t seed = 0;
};

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t size() const { return uint64_t{x} * y * z; }
};

/// A value that all lanes hold at a place of the register file. `bytes` 0: a predicate.
struct Constant {
  uint32_t place;
  int bytes;
  uint64_t value;
};

/// A decoded kernel. The register file of a warp starts with the constants; special registers
/// follow in the order of SpecialRegister.
struct Program {
  std::string name;
  std::vector<Instruction> code;
  std::vector<Constant> constants;
  std::vector<std::pair<uint32_t, int>> specials;  // place, SpecialRegister
  uint32_t register_bytes = 0;
  uint32_t shared_bytes = 0;  // static
  uint32_t local_bytes = 0;
  int finest_store = 4;  // the fewest bytes that a store may write to shared memory, at most 4
};

enum SpecialRegister {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid,
  nwarpid,
  lanemask_eq,
  lanemask_lt,
  lanemask_le,
  lanemask_gt,
  lanemask_ge,
  dynamic_smem_size,
  total_smem_size,
  clock_zero,
};

struct Copy {
  uint64_t destination;  // in shared memory
  uint64_t source;
  int bytes, source_bytes;
  bool done;
};

struct Launch;
struct Block;

struct Warp {
  Block* block = nullptr;
  int index = 0;
  std::unique_ptr<char, void (*)(void*)> registers{nullptr, ::free};
  std::vector<char> local;  // of all lanes, one after the other
  uint32_t existing = 0;    // lanes that the block has
  uint32_t alive = 0;
  uint32_t waiting = 0;  // lanes that wait in a .sync instruction for others
  std::array<uint32_t, lanes> pc{};
  std::array<std::vector<Copy>, lanes> open_group;
  std::array<std::deque<std::vector<Copy>>, lanes> groups;

  enum class State { running, at_barrier, at_warpgroup, finished } state = State::running;
  uint32_t barrier = 0;
  uint32_t barrier_threads = 0;             // 0: the whole block
  const Instruction* stopped_at = nullptr;  // the barrier or wgmma that the warp waits in
  uint32_t stopped_lanes = 0;

  template <class T>
  T* reg(uint32_t place) {
    return reinterpret_cast<T*>(registers.get() + place);
  }
  uint32_t predicate(uint32_t place) { return *reg<uint32_t>(place); }
  void set_predicate(uint32_t place, uint32_t mask, uint32_t value) {
    uint32_t& p = *reg<uint32_t>(place);
    p = (p & ~mask) | (value & mask);
  }
  uint32_t active_mask(const Instruction& in, uint32_t active) {
    if (in.guard < 0) return active;
    const uint32_t p = predicate(in.guard);
    return active & (in.guard_negated ? ~p : p);
  }

  void start(Block& owner, int warp_index);
  /// Runs until all lanes wait, the warp has to wait for others, or `steps` are used up.
  void run(uint64_t steps);
  [[noreturn]] void fail(const Instruction& in, uint32_t mask, const std::string& what) const;

 private:
  struct Choice {
    uint32_t active, stop;  // lanes to run, and the program counter where others join them
    uint64_t steps;
  };
  Choice choose_lanes();
  void execute_straight(const Choice& choice, uint64_t& steps);
  void branch(const Instruction& in, uint32_t at, uint32_t active);
  void leave(const Instruction& in, uint32_t at, uint32_t active);
  void meet(const Instruction& in, uint32_t at, uint32_t active);
  void stop_whole(const Instruction& in, uint32_t at, uint32_t active);
  void settle_waiting();
  void go(uint32_t which, uint32_t to);
  uint32_t waiting_at(uint32_t at) const;
};

struct Block {
  Launch& launch;
  Dim3 index;
  SharedMemory shared;
  std::vector<Warp> warps;

  explicit Block(Launch& owner);
  void run(Dim3 where);

 private:
  bool release_barriers();
  bool run_warpgroups();
  [[noreturn]] void report_deadlock() const;
};

struct Launch {
  const Program& program;
  Dim3 grid, block;
  uint32_t shared_bytes = 0;  // static and dynamic
  uint32_t dynamic_shared_bytes = 0;
  std::vector<char> params;
  GlobalMemory memory;
  Options options;
  std::vector<Count> counts;
  std::mt19937_64 random;

  Launch(const Program& kernel, Dim3 grid_size, Dim3 block_size, uint32_t dynamic_shared,
         std::vector<char> parameters, std::vector<Buffer> buffers, Options how);
  void run();
};

/// Handlers by name, for example "add.f32"; kinds other than plain are named too.
struct Operation {
  Handler run;
  Kind kind;
};
void register_operation(const std::string& name, Handler run, Kind kind = Kind::plain);
const Operation* find_operation(const std::string& name);
std::vector<std::string> operation_names();

}  // namespace gpu
