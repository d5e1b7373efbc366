// The groups of instructions; each is registered once, when the module is loaded.
#pragma once

namespace gpu {

void register_integer_operations();
void register_float_operations();
void register_convert_operations();
void register_memory_operations();
void register_warp_operations();
void register_matrix_operations();

}  // namespace gpu
