// Instructions in which the lanes of a warp meet: shuffles, votes, barriers.
#include <algorithm>

#include "lanes.h"
#include "operations.h"

namespace gpu {

namespace {

enum class Shuffle { up, down, bfly, idx };

/// operands: d, a, b, c, member mask; constants[0]: place of the predicate result, or -1.
template <Shuffle mode>
void shuffle(Warp& w, const Instruction& in, uint32_t mask) {
  const uint32_t *a = w.reg<uint32_t>(in.operands[1]), *b = w.reg<uint32_t>(in.operands[2]),
                 *c = w.reg<uint32_t>(in.operands[3]);
  uint32_t result[lanes], in_range = 0;
  for (int l = 0; l < lanes; ++l) {
    if (!(mask >> l & 1)) continue;
    const int segment = c[l] >> 8 & 31, clamp = c[l] & 31, offset = b[l] & 31;
    const int last = (l & segment) | (clamp & ~segment), first = l & segment;
    int from = l;
    bool inside = false;
    switch (mode) {
      case Shuffle::up:
        from = l - offset;
        inside = from >= last;
        break;
      case Shuffle::down:
        from = l + offset;
        inside = from <= last;
        break;
      case Shuffle::bfly:
        from = l ^ offset;
        inside = from <= last;
        break;
      case Shuffle::idx: from = first | (offset & ~segment); inside = from <= last;
    }
    if (!inside) from = l;
    if (!(mask >> from & 1)) w.fail(in, 1u << l, "reads a lane outside the member mask");
    result[l] = a[from];
    in_range |= uint32_t{inside} << l;
  }
  for (int l = 0; l < lanes; ++l)
    if (mask >> l & 1) w.reg<uint32_t>(in.operands[0])[l] = result[l];
  if (in.constants[0] >= 0) w.set_predicate(static_cast<uint32_t>(in.constants[0]), mask, in_range);
}

/// operands: d, predicate, member mask; constants[0] negates the predicate.
uint32_t votes(Warp& w, const Instruction& in, uint32_t mask) {
  const uint32_t p = w.predicate(in.operands[1]);
  return (in.constants[0] ? ~p : p) & mask;
}

template <class F>
void reduction(const std::string& name, F) {
  register_operation(
      name,
      [](Warp& w, const Instruction& in, uint32_t mask) {
        using T = decltype(F{}(0, 0));
        const T* a = w.reg<T>(in.operands[1]);
        T* d = w.reg<T>(in.operands[0]);
        int l = __builtin_ctz(mask);
        T result = a[l];
        for (++l; l < lanes; ++l)
          if (mask >> l & 1) result = F{}(result, a[l]);
        for (l = 0; l < lanes; ++l)
          if (mask >> l & 1) d[l] = result;
      },
      Kind::named_lanes_meet);
}

/// operands: barrier, number of threads (optional).
void arrive(Warp& w, const Instruction& in, uint32_t mask, size_t first, size_t number) {
  const auto same = [&](uint32_t place) {
    const uint32_t* r = w.reg<uint32_t>(place);
    const uint32_t value = r[__builtin_ctz(mask)];
    for (int l = 0; l < lanes; ++l)
      if ((mask >> l & 1) && r[l] != value) w.fail(in, mask, "lanes disagree on the barrier");
    return value;
  };
  w.barrier = same(in.operands[first]);
  w.barrier_threads = number > 1 ? same(in.operands[first + 1]) : 0;
  if (w.barrier > 15) w.fail(in, mask, "there are barriers 0 to 15");
  if (w.barrier_threads % lanes) w.fail(in, mask, "the thread count is no multiple of 32");
}

}  // namespace

void register_warp_operations() {
  const Kind named = Kind::named_lanes_meet;
  register_operation("shfl.up", shuffle<Shuffle::up>, named);
  register_operation("shfl.down", shuffle<Shuffle::down>, named);
  register_operation("shfl.bfly", shuffle<Shuffle::bfly>, named);
  register_operation("shfl.idx", shuffle<Shuffle::idx>, named);
  register_operation(
      "vote.ballot",
      [](Warp& w, const Instruction& in, uint32_t mask) {
        const uint32_t ballot = votes(w, in, mask);
        for (int l = 0; l < lanes; ++l)
          if (mask >> l & 1) w.reg<uint32_t>(in.operands[0])[l] = ballot;
      },
      named);
  register_operation(
      "vote.any",
      [](Warp& w, const Instruction& in, uint32_t mask) {
        w.set_predicate(in.operands[0], mask, votes(w, in, mask) ? all_lanes : 0);
      },
      named);
  register_operation(
      "vote.all",
      [](Warp& w, const Instruction& in, uint32_t mask) {
        w.set_predicate(in.operands[0], mask, votes(w, in, mask) == mask ? all_lanes : 0);
      },
      named);
  register_operation(
      "vote.uni",
      [](Warp& w, const Instruction& in, uint32_t mask) {
        const uint32_t p = votes(w, in, mask);
        w.set_predicate(in.operands[0], mask, p == mask || p == 0 ? all_lanes : 0);
      },
      named);
  reduction("redux.add.s32", [](uint32_t a, uint32_t b) { return a + b; });
  reduction("redux.min.s32", [](int32_t a, int32_t b) { return std::min(a, b); });
  reduction("redux.max.s32", [](int32_t a, int32_t b) { return std::max(a, b); });
  reduction("redux.min.u32", [](uint32_t a, uint32_t b) { return std::min(a, b); });
  reduction("redux.max.u32", [](uint32_t a, uint32_t b) { return std::max(a, b); });
  reduction("redux.and.b32", [](uint32_t a, uint32_t b) { return a & b; });
  reduction("redux.or.b32", [](uint32_t a, uint32_t b) { return a | b; });
  register_operation("bar.warp", [](Warp&, const Instruction&, uint32_t) {}, named);
  register_operation(
      "elect",  // operands: lane or -1, predicate, member mask; constants[0]: is the lane wanted
      [](Warp& w, const Instruction& in, uint32_t mask) {
        const uint32_t leader = mask & -mask;
        if (in.constants[0])
          for (int l = 0; l < lanes; ++l)
            if (mask >> l & 1) w.reg<uint32_t>(in.operands[0])[l] = __builtin_ctz(leader);
        w.set_predicate(in.operands[1], mask, leader);
      },
      named);
  register_operation(
      "bar.sync",
      [](Warp& w, const Instruction& in, uint32_t mask) {
        arrive(w, in, mask, 0, in.operands.size());
      },
      Kind::block_barrier);
  // operands: d, barrier, number of threads (optional), predicate; constants: which, negated.
  register_operation(
      "bar.red",
      [](Warp& w, const Instruction& in, uint32_t mask) {
        arrive(w, in, mask, 1, in.operands.size() - 2);
      },
      Kind::block_barrier);
}

}  // namespace gpu
