#include "machine.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <sstream>
#include <unordered_map>

namespace gpu {

namespace {

std::unordered_map<std::string, Operation>& table() {
  static std::unordered_map<std::string, Operation> operations;
  return operations;
}

int first_lane(uint32_t mask) { return __builtin_ctz(mask); }

template <class F>
void for_lanes(uint32_t mask, F f) {
  for (; mask; mask &= mask - 1) f(first_lane(mask));
}

template <class T>
std::vector<T> in_order(std::vector<T> items, Order order, std::mt19937_64& random) {
  if (order == Order::reverse) std::reverse(items.begin(), items.end());
  if (order == Order::random) std::shuffle(items.begin(), items.end(), random);
  return items;
}

std::string text_of(const Dim3& d) {
  std::ostringstream out;
  out << '(' << d.x << ", " << d.y << ", " << d.z << ')';
  return out.str();
}

}  // namespace

void register_operation(const std::string& name, Handler run, Kind kind) {
  if (!table().emplace(name, Operation{run, kind}).second)
    throw std::logic_error("operation registered twice: " + name);
}

const Operation* find_operation(const std::string& name) {
  const auto found = table().find(name);
  return found == table().end() ? nullptr : &found->second;
}

std::vector<std::string> operation_names() {
  std::vector<std::string> names;
  for (const auto& [name, operation] : table()) names.push_back(name);
  std::sort(names.begin(), names.end());
  return names;
}

// Warp

void Warp::start(Block& owner, int warp_index) {
  block = &owner;
  index = warp_index;
  const Launch& launch = owner.launch;
  const Program& program = launch.program;
  if (!registers) {
    const size_t size = (program.register_bytes + 63) / 64 * 64 + 64;
    registers.reset(static_cast<char*>(std::aligned_alloc(64, size)));
  }
  std::memset(registers.get(), 0xff, program.register_bytes);
  local.assign(static_cast<size_t>(program.local_bytes) * lanes, '\xff');
  for (const auto& [place, bytes, value] : program.constants) {
    if (bytes == 0) set_predicate(place, all_lanes, value ? all_lanes : 0);
    if (bytes == 2) std::fill_n(reg<uint16_t>(place), lanes, static_cast<uint16_t>(value));
    if (bytes == 4) std::fill_n(reg<uint32_t>(place), lanes, static_cast<uint32_t>(value));
    if (bytes == 8) std::fill_n(reg<uint64_t>(place), lanes, value);
  }
  const uint64_t threads = launch.block.size();
  existing = 0;
  for (int lane = 0; lane < lanes; ++lane) {
    const uint64_t thread = uint64_t(index) * lanes + lane;
    if (thread < threads) existing |= 1u << lane;
    const Dim3 &b = launch.block, &g = launch.grid, &c = owner.index;
    const uint32_t bit = 1u << lane;
    const std::array<uint32_t, clock_zero + 1> values = {uint32_t(thread % b.x),
                                                         uint32_t(thread / b.x % b.y),
                                                         uint32_t(thread / b.x / b.y),
                                                         b.x,
                                                         b.y,
                                                         b.z,
                                                         c.x,
                                                         c.y,
                                                         c.z,
                                                         g.x,
                                                         g.y,
                                                         g.z,
                                                         uint32_t(lane),
                                                         uint32_t(index),
                                                         uint32_t((threads + lanes - 1) / lanes),
                                                         bit,
                                                         bit - 1,
                                                         bit | (bit - 1),
                                                         ~(bit | (bit - 1)),
                                                         ~(bit - 1),
                                                         launch.dynamic_shared_bytes,
                                                         launch.shared_bytes,
                                                         0};
    for (const auto& [place, special] : program.specials)
      reg<uint32_t>(place)[lane] = values[special];
  }
  alive = existing;
  waiting = 0;
  pc.fill(0);
  for (int lane = 0; lane < lanes; ++lane) open_group[lane].clear(), groups[lane].clear();
  state = State::running;
}

void Warp::fail(const Instruction& in, uint32_t mask, const std::string& what) const {
  std::ostringstream out;
  out << block->launch.program.name << ", PTX line " << in.line << ", `" << in.text << "`: " << what
      << " (block " << text_of(block->index) << ", warp " << index << ", lanes";
  for_lanes(mask, [&](int lane) { out << ' ' << lane; });
  out << ')';
  throw Error(out.str());
}

void Warp::go(uint32_t which, uint32_t to) {
  for_lanes(which, [&](int lane) { pc[lane] = to; });
}

uint32_t Warp::waiting_at(uint32_t at) const {
  uint32_t found = 0;
  for_lanes(waiting, [&](int lane) { found |= uint32_t(pc[lane] == at) << lane; });
  return found;
}

Warp::Choice Warp::choose_lanes() {
  const uint32_t ready = alive & ~waiting;
  auto& random = block->launch.random;
  constexpr uint32_t never = 0xffffffff;
  switch (block->launch.options.lanes) {
    case LaneMode::forward: return {ready & -ready, never, ~uint64_t{0}};
    case LaneMode::reverse: return {1u << (31 - __builtin_clz(ready)), never, ~uint64_t{0}};
    case LaneMode::random: {
      int skip = static_cast<int>(random() % __builtin_popcount(ready));
      uint32_t rest = ready;
      while (skip--) rest &= rest - 1;
      const int leader = first_lane(rest);
      uint32_t same = 0;
      for_lanes(ready, [&](int lane) { same |= uint32_t(pc[lane] == pc[leader]) << lane; });
      const uint32_t some = same & static_cast<uint32_t>(random());
      return {some | 1u << leader, never, 1 + random() % 32};
    }
    case LaneMode::lockstep: break;
  }
  // The lanes that are furthest behind: where paths meet again, nobody has gone on alone.
  uint32_t least = never, stop = never, active = 0;
  for_lanes(ready, [&](int lane) { least = std::min(least, pc[lane]); });
  for_lanes(ready, [&](int lane) {
    if (pc[lane] == least)
      active |= 1u << lane;
    else
      stop = std::min(stop, pc[lane]);
  });
  return {active, stop, ~uint64_t{0}};
}

void Warp::run(uint64_t steps) {
  while (state == State::running && steps > 0) {
    if (!alive) {
      state = State::finished;
    } else if (alive == waiting) {
      settle_waiting();
    } else {
      execute_straight(choose_lanes(), steps);
    }
  }
}

void Warp::execute_straight(const Choice& choice, uint64_t& steps) {
  Launch& launch = block->launch;
  const Instruction* code = launch.program.code.data();
  const uint32_t active = choice.active;
  uint32_t at = pc[first_lane(active)];
  for (uint64_t left = std::min(choice.steps, steps); left > 0; --left) {
    --steps;
    const Instruction& in = code[at];
    if (in.kind == Kind::plain) {
      ++launch.counts[in.index].issued;
      if (const uint32_t mask = active_mask(in, active)) in.run(*this, in, mask);
      ++at;
    } else {
      switch (in.kind) {
        case Kind::branch:
        case Kind::branch_indexed: branch(in, at, active); break;
        case Kind::exit: leave(in, at, active); break;
        case Kind::block_barrier:
        case Kind::warpgroup_meets: stop_whole(in, at, active); break;
        default: meet(in, at, active);
      }
      if (state != State::running || (active & ~alive) || (active & waiting)) return;
      at = pc[first_lane(active)];
      for (uint32_t rest = active; rest; rest &= rest - 1)
        if (pc[first_lane(rest)] != at) return;
    }
    if (at >= choice.stop) break;
  }
  go(active, at);
}

void Warp::branch(const Instruction& in, uint32_t at, uint32_t active) {
  ++block->launch.counts[in.index].issued;
  const uint32_t taken = active_mask(in, active);
  go(active & ~taken, at + 1);
  if (in.kind == Kind::branch) {
    go(taken, static_cast<uint32_t>(in.constants[0]));
    return;
  }
  for_lanes(taken, [&](int lane) {
    const uint32_t choice = reg<uint32_t>(in.operands[0])[lane];
    if (choice >= in.constants.size()) fail(in, 1u << lane, "index outside the branch targets");
    pc[lane] = static_cast<uint32_t>(in.constants[choice]);
  });
}

void Warp::leave(const Instruction& in, uint32_t at, uint32_t active) {
  ++block->launch.counts[in.index].issued;
  const uint32_t gone = active_mask(in, active);
  for_lanes(gone, [&](int lane) {
    bool pending = !open_group[lane].empty();
    for (const auto& group : groups[lane]) pending |= !group.empty();
    if (pending) fail(in, 1u << lane, "the thread exits with a cp.async that it never waited for");
  });
  alive &= ~gone;
  go(active & ~gone, at + 1);
}

void Warp::meet(const Instruction& in, uint32_t at, uint32_t active) {
  const uint32_t arriving = active_mask(in, active);
  go(active & ~arriving, at + 1);
  if (!arriving) return;
  uint32_t needed = all_lanes;
  if (in.kind == Kind::named_lanes_meet) {
    const uint32_t* members = reg<uint32_t>(in.operands.back());
    needed = members[first_lane(arriving)];
    for_lanes(arriving, [&](int lane) {
      if (members[lane] != needed) fail(in, 1u << lane, "lanes disagree on the member mask");
    });
    if (arriving & ~needed) fail(in, arriving & ~needed, "lane is not in its own member mask");
  }
  if (needed & ~alive) fail(in, needed & ~alive, "needs lanes that have exited or do not exist");
  const uint32_t here = waiting_at(at) | arriving;
  go(arriving, at);
  if (here != needed) {
    waiting |= arriving;
    return;
  }
  ++block->launch.counts[in.index].issued;
  in.run(*this, in, here);
  waiting &= ~here;
  go(here, at + 1);
}

void Warp::stop_whole(const Instruction& in, uint32_t at, uint32_t active) {
  const uint32_t arriving = active_mask(in, active);
  go(active & ~arriving, at + 1);
  if (!arriving) return;
  go(arriving, at);
  const uint32_t here = waiting_at(at) | arriving;
  if (here != alive) {
    waiting |= arriving;
    return;
  }
  waiting = 0;
  ++block->launch.counts[in.index].issued;
  stopped_at = &in;
  stopped_lanes = here;
  if (in.kind == Kind::block_barrier) {
    state = State::at_barrier;
    in.run(*this, in, here);
  } else {
    state = State::at_warpgroup;
  }
  go(here, at + 1);
}

void Warp::settle_waiting() {
  const uint32_t at = pc[first_lane(waiting)];
  const Instruction& in = block->launch.program.code[at];
  if (waiting_at(at) == alive && in.kind == Kind::block_barrier) {
    waiting = 0;
    stop_whole(in, at, alive);
    return;
  }
  fail(
      in, waiting_at(at),
      "deadlock: these lanes wait here for lanes of their warp that wait elsewhere or have exited");
}

// Block

Block::Block(Launch& owner)
    : launch(owner),
      shared(owner.shared_bytes, static_cast<int>((owner.block.size() + lanes - 1) / lanes),
             owner.options.check_races, owner.program.finest_store),
      warps((owner.block.size() + lanes - 1) / lanes) {}

void Block::run(Dim3 where) {
  index = where;
  shared.reset();
  for (size_t i = 0; i < warps.size(); ++i) warps[i].start(*this, static_cast<int>(i));
  std::vector<size_t> numbers(warps.size());
  std::iota(numbers.begin(), numbers.end(), size_t{0});
  const Order order = launch.options.warps;
  for (;;) {
    bool progressed = false, finished = true;
    for (const size_t i : in_order(numbers, order, launch.random)) {
      Warp& warp = warps[i];
      if (warp.state == Warp::State::running) {
        progressed = true;
        // Without an end a warp runs up to its next barrier: the largest skew between warps.
        warp.run(order == Order::random ? 1 + launch.random() % 256 : ~uint64_t{0});
      }
      finished &= warp.state == Warp::State::finished;
    }
    if (finished) return;
    progressed |= run_warpgroups();
    progressed |= release_barriers();
    if (!progressed) report_deadlock();
  }
}

bool Block::run_warpgroups() {
  bool any = false;
  for (size_t first = 0; first + 4 <= warps.size(); first += 4) {
    const auto begin = warps.begin() + static_cast<std::ptrdiff_t>(first);
    if (!std::all_of(begin, begin + 4, [&](const Warp& w) {
          return w.state == Warp::State::at_warpgroup && w.stopped_at == begin->stopped_at &&
                 w.stopped_lanes == all_lanes;
        }))
      continue;
    begin->stopped_at->run(*begin, *begin->stopped_at, all_lanes);
    std::for_each(begin, begin + 4, [](Warp& w) { w.state = Warp::State::running; });
    any = true;
  }
  return any;
}

namespace {

/// bar.red: combines the predicates of all threads that have arrived.
void reduce_predicates(std::vector<Warp*>& arrived) {
  const Instruction& in = *arrived.front()->stopped_at;
  if (in.constants.empty()) return;
  enum { all = 1, any = 2, number = 3 };
  uint32_t ones = 0, threads = 0;
  for (Warp* w : arrived) {
    uint32_t p = w->predicate(in.operands.back());
    if (in.constants[1]) p = ~p;
    ones += __builtin_popcount(p & w->stopped_lanes);
    threads += __builtin_popcount(w->stopped_lanes);
  }
  for (Warp* w : arrived) {
    const bool truth = in.constants[0] == all ? ones == threads : ones > 0;
    if (in.constants[0] == number)
      for_lanes(w->stopped_lanes, [&](int l) { w->reg<uint32_t>(in.operands[0])[l] = ones; });
    else
      w->set_predicate(in.operands[0], w->stopped_lanes, truth ? all_lanes : 0);
  }
}

}  // namespace

bool Block::release_barriers() {
  bool any = false;
  for (uint32_t id = 0; id < 16; ++id) {
    std::vector<Warp*> arrived;
    std::vector<int> numbers;
    size_t unfinished = 0;
    for (Warp& warp : warps) {
      unfinished += warp.state != Warp::State::finished;
      if (warp.state != Warp::State::at_barrier || warp.barrier != id) continue;
      arrived.push_back(&warp);
      numbers.push_back(warp.index);
    }
    if (arrived.empty()) continue;
    const uint32_t threads = arrived.front()->barrier_threads;
    for (const Warp* warp : arrived)
      if (warp->barrier_threads != threads)
        warp->fail(*warp->stopped_at, warp->stopped_lanes, "warps disagree on the thread count");
    if (threads ? arrived.size() * lanes != threads : arrived.size() != unfinished) continue;
    reduce_predicates(arrived);
    shared.synchronise(numbers);
    for (Warp* warp : arrived) warp->state = Warp::State::running;
    any = true;
  }
  return any;
}

void Block::report_deadlock() const {
  std::ostringstream out;
  out << launch.program.name << ": deadlock in block " << text_of(index) << ':';
  for (const Warp& warp : warps)
    if (warp.state != Warp::State::finished)
      out << " warp " << warp.index << " waits in `" << warp.stopped_at->text << "` (PTX line "
          << warp.stopped_at->line << ");";
  throw Error(out.str());
}

// Launch

Launch::Launch(const Program& kernel, Dim3 grid_size, Dim3 block_size, uint32_t dynamic_shared,
               std::vector<char> parameters, std::vector<Buffer> buffers, Options how)
    : program(kernel),
      grid(grid_size),
      block(block_size),
      shared_bytes(kernel.shared_bytes + dynamic_shared),
      dynamic_shared_bytes(dynamic_shared),
      params(std::move(parameters)),
      memory(std::move(buffers)),
      options(how),
      counts(kernel.code.size()),
      random(how.seed) {}

void Launch::run() {
  std::vector<uint64_t> numbers(grid.size());
  std::iota(numbers.begin(), numbers.end(), uint64_t{0});
  Block machine(*this);
  for (const uint64_t i : in_order(numbers, options.blocks, random))
    machine.run({static_cast<uint32_t>(i % grid.x), static_cast<uint32_t>(i / grid.x % grid.y),
                 static_cast<uint32_t>(i / grid.x / grid.y)});
}

}  // namespace gpu
