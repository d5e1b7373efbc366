// The body of each instruction set's translation unit for the D2 block: four dtypes.
#pragma once

#include "d2_backward.h"
#include "d2_forward.h"
#include "d2_rows.h"
#include "kernels.h"
#include "tile_layer.h"

namespace d3net::cpu::D3NET_ISA {

template <class F>
void for_block_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32: return f(float{});
    case DType::float64: return f(double{});
    case DType::bfloat16: return f(bfloat16{});
    case DType::float16: return f(float16{});
  }
}

bool forward_on_tiles(const Problem& p, const void* bias, const View& out) {
  return TileLayer(p).forward(static_cast<const float*>(bias), out);
}
bool backward_data_on_tiles(const Problem& p, const View& gradient, const View* grad_inputs,
                            double* psi_sums) {
  return TileLayer(p).backward_data(gradient, grad_inputs, psi_sums);
}
bool backward_weight_on_tiles(const Problem& p, const View& gradient, void* weight, void* bias) {
  return TileLayer(p).backward_weight(gradient, static_cast<float*>(weight),
                                      static_cast<float*>(bias));
}

void d2_forward(const D2Problem& p, const D2Features& kept, void* mean, void* variance) {
  for_block_dtype(p.dtype, [&](auto t) {
    using A = Accumulator<decltype(t)>;
    if (p.has_few_channels())
      D2Rows<decltype(t)>(p, kept, static_cast<A*>(mean), static_cast<A*>(variance)).run();
    else
      D2Forward<decltype(t)>(p, kept, static_cast<A*>(mean), static_cast<A*>(variance)).run();
  });
}

void d2_backward(const D2Problem& p, const D2Features& kept, const void* mean, const void* variance,
                 const D2Gradients& gradients) {
  for_block_dtype(p.dtype, [&](auto t) {
    using A = Accumulator<decltype(t)>;
    D2Backward<decltype(t)>(p, kept, const_cast<A*>(static_cast<const A*>(mean)),
                            const_cast<A*>(static_cast<const A*>(variance)), gradients)
        .run();
  });
}

std::string d2_plan(const PassShape& shape, int precision, bool exact) {
  const PassPlan plan = plan_pass(shape, static_cast<Precision>(precision), exact,
                                  exact ? machine_of<double>() : machine_of<float>());
  std::string words = name_of(plan.algorithm);
  if (plan.pairs) words += " in pairs of bfloat16";
  if (plan.amx) words += " by the matrix unit";
  words += ", " + std::to_string(plan.tiles) + " tiles a task";
  if (plan.shares > 1) words += ", outputs in " + std::to_string(plan.shares) + " shares";
  return words;
}

}  // namespace d3net::cpu::D3NET_ISA
