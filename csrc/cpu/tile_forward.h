// One multidilated convolution on tiles: source after source adds to the outputs, all in
// channels_last memory order.
#pragma once

#include <vector>

#include "packed_weights.h"

namespace d3net::cpu::D3NET_ISA {

/// Whether all channels are adjacent, so that nothing is transposed, and the outputs fill their
/// vectors well; otherwise rows of pixels are faster (measured on the layers of D3Net).
inline bool prefers_tiles(const Problem& p, const View& out) {
  constexpr int64_t lanes = kLanes<float>;
  if (p.dtype != DType::float32 || p.kernel_h * p.kernel_w > kMostTaps) return false;
  if (2 * p.out_channels < 3 * lanes || 4 * p.out_channels < 3 * round_up(p.out_channels, lanes))
    return false;
  if (out.stride_c != 1) return false;
  for (int64_t i = 0; i < p.num_sources; ++i)
    if (p.sources[i].x.stride_c != 1) return false;
  return true;
}

inline void tile_forward(const Problem& p, const float* bias, const View& out) {
  using Pass = TilePass<float, float, float>;
  std::vector<Pass> passes;
  int64_t channel = 0;
  for (int64_t i = 0; i < p.num_sources; ++i) {
    const Source& source = p.sources[i];
    Pass& pass = passes.emplace_back();
    pass.shape = {p.batch,    p.height,   p.width,           source.channels,  p.out_channels,
                  p.kernel_h, p.kernel_w, source.dilation_h, source.dilation_w};
    pass.plan = plan_pass(pass.shape, Precision::highest, false, {kLanes<float>, kVectorRegisters});
    const View& x = source.x;
    pass.input.parts.add({static_cast<const float*>(x.data), x.stride_n, x.stride_h, x.stride_w},
                         source.channels);
    pass.input.psi = Activation<float>{static_cast<const float*>(p.psi.scale),
                                       static_cast<const float*>(p.psi.shift), p.psi.relu}
                         .from_channel(channel);
    pass.input.activated = p.psi.scale || p.psi.relu;
    pass.weight = p.weight;
    pass.weight.data = static_cast<const float*>(p.weight.data) + channel * p.weight.stride_c;
    pass.to.low = {static_cast<float*>(out.data), out.stride_n, out.stride_h, out.stride_w};
    pass.to.cut = pass.to.end = p.out_channels;
    pass.bias = i == 0 ? bias : nullptr;
    pass.accumulate = i > 0;
    channel += source.channels;
  }
  PackedWeights<Pass> packed(passes, false);
  Crew::run([&](Crew::Worker& worker) {
    packed.prepare(worker);
    for (size_t i = 0; i < passes.size(); ++i)
      worker.each(passes[i].tasks(),
                  [&](int64_t task, int64_t next) { passes[i].run(task, next, packed.of(i)); });
  });
}

}  // namespace d3net::cpu::D3NET_ISA
