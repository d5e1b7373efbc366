// The kernels of the operators for any CPU.
#include "isa_portable.h"
// The kernels follow the choice of the vectors.
#include "kernels_impl.h"

namespace d3net::cpu {
const Kernels& portable_kernels() { return portable::kKernels; }
}  // namespace d3net::cpu
