// The three operations as sequences of kernel launches. Free of CUDA: the same code drives a GPU
// (launch.h) and the tests that execute the kernels' PTX on a CPU.
#pragma once

#include "plan.h"

namespace d3net::cuda {

/// What a program runs on.
class Device {
 public:
  Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  virtual ~Device() = default;

  virtual Arch arch() const = 0;
  /// Device memory, aligned to 256 bytes, that outlives the launches of this program.
  virtual void* allocate(int64_t bytes) = 0;
  /// `arguments` is the kernel's one parameter, a struct of params.h.
  virtual void launch(const char* kernel, int64_t blocks, int threads, int64_t shared_bytes,
                      const void* arguments, size_t bytes) = 0;
};

/// The vectors of an operation, as the user gave them; null where there is none.
struct Coefficients {
  Vector scale, shift, bias;
};

/// Mean and biased variance of every output channel over N, H and W; null where not wanted.
struct Moments {
  Vector mean, variance;
};

/// Problem::psi carries `relu` only: the coefficients are still in the user's dtypes.
/// No operation has an empty batch, height or width.
void forward(Device& device, Problem p, const Coefficients& coefficients, const View& out,
             const Moments& moments);

/// grad_inputs[i].data null: not wanted. sums.scale and sums.shift receive gradients.
void backward_data(Device& device, Problem p, const Coefficients& coefficients,
                   const View& gradient, const View* grad_inputs, const Coefficients& sums);

/// weight (dense) and bias receive gradients.
void backward_weight(Device& device, Problem p, const Coefficients& coefficients,
                     const View& gradient, void* weight, void* bias);

}  // namespace d3net::cuda
