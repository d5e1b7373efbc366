// C interface to csrc/cuda/program.cpp for cuda_program.py: the launches go to callbacks.
#include <cstdint>
#include <exception>
#include <string>

#include "cuda/program.h"

using namespace d3net;
using namespace d3net::cuda;

namespace {

using Allocate = void* (*)(int64_t bytes);
using Launch = void (*)(const char* kernel, int64_t blocks, int32_t threads, int64_t shared_bytes,
                        const void* arguments, int64_t bytes);

class Callbacks : public Device {
 public:
  Callbacks(Arch arch, Allocate allocate, Launch launch)
      : arch_(arch), allocate_(allocate), launch_(launch) {}
  Arch arch() const override { return arch_; }
  void* allocate(int64_t bytes) override { return allocate_(bytes); }
  void launch(const char* kernel, int64_t blocks, int threads, int64_t shared_bytes,
              const void* arguments, size_t bytes) override {
    launch_(kernel, blocks, threads, shared_bytes, arguments, static_cast<int64_t>(bytes));
  }

 private:
  Arch arch_;
  Allocate allocate_;
  Launch launch_;
};

}  // namespace

// The structs of program.h and multidilated_conv.h, as cuda_program.py mirrors them.
extern "C" {

struct Call {
  Problem problem;
  Coefficients coefficients;
  Arch arch;
  Allocate allocate;
  Launch launch;
};

}  // extern "C"

namespace {

template <class F>
const char* guarded(const Call* call, F&& run) {
  static std::string words;
  try {
    Callbacks device(call->arch, call->allocate, call->launch);
    run(device);
  } catch (const std::exception& error) {
    words = error.what();
    return words.c_str();
  }
  return nullptr;
}

}  // namespace

extern "C" {

// All return null, or what went wrong.

const char* program_forward(const Call* call, const View* out, const Moments* moments) {
  return guarded(call, [&](Device& device) {
    forward(device, call->problem, call->coefficients, *out, *moments);
  });
}

const char* program_backward_data(const Call* call, const View* gradient, const View* grad_inputs,
                                  const Coefficients* sums) {
  return guarded(call, [&](Device& device) {
    backward_data(device, call->problem, call->coefficients, *gradient, grad_inputs, *sums);
  });
}

const char* program_backward_weight(const Call* call, const View* gradient, void* weight,
                                    void* bias) {
  return guarded(call, [&](Device& device) {
    backward_weight(device, call->problem, call->coefficients, *gradient, weight, bias);
  });
}

}  // extern "C"
