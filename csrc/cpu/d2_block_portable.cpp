// The D2 block for any CPU.
#include "isa_portable.h"
// The kernels follow the choice of the vectors.
#include "d2_block_entry.h"
