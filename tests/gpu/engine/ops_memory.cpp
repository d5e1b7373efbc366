// ld, st, atom, red, cp.async and address arithmetic.
//
// Operands of a load: destinations, address; of a store: address, values. constants: space, offset,
// bytes of the address register. Names: "ld", bytes and kind of an element in memory, bytes of the
// register.
#include <algorithm>
#include <cstring>
#include <set>

#include "lanes.h"
#include "numbers.h"
#include "operations.h"

namespace gpu {

namespace {

enum Space : int64_t { generic, global, shared, local, param };
enum Constant : size_t { space_at, offset_at, address_bytes_at, more_at };

/// The addresses of the active lanes, with the window of each generic one replaced by its space.
struct Access {
  Warp& warp;
  const Instruction& in;
  uint32_t mask;
  int bytes;  // of all elements of a lane
  bool write;
  Space space;
  uint64_t address[lanes];
  bool consecutive = false;  // all lanes, one behind the other: they are handled as one range

  Access(Warp& w, const Instruction& i, uint32_t m, uint32_t place, int total, bool writes,
         size_t first_constant = 0)
      : warp(w),
        in(i),
        mask(m),
        bytes(total),
        write(writes),
        space(static_cast<Space>(i.constants[first_constant + space_at])) {
    const auto offset = static_cast<uint64_t>(i.constants[first_constant + offset_at]);
    const bool wide = i.constants[first_constant + address_bytes_at] == 8;
    for (int l = 0; l < lanes; ++l)
      address[l] = (wide ? w.reg<uint64_t>(place)[l] : w.reg<uint32_t>(place)[l]) + offset;
    if (space == generic) resolve_generic();
    if (space == shared || space == param || space == local)
      for (auto& a : address) a &= ~window_mask;
    check_alignment();
    find_run();
  }

  /// Where every active lane reads or writes on the host; checks the bounds.
  void locate(char* (&where)[lanes]) const {
    if (consecutive && (space == shared || space == global)) {
      if (char* first = range_start(address[0], static_cast<uint64_t>(bytes) * lanes)) {
        for (int l = 0; l < lanes; ++l) where[l] = first + static_cast<ptrdiff_t>(l) * bytes;
        return;
      }
    }
    for (int l = 0; l < lanes; ++l)
      if (mask >> l & 1) where[l] = at(l);
  }

  /// Where lane `l` reads or writes on the host; checks the bounds.
  char* at(int l) const {
    const uint64_t a = address[l];
    Launch& launch = warp.block->launch;
    const auto size = static_cast<uint64_t>(bytes);
    switch (space) {
      case shared:
        if (char* found = range_start(a, size)) return found;
        fail(l, "outside the " + std::to_string(warp.block->shared.size()) +
                    " bytes of shared memory of this launch");
      case local: {
        const uint64_t local_bytes = launch.program.local_bytes;
        if (a > local_bytes || local_bytes - a < size) fail(l, "outside the local memory");
        return warp.local.data() + static_cast<size_t>(l) * local_bytes + a;
      }
      case param:
        if (a > launch.params.size() || launch.params.size() - a < size)
          fail(l, "outside the kernel parameters");
        if (write) fail(l, "writes a kernel parameter");
        return launch.params.data() + a;
      default:
        if (char* found = range_start(a, size)) return found;
        const Buffer* buffer = launch.memory.find(a, size);
        if (!buffer) fail(l, "outside every buffer" + nearest(a));
        fail(l, "writes the read-only buffer " + buffer->name);
    }
  }

  [[noreturn]] void fail(int l, const std::string& what) const {
    static const char* names[] = {"generic", "global", "shared", "local", "param"};
    char hex[32];
    std::snprintf(hex, sizeof hex, "0x%llx", static_cast<unsigned long long>(address[l]));
    warp.fail(
        in, 1u << l,
        std::to_string(bytes) + " bytes at " + names[space] + " address " + hex + ": " + what);
  }

  /// Counts the access and looks for races.
  void record() const {
    if (space != global && space != shared) return;
    Count& counts = warp.block->launch.counts[in.index];
    Traffic& count = space == global ? counts.global : counts.shared;
    ++count.requests;
    count.bytes += static_cast<uint64_t>(bytes) * __builtin_popcount(mask);
    if (space == global)
      count_sectors(count);
    else
      count_wavefronts(count);
  }

