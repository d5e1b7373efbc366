#include "common.cuh"

using namespace d3net::cuda;

extern "C" __global__ void upload_table(const __grid_constant__ Upload p) { upload(p); }
extern "C" __global__ void widen_coefficients(const __grid_constant__ Widen p) { widen_vector(p); }
extern "C" __global__ void pack_weights(const __grid_constant__ Pack p) { pack(p); }
extern "C" __global__ void pack_weight_chunks(const __grid_constant__ PackChunks p) {
  pack_chunks(p);
}
extern "C" __global__ void finish_sums(const __grid_constant__ Finish p) { finish(p); }
extern "C" __global__ void finish_channel_moments(const __grid_constant__ FinishMoments p) {
  finish_moments(p);
}
