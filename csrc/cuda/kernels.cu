#include "kernels.h"

#include <cstring>
#include <string>

#include "params.h"

using namespace d3net::cuda;

#define D3NET_DECLARE(NAME, PARAMS) \
  extern "C" __global__ void NAME(const __grid_constant__ PARAMS p);
D3NET_CUDA_KERNELS(D3NET_DECLARE)

const void* d3net::cuda::find_kernel(const char* name) {
  struct Entry {
    const char* name;
    const void* kernel;
  };
#define D3NET_ENTRY(NAME, PARAMS) {#NAME, reinterpret_cast<const void*>(&NAME)},
  static const Entry kEntries[] = {D3NET_CUDA_KERNELS(D3NET_ENTRY)};
  for (const Entry& entry : kEntries)
    if (std::strcmp(entry.name, name) == 0) return entry.kernel;
  return nullptr;
}

const char* d3net::cuda::built_archs() {
  static const std::string kArchs = [] {
    std::string text;
    for (int arch : {__CUDA_ARCH_LIST__})
      text += (text.empty() ? "" : " ") + std::to_string(arch / 10);
    return text;
  }();
  return kArchs.c_str();
}
