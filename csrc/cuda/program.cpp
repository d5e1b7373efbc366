#include "program.h"

#include <cstring>
#include <string>
#include <vector>

namespace d3net::cuda {
namespace {

constexpr int kThreads = 256;  // of the small kernels

const char* suffix_of(DType dtype) {
  switch (dtype) {
    case DType::float32: return "_float32";
    case DType::float64: return "_float64";
    case DType::bfloat16: return "_bfloat16";
    case DType::float16: return "_float16";
  }
  return "";
}

template <class Params>
void launch(Device& device, const std::string& kernel, int64_t blocks, int threads,
            const Params& params, int64_t shared_bytes = 0) {
  device.launch(kernel.c_str(), blocks, threads, shared_bytes, &params, sizeof params);
}

template <class Entry>
const Entry* upload(Device& device, const std::vector<Entry>& table) {
  static_assert(sizeof(Entry) % 4 == 0);
  const int64_t words = static_cast<int64_t>(table.size() * sizeof(Entry) / 4);
  auto* to = static_cast<uint32_t*>(device.allocate(words * 4));
  for (int64_t done = 0; done < words; done += Upload::kWords) {
    Upload piece{
        to + done, static_cast<int32_t>(std::min<int64_t>(words - done, Upload::kWords)), {}};
    std::memcpy(piece.data, reinterpret_cast<const char*>(table.data()) + done * 4,
                static_cast<size_t>(piece.words) * 4);
    launch(device, "upload_table", 1, kThreads, piece);
  }
  return reinterpret_cast<const Entry*>(to);
}

bool is_double(DType dtype) { return dtype == DType::float64; }
int64_t accumulator_bytes(DType dtype) { return is_double(dtype) ? 8 : 4; }
int64_t element_bytes(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

/// `v` as a dense array of the accumulation type; null for null.
const void* widened(Device& device, const Vector& v, DType problem, int64_t size) {
  if (!v.data) return nullptr;
  void* to = device.allocate(size * accumulator_bytes(problem));
  launch(device, "widen_coefficients", divide_up(size, kThreads), kThreads,
         Widen{v, to, is_double(problem), size});
  return to;
}

Weight weight_from_channel(const Problem& p, int64_t channel) {
  Weight part = p.weight;
  part.data =
      static_cast<const char*>(part.data) + channel * part.stride_c * element_bytes(p.dtype);
  return part;
}

/// The same taps seen from the input: outputs and channels swapped, both axes reversed.
Weight transposed(const Problem& p, const Weight& w) {
  const int64_t last = (p.kernel_h - 1) * w.stride_h + (p.kernel_w - 1) * w.stride_w;
  return {static_cast<const char*>(w.data) + last * element_bytes(p.dtype), w.stride_c, w.stride_k,
          -w.stride_h, -w.stride_w};
}

/// Numbers tiles of outputs and packed weights of one convolution after the other.
void append(std::vector<Convolution>& to, Convolution c, int64_t taps, int64_t* packed_size) {
  if (!to.empty())
    c.first_tile = to.back().first_tile + divide_up(to.back().out_channels, kDirectOutputs);
  c.packed = *packed_size;
  *packed_size += c.in_channels * taps * round_up(c.out_channels, kDirectOutputs);
  to.push_back(c);
}

/// Uploads the tables, packs the weights and launches `kernel` over all convolutions.
void run_direct(Device& device, const std::string& kernel, const Problem& p,
                const std::vector<Convolution>& convolutions, const std::vector<Source>& sources,
                int64_t packed_size, Convolve params) {
  params.convolutions = upload(device, convolutions);
  params.sources = upload(device, sources);
  void* weights = device.allocate(packed_size * accumulator_bytes(p.dtype));
  params.weights = weights;
  launch(device, "pack_weights", divide_up(packed_size, kThreads), kThreads,
         Pack{params.convolutions, static_cast<int64_t>(convolutions.size()), p.kernel_h,
              p.kernel_w, p.dtype, weights, packed_size});
  const Convolution& last = convolutions.back();
  params.num_tiles = last.first_tile + divide_up(last.out_channels, kDirectOutputs);
  const int64_t tiles = divide_up(p.batch * p.height * p.width, kDirectTile);
  launch(device, kernel + suffix_of(p.dtype), tiles * params.num_tiles, kDirectThreads, params);
}

}  // namespace

void forward(Device& device, Problem p, const Coefficients& coefficients, const View& out,
             const Moments& moments) {
  std::vector<Convolution> convolutions;
  int64_t packed_size = 0;
  append(convolutions,
         {0, p.num_sources, p.in_channels, p.out_channels, 0, p.weight, 0, out, View{}, 0},
         p.kernel_h * p.kernel_w, &packed_size);
  Convolve params{};
  params.scale = widened(device, coefficients.scale, p.dtype, p.in_channels);
  params.shift = widened(device, coefficients.shift, p.dtype, p.in_channels);
  params.bias = widened(device, coefficients.bias, p.dtype, p.out_channels);
  params.relu = p.psi.relu;
  params.batch = p.batch, params.height = p.height, params.width = p.width;
  params.kernel_h = p.kernel_h, params.kernel_w = p.kernel_w;
  const int64_t pixels = p.batch * p.height * p.width, tiles = divide_up(pixels, kDirectTile);
  if (moments.mean.data) {
    params.partial = device.allocate(tiles * p.out_channels * 2 * accumulator_bytes(p.dtype));
    params.partial_channels = p.out_channels;
  }
  run_direct(device, "direct_forward", p, convolutions,
             std::vector<Source>(p.sources, p.sources + p.num_sources), packed_size, params);
  if (moments.mean.data)
    launch(device, "finish_channel_moments", divide_up(p.out_channels * 32, kThreads), kThreads,
           FinishMoments{params.partial, is_double(p.dtype), tiles, kDirectTile, pixels,
                         p.out_channels, moments.mean, moments.variance});
}

void backward_data(Device& device, Problem p, const Coefficients& coefficients,
                   const View& gradient, const View* grad_inputs, const Coefficients& sums) {
  std::vector<Convolution> convolutions;
  std::vector<Source> sources;
  int64_t packed_size = 0, channel = 0;
  for (int64_t i = 0; i < p.num_sources; ++i) {
    const Source& s = p.sources[i];
    if (grad_inputs[i].data || sums.scale.data) {
      append(convolutions,
             {static_cast<int64_t>(sources.size()), 1, p.out_channels, s.channels, 0,
              transposed(p, weight_from_channel(p, channel)), 0, grad_inputs[i], s.x, channel},
             p.kernel_h * p.kernel_w, &packed_size);
      sources.push_back({gradient, p.out_channels, s.dilation_h, s.dilation_w});
    }
    channel += s.channels;
  }
  if (convolutions.empty()) return;
  Convolve params{};
  params.scale = widened(device, coefficients.scale, p.dtype, p.in_channels);
  params.shift = widened(device, coefficients.shift, p.dtype, p.in_channels);
  params.relu = p.psi.relu;
  params.batch = p.batch, params.height = p.height, params.width = p.width;
  params.kernel_h = p.kernel_h, params.kernel_w = p.kernel_w;
  const int64_t tiles = divide_up(p.batch * p.height * p.width, kDirectTile);
  if (sums.scale.data) {
    params.partial = device.allocate(tiles * p.in_channels * 2 * accumulator_bytes(p.dtype));
    params.partial_channels = p.in_channels;
  }
  run_direct(device, "direct_backward_data", p, convolutions, sources, packed_size, params);
  if (sums.scale.data)
    launch(device, "finish_sums", divide_up(p.in_channels * 2, kFinishColumns),
           kFinishColumns * kFinishLanes,
           Finish{params.partial, is_double(p.dtype), tiles, p.in_channels, 2, sums.scale,
                  sums.shift});
}

void backward_weight(Device& device, Problem p, const Coefficients& coefficients,
                     const View& gradient, void* weight, void* bias) {
  const int64_t taps = p.kernel_h * p.kernel_w, columns = p.in_channels * taps + 1;
  const int64_t groups = p.in_channels * divide_up(taps, kGradientTaps) + 1;
  WeightGradient params{};
  params.sources = upload(device, std::vector<Source>(p.sources, p.sources + p.num_sources));
  params.num_sources = p.num_sources;
  params.scale = widened(device, coefficients.scale, p.dtype, p.in_channels);
  params.shift = widened(device, coefficients.shift, p.dtype, p.in_channels);
  params.relu = p.psi.relu;
  params.gradient = gradient;
  params.batch = p.batch, params.height = p.height, params.width = p.width;
  params.out_channels = p.out_channels, params.in_channels = p.in_channels;
  params.kernel_h = p.kernel_h, params.kernel_w = p.kernel_w;
  params.parts = direct_gradient_parts(p, device.arch());
  params.partial =
      device.allocate(params.parts * p.out_channels * columns * accumulator_bytes(p.dtype));
  launch(device, std::string("direct_backward_weight") + suffix_of(p.dtype),
         groups * divide_up(p.out_channels, kGradientOutputs) * params.parts, kDirectThreads,
         params);
  launch(device, "finish_sums", divide_up(p.out_channels * columns, kFinishColumns),
         kFinishColumns * kFinishLanes,
         Finish{params.partial, is_double(p.dtype), params.parts, p.out_channels, columns,
                Vector{weight, 1, p.dtype}, Vector{bias, 1, p.dtype}});
}

}  // namespace d3net::cuda
