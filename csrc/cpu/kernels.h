// What one instruction set offers; dispatch.cpp picks among them at run time.
#pragma once

#include <string>

#include "../d2_block.h"
#include "../multidilated_conv.h"
#include "tile_plan.h"

namespace d3net::cpu {

/// bias, scale and shift hold the accumulation type; outputs are dense, NCHW or channels_last.
struct Kernels {
  const char* isa;

  void (*forward)(const Problem&, const void* bias, const View& out);

  /// grad_inputs[i].data null: not wanted. psi_sums, if not null, receives [sum C_i][2]:
  /// the gradients to scale and shift, for which every source's data gradient is computed.
  void (*backward_data)(const Problem&, const View& gradient, const View* grad_inputs,
                        double* psi_sums);

  void (*backward_weight)(const Problem&, const View& gradient, void* weight, void* bias);

  /// moments: [channels][2], mean and biased variance over batch, height and width (not empty).
  void (*moments)(DType dtype, const View& x, int64_t batch, int64_t channels, int64_t height,
                  int64_t width, double* moments);

  /// How a D2 block would convolve one source, in words.
  std::string (*plan)(const PassShape&, int precision, bool exact);

  /// Copies x of any strides to `to`: (batch, height, width, channels), dense.
  void (*to_channels_last)(DType dtype, const View& x, int64_t batch, int64_t channels,
                           int64_t height, int64_t width, void* to);

  /// mean and variance: of all source channels, in the accumulation type; those of x_0 are given
  /// where a norm wants batch statistics, the others are computed.
  void (*d2_forward)(const D2Problem&, const D2Features&, void* mean, void* variance);
  void (*d2_backward)(const D2Problem&, const D2Features&, const void* mean, const void* variance,
                      const D2Gradients&);

  bool amx = false;  // products of bfloat16 by the matrix unit
};

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& amx_kernels();
#endif

/// The kernels in force: the fastest this CPU runs unless force_isa or D3NET_KERNELS_ISA said else.
const Kernels& kernels();

/// Switches to the named instruction set; false if unknown or not on this CPU.
bool force_isa(const char* name);

}  // namespace d3net::cpu