  /// Of these lanes: a store of what is there already disturbs nobody, and Triton's warps that
  /// hold the same part of a tensor all store it.
  void check_races(uint32_t changing) const {
    if (space != shared) return;
    for (int l = 0; l < lanes; ++l)
      if (changing >> l & 1) {
        const std::string problem = warp.block->shared.access(warp.index, address[l], bytes, write);
        if (!problem.empty()) fail(l, problem);
      }
  }

 private:
  void resolve_generic() {
    space = global;
    bool first = true;
    for (int l = 0; l < lanes; ++l) {
      if (!(mask >> l & 1)) continue;
      const uint64_t window = address[l] & window_mask;
      const Space own = window == shared_window  ? shared
                        : window == local_window ? local
                        : window == param_window ? param
                                                 : global;
      if (!first && own != space) fail(l, "lanes of one generic access lie in different spaces");
      space = own;
      first = false;
    }
  }

  void find_run() {
    if (mask != all_lanes) return;
    uint64_t difference = 0;
    for (int l = 1; l < lanes; ++l)
      difference |= (address[l] - address[0]) ^ (static_cast<uint64_t>(l) * bytes);
    consecutive = difference == 0;
  }

  /// Host address of a range of shared or global memory; null if it is not all allowed.
  char* range_start(uint64_t first, uint64_t size) const {
    if (space == shared) {
      SharedMemory& memory = warp.block->shared;
      const bool inside = first <= memory.size() && memory.size() - first >= size;
      return inside ? memory.data() + first : nullptr;
    }
    Buffer* buffer = warp.block->launch.memory.find(first, size);
    if (!buffer || (write && !buffer->writable)) return nullptr;
    buffer->touch(first, size, write);
    return reinterpret_cast<char*>(first);
  }

  void check_alignment() const {
    for (int l = 0; l < lanes; ++l)
      if ((mask >> l & 1) && address[l] % static_cast<uint64_t>(bytes))
        fail(l, "not aligned to the size of the access");
  }

  std::string nearest(uint64_t a) const {
    const Buffer* best = nullptr;
    uint64_t least = ~uint64_t{0};
    for (const Buffer& b : warp.block->launch.memory.buffers()) {
      const uint64_t distance = a < b.begin ? b.begin - a : a - std::min(a, b.end);
      if (distance < least) least = distance, best = &b;
    }
    if (!best) return "; the launch has none";
    return "; the nearest is " + best->name + ", " +
           (a < best->begin ? std::to_string(best->begin - a) + " bytes behind the access"
                            : "where it starts " + std::to_string(a - best->begin) +
                                  " bytes in, of " + std::to_string(best->end - best->begin));
  }

  /// Number of different values among `number` ones, which it sorts.
  static int count_distinct(uint64_t* values, int number) {
    std::sort(values, values + number);
    return static_cast<int>(std::unique(values, values + number) - values);
  }

  /// Lanes are aligned to their size, hence each lies within one sector.
  void count_sectors(Traffic& count) const {
    if (consecutive) {
      const uint64_t last = address[lanes - 1] + bytes - 1;
      count.units += last / sector_bytes - address[0] / sector_bytes + 1;
      count.ideal += bytes;
      return;
    }
    uint64_t sectors[lanes], distinct[lanes];
    int number = 0;
    for (int l = 0; l < lanes; ++l) {
      if (!(mask >> l & 1)) continue;
      sectors[number] = address[l] / sector_bytes;
      distinct[number++] = address[l];
    }
    count.units += count_distinct(sectors, number);
    count.ideal += (count_distinct(distinct, number) * bytes + sector_bytes - 1) / sector_bytes;
  }

