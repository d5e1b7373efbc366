// A program's Device on a GPU: torch's allocator and current stream, and the one place where a
// kernel is launched.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "kernels.h"
#include "program.h"

namespace d3net::cuda {

/// Throws with the name of what failed.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // not left behind for torch's next check
  STD_TORCH_CHECK(status != cudaErrorNoKernelImageForDevice, "d3net_kernels: ", what,
                  " has no code for this GPU; the binary holds ", built_archs(),
                  "; rebuild it with TORCH_CUDA_ARCH_LIST naming this GPU, or use "
                  "D3NET_KERNELS_BACKEND=reference");
  STD_TORCH_CHECK(false, "d3net_kernels: ", what, ": ", cudaGetErrorString(status));
}

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

/// Makes the device of `like` current for its lifetime. Nothing here waits for the device, and the
/// workspace comes from torch's caching allocator: right inside a CUDA graph.
class Gpu : public Device {
 public:
  explicit Gpu(const torch::stable::Tensor& like)
      : like_(like), device_(like.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  Arch arch() const override {
    return {10 * attribute(cudaDevAttrComputeCapabilityMajor, device_) +
                attribute(cudaDevAttrComputeCapabilityMinor, device_),
            attribute(cudaDevAttrMultiProcessorCount, device_)};
  }

  void* allocate(int64_t bytes) override {
    workspace_.push_back(torch::stable::new_empty(like_, std::vector<int64_t>{bytes},
                                                  torch::headeronly::ScalarType::Byte));
    return workspace_.back().data_ptr();
  }

  void launch(const char* kernel, int64_t blocks, int threads, int64_t shared_bytes,
              const void* arguments, size_t) override {
    constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
    STD_TORCH_CHECK(blocks <= kMostBlocks, "d3net_kernels: ", kernel, " would need ", blocks,
                    " blocks, CUDA allows ", kMostBlocks, "; split the batch");
    const void* function = find_kernel(kernel);
    STD_TORCH_CHECK(function, "d3net_kernels: there is no kernel ", kernel);
    constexpr int64_t kWithoutAsking = 48 << 10;
    if (shared_bytes > kWithoutAsking)
      check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes)),
            kernel);
    void* list[] = {const_cast<void*>(arguments)};
    check(cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)),
                           dim3(static_cast<unsigned>(threads)), list,
                           static_cast<size_t>(shared_bytes), stream_),
          kernel);
  }

 private:
  const torch::stable::Tensor& like_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
  std::vector<torch::stable::Tensor> workspace_;
};

}  // namespace d3net::cuda