  /// Accesses of 8 and 16 bytes are served by half and quarter warps; a wavefront serves each bank
  /// once, and lanes that want the same word share it.
  void count_wavefronts(Traffic& count) const {
    const int group = bytes <= 4 ? lanes : bytes == 8 ? 16 : 8;
    if (consecutive) {
      count.units += lanes / group;
      count.ideal += lanes / group;
      return;
    }
    for (int first = 0; first < lanes; first += group) {
      uint64_t words[2 * lanes];
      int number = 0;
      for (int l = first; l < first + group; ++l)
        if (mask >> l & 1)
          for (int b = 0; b < std::max(bytes, 4); b += 4) words[number++] = (address[l] + b) / 4;
      if (number == 0) continue;
      number = count_distinct(words, number);
      int banks[32] = {}, most = 0;
      for (int i = 0; i < number; ++i) most = std::max(most, ++banks[words[i] % 32]);
      count.units += most;
      count.ideal += 1;
    }
  }
};

template <class Element, class Register>
void load(Warp& w, const Instruction& in, uint32_t mask) {
  const size_t number = in.operands.size() - 1;
  const Access access(w, in, mask, in.operands[number], static_cast<int>(number * sizeof(Element)),
                      false);
  access.record();
  char* where[lanes];
  access.locate(where);
  for (int l = 0; l < lanes; ++l) {
    if (!(mask >> l & 1)) continue;
    Element elements[8];
    std::memcpy(elements, where[l], number * sizeof(Element));
    for (size_t i = 0; i < number; ++i)
      w.reg<Register>(in.operands[i])[l] = static_cast<Register>(elements[i]);
  }
  access.check_races(mask);
}

template <class Element, class Register>
void store(Warp& w, const Instruction& in, uint32_t mask) {
  const size_t number = in.operands.size() - 1;
  const Access access(w, in, mask, in.operands[0], static_cast<int>(number * sizeof(Element)),
                      true);
  access.record();
  char* where[lanes];
  access.locate(where);
  uint32_t changing = 0;
  for (int l = 0; l < lanes; ++l) {
    if (!(mask >> l & 1)) continue;
    Element elements[8];
    for (size_t i = 0; i < number; ++i)
      elements[i] = static_cast<Element>(w.reg<Register>(in.operands[i + 1])[l]);
    const size_t size = number * sizeof(Element);
    if (std::memcmp(where[l], elements, size) != 0) changing |= 1u << l;
    std::memcpy(where[l], elements, size);
  }
  access.check_races(changing);
}

template <class Element, class Register>
void load_store(const std::string& name) {
  register_operation("ld." + name, load<Element, Register>);
  register_operation("st." + name, store<Element, Register>);
}

// Atomics: operands d (atom only), address, value, and for cas the new value.

template <class T, bool returns, class F>
void atomic(const std::string& name, F) {
  register_operation(name, [](Warp& w, const Instruction& in, uint32_t mask) {
    const size_t at = returns ? 1 : 0;
    const Access access(w, in, mask, in.operands[at], sizeof(T), true);
    access.record();
    const T* value = w.reg<T>(in.operands[at + 1]);
    const T* other = w.reg<T>(in.operands.back());
    const auto apply = [&](int l) {
      char* p = access.at(l);
      T old, result;
      std::memcpy(&old, p, sizeof old);
      result = F{}(old, value[l], other[l]);
      std::memcpy(p, &result, sizeof result);
      if constexpr (returns) w.reg<T>(in.operands[0])[l] = old;
    };
    const bool backward = w.block->launch.options.warps == Order::reverse;
    for (int i = 0; i < lanes; ++i) {
      const int l = backward ? lanes - 1 - i : i;
      if (mask >> l & 1) apply(l);
    }
  });
}

template <class T, class F>
void atom_and_red(const std::string& name, F f) {
  atomic<T, true>("atom." + name, f);
  atomic<T, false>("red." + name, f);
}

// cp.async: operands destination, source, bytes to copy (the rest is zeros). constants: those of
// the destination, those of the source, size.

void perform(Warp& w, Copy& copy) {
  if (copy.done) return;
  char* to = w.block->shared.data() + copy.destination;
  std::memcpy(to, reinterpret_cast<const char*>(copy.source), copy.source_bytes);
  std::memset(to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  copy.done = true;
}

void cp_async(Warp& w, const Instruction& in, uint32_t mask) {
  const int bytes = static_cast<int>(in.constants[2 * more_at]);
  const uint32_t* wanted = w.reg<uint32_t>(in.operands[2]);
  uint32_t reading = 0;
  for (int l = 0; l < lanes; ++l) {
    if (!(mask >> l & 1)) continue;
    if (wanted[l] > static_cast<uint32_t>(bytes))
      w.fail(in, 1u << l, "more source bytes than size");
    if (wanted[l]) reading |= 1u << l;
  }
  const Access to(w, in, mask, in.operands[0], bytes, true);
  const Access from(w, in, reading, in.operands[1], bytes, false, more_at);
  to.record();
  if (reading) from.record();
  auto& launch = w.block->launch;
  for (int l = 0; l < lanes; ++l) {
    if (!(mask >> l & 1)) continue;
    to.at(l);
    if (wanted[l]) {
      Access exact = from;
      exact.bytes = static_cast<int>(wanted[l]);
      exact.at(l);
    }
    const std::string problem = w.block->shared.start_copy(w.index, to.address[l], bytes);
    if (!problem.empty()) to.fail(l, problem);
    Copy copy{to.address[l], from.address[l], bytes, static_cast<int>(wanted[l]), false};
    const CopyMode mode = launch.options.copies;
    if (mode == CopyMode::early || (mode == CopyMode::random && launch.random() % 2))
      perform(w, copy);
    w.open_group[l].push_back(copy);
  }
}

void commit_group(Warp& w, const Instruction&, uint32_t mask) {
  for (int l = 0; l < lanes; ++l)
    if (mask >> l & 1) {
      w.groups[l].push_back(std::move(w.open_group[l]));
      w.open_group[l].clear();
    }
}

void wait_for_groups(Warp& w, uint32_t mask, size_t left) {
  for (int l = 0; l < lanes; ++l) {
    if (!(mask >> l & 1)) continue;
    for (; w.groups[l].size() > left; w.groups[l].pop_front())
      for (Copy& copy : w.groups[l].front()) {
        perform(w, copy);
        w.block->shared.finish_copy(w.index, copy.destination, copy.bytes);
      }
  }
}

/// cvta: operands d, a; constants[0] is added (to generic) or taken off where it is set (from
/// generic).
void to_generic(Warp& w, const Instruction& in, uint32_t mask) {
  const auto window = static_cast<uint64_t>(in.constants[0]);
  map1<uint64_t, uint64_t>(w, in, mask, [window](uint64_t a) { return a | window; });
}
void from_generic(Warp& w, const Instruction& in, uint32_t mask) {
  const auto window = static_cast<uint64_t>(in.constants[0]);
  map1<uint64_t, uint64_t>(w, in, mask,
                           [window](uint64_t a) { return window ? a & ~window_mask : a; });
}

}  // namespace

void register_memory_operations() {
  load_store<uint8_t, uint16_t>("u8.2");
  load_store<int8_t, uint16_t>("s8.2");
  load_store<uint8_t, uint32_t>("u8.4");
  load_store<int8_t, uint32_t>("s8.4");
  load_store<uint8_t, uint64_t>("u8.8");
  load_store<int8_t, uint64_t>("s8.8");
  load_store<uint16_t, uint16_t>("u16.2");
  load_store<int16_t, uint16_t>("s16.2");
  load_store<uint16_t, uint32_t>("u16.4");
  load_store<int16_t, uint32_t>("s16.4");
  load_store<uint16_t, uint64_t>("u16.8");
  load_store<int16_t, uint64_t>("s16.8");
  load_store<uint32_t, uint32_t>("u32.4");
  load_store<int32_t, uint32_t>("s32.4");
  load_store<uint32_t, uint64_t>("u32.8");
  load_store<int32_t, uint64_t>("s32.8");
  load_store<uint64_t, uint64_t>("u64.8");
  load_store<int64_t, uint64_t>("s64.8");

  using U = uint32_t;
  const auto add = [](auto a, auto b, auto) { return static_cast<decltype(a)>(a + b); };
  const auto least = [](auto a, auto b, auto) { return std::min(a, b); };
  const auto most = [](auto a, auto b, auto) { return std::max(a, b); };
  atom_and_red<float>("add.f32", add);
  atom_and_red<double>("add.f64", add);
  atom_and_red<uint32_t>("add.u32", add);
  atom_and_red<uint64_t>("add.u64", add);
  atom_and_red<int32_t>("min.s32", least);
  atom_and_red<uint32_t>("min.u32", least);
  atom_and_red<int32_t>("max.s32", most);
  atom_and_red<uint32_t>("max.u32", most);
  atom_and_red<U>("and.b32", [](U a, U b, U) { return a & b; });
  atom_and_red<U>("or.b32", [](U a, U b, U) { return a | b; });
  atomic<U, true>("atom.exch.b32", [](U, U b, U) { return b; });
  atomic<U, true>("atom.cas.b32", [](U a, U expected, U b) { return a == expected ? b : a; });
  atomic<uint64_t, true>("atom.cas.b64", [](uint64_t a, uint64_t expected, uint64_t b) {
    return a == expected ? b : a;
  });

  register_operation("cp.async", cp_async);
  register_operation("cp.async.commit_group", commit_group);
  register_operation("cp.async.wait_group", [](Warp& w, const Instruction& in, uint32_t mask) {
    wait_for_groups(w, mask, static_cast<size_t>(in.constants[0]));
  });
  register_operation("cp.async.wait_all", [](Warp& w, const Instruction& in, uint32_t mask) {
    commit_group(w, in, mask);
    wait_for_groups(w, mask, 0);
  });
  register_operation("cvta", to_generic);
  register_operation("cvta.to", from_generic);
}

}  // namespace gpu
