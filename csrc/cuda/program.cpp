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

/// What all convolution kernels take of a problem.
template <class Params>
Params params_of(Device& device, const Problem& p, const Coefficients& c) {
  Params params{};
  params.scale = widened(device, c.scale, p.dtype, p.in_channels);
  params.shift = widened(device, c.shift, p.dtype, p.in_channels);
  params.relu = p.psi.relu;
  params.batch = p.batch, params.height = p.height, params.width = p.width;
  params.kernel_h = p.kernel_h, params.kernel_w = p.kernel_w;
  return params;
}

/// Several convolutions of one launch, forward or backward.
class DirectConvolutions {
 public:
  explicit DirectConvolutions(const Problem& p) : p_(p) {}

  /// Numbers its tiles of outputs and its packed weights after those of the ones before.
  void append(Convolution c, const Source* sources) {
    c.first_source = static_cast<int64_t>(sources_.size());
    sources_.insert(sources_.end(), sources, sources + c.num_sources);
    c.first_tile = tiles_;
    c.packed = packed_;
    tiles_ += divide_up(c.out_channels, kDirectOutputs);
    packed_ += c.in_channels * p_.kernel_h * p_.kernel_w * round_up(c.out_channels, kDirectOutputs);
    convolutions_.push_back(c);
  }
  bool empty() const { return convolutions_.empty(); }
  int64_t parts() const { return divide_up(p_.batch * p_.height * p_.width, kDirectTile); }

  /// Uploads the tables, packs the weights and launches `kernel`.
  void run(Device& device, const std::string& kernel, Convolve params) const {
    params.convolutions = upload(device, convolutions_);
    params.sources = upload(device, sources_);
    void* weights = device.allocate(packed_ * accumulator_bytes(p_.dtype));
    params.weights = weights;
    launch(device, "pack_weights", divide_up(packed_, kThreads), kThreads,
           Pack{params.convolutions, static_cast<int64_t>(convolutions_.size()), p_.kernel_h,
                p_.kernel_w, p_.dtype, weights, packed_});
    params.num_tiles = tiles_;
    launch(device, kernel + suffix_of(p_.dtype), parts() * tiles_, kDirectThreads, params);
  }

 private:
  const Problem& p_;
  std::vector<Convolution> convolutions_;
  std::vector<Source> sources_;
  int64_t tiles_ = 0, packed_ = 0;
};

/// The same for the tensor-core kernels: every convolution in jobs of up to 8 * tile.tiles outputs.
class TensorConvolutions {
 public:
  TensorConvolutions(const Problem& p, TensorTile tile) : p_(p), tile_(tile) {}

  /// `psi`: whether the sources pass through it; `channel`: of the convolution's first output.
  void append(const Convolution& c, const Source* sources, bool psi, int64_t partial_channel) {
    for (int64_t first = 0; first < c.out_channels; first += 8 * tile_.tiles) {
      const int64_t outputs = std::min<int64_t>(8 * tile_.tiles, c.out_channels - first);
      Job job{};
      job.first_stage = static_cast<int32_t>(stages_.size());
      job.outputs = static_cast<int32_t>(outputs);
      job.partial_channel = static_cast<int32_t>(partial_channel + first);
      job.out = from_channel(c.out, first);
      job.x = from_channel(c.x, first);
      job.channel = c.channel + first;
      int64_t channel = 0;
      for (int64_t i = 0; i < c.num_sources; ++i) {
        for (int64_t in = 0; in < sources[i].channels; in += kChunk)
          append_chunk(c, sources[i], first, outputs, channel, in, psi);
        channel += sources[i].channels;
      }
      job.num_stages = static_cast<int32_t>(stages_.size()) - job.first_stage;
      jobs_.push_back(job);
    }
  }
  int64_t blocks_of_map() const {
    return p_.batch * divide_up(p_.height, tile_.rows) * divide_up(p_.width, kColumns);
  }
  int64_t parts() const { return blocks_of_map() * kWarps; }

  void run(Device& device, std::string kernel, const Coefficients& c, TensorConvolve params) const {
    PackChunks pack{};
    pack.chunks = upload(device, chunks_);
    pack.num_chunks = static_cast<int64_t>(chunks_.size());
    pack.tiles = tile_.tiles;
    pack.dtype = p_.dtype;
    pack.scale = c.scale, pack.shift = c.shift;
    const int64_t size = pack.num_chunks * 9 * tap_slots(tile_.tiles) * 8;
    pack.weights = device.allocate(size * 2);
    pack.coefficients = static_cast<float*>(device.allocate(pack.num_chunks * 32 * 4));
    launch(device, "pack_weight_chunks", divide_up(size, kThreads), kThreads, pack);
    params.stages = upload(device, stages_);
    params.jobs = upload(device, jobs_);
    params.num_jobs = static_cast<int32_t>(jobs_.size());
    params.tiles_h = static_cast<int32_t>(divide_up(p_.height, tile_.rows));
    params.tiles_w = static_cast<int32_t>(divide_up(p_.width, kColumns));
    params.height = static_cast<int32_t>(p_.height);
    params.width = static_cast<int32_t>(p_.width);
    params.weights = pack.weights, params.coefficients = pack.coefficients;
    params.wide_stores = p_.width % 8 == 0;
    for (const Job& job : jobs_)
      params.wide_stores &= reinterpret_cast<uintptr_t>(job.out.data) % 16 == 0 &&
                            job.out.stride_h % 8 == 0 && job.out.stride_c % 8 == 0 &&
                            job.out.stride_n % 8 == 0;
    kernel += "_" + std::to_string(tile_.tiles) + "x" + std::to_string(tile_.rows);
    launch(device, kernel + suffix_of(p_.dtype), blocks_of_map() * params.num_jobs, 32 * kWarps,
           params, tensor_shared_bytes(tile_.tiles, tile_.rows));
  }

 private:
  View from_channel(View v, int64_t channel) const {
    if (v.data) v.data = static_cast<char*>(v.data) + 2 * channel * v.stride_c;
    return v;
  }
  void append_chunk(const Convolution& c, const Source& source, int64_t output, int64_t outputs,
                    int64_t first_of_source, int64_t in, bool psi) {
    const int64_t channels = std::min<int64_t>(kChunk, source.channels - in);
    Chunk chunk{c.weight, psi ? first_of_source + in : -1, static_cast<int32_t>(channels),
                static_cast<int32_t>(outputs)};
    chunk.weight.data =
        static_cast<const char*>(c.weight.data) +
        2 * (output * c.weight.stride_k + (first_of_source + in) * c.weight.stride_c);
    Stage stage{};
    stage.channels = static_cast<int32_t>(channels);
    stage.chunk = static_cast<int32_t>(chunks_.size());
    stage.data = from_channel(source.x, in).data;
    stage.stride_n = source.x.stride_n, stage.stride_c = source.x.stride_c;
    stage.stride_h = source.x.stride_h;
    append_stages(stages_, stage, source.dilation_h, source.dilation_w, tile_, p_);
    chunks_.push_back(chunk);
  }

  const Problem& p_;
  TensorTile tile_;
  std::vector<Stage> stages_;
  std::vector<Job> jobs_;
  std::vector<Chunk> chunks_;
};

bool tensor_forward(Device& device, const Problem& p, const Coefficients& c, const View& out) {
  bool takes = !tensor_refuses(p, device.arch()) && tensor_takes(out);
  for (int64_t i = 0; i < p.num_sources; ++i) takes &= tensor_takes(p.sources[i].x);
  (void)c;
  return takes;
}

}  // namespace

void forward(Device& device, Problem p, const Coefficients& coefficients, const View& out,
             const Moments& moments) {
  const Convolution layer{
      0, p.num_sources, p.in_channels, p.out_channels, 0, p.weight, 0, out, View{}, 0};
  const void* bias = widened(device, coefficients.bias, p.dtype, p.out_channels);
  void* partial = nullptr;
  int64_t parts = 0;
  auto allocate_partial = [&](int64_t number) {
    parts = number;
    if (moments.mean.data)
      partial = device.allocate(parts * p.out_channels * 3 * accumulator_bytes(p.dtype));
  };
  if (tensor_forward(device, p, coefficients, out)) {
    const int tiles = tensor_tiles({p.out_channels});
    const TensorTile tile =
        tensor_tile(tiles, divide_up(p.out_channels, 8 * tiles), p, device.arch());
    TensorConvolutions convolutions(p, tile);
    convolutions.append(layer, p.sources, true, 0);
    allocate_partial(convolutions.parts());
    TensorConvolve params{};
    params.bias = static_cast<const float*>(bias);
    params.partial = static_cast<float*>(partial), params.partial_channels = p.out_channels;
    convolutions.run(device, p.psi.relu ? "tensor_forward_relu" : "tensor_forward", coefficients,
                     params);
  } else {
    DirectConvolutions convolutions(p);
    convolutions.append(layer, p.sources);
    allocate_partial(convolutions.parts());
    Convolve params = params_of<Convolve>(device, p, coefficients);
    params.bias = bias;
    params.partial = partial, params.partial_channels = p.out_channels;
    convolutions.run(device, "direct_forward", params);
  }
  if (moments.mean.data)
    launch(device, "finish_channel_moments", divide_up(p.out_channels * 32, kThreads), kThreads,
           FinishMoments{partial, is_double(p.dtype), parts, p.batch * p.height * p.width,
                         p.out_channels, moments.mean, moments.variance});
}

void backward_data(Device& device, Problem p, const Coefficients& coefficients,
                   const View& gradient, const View* grad_inputs, const Coefficients& sums) {
  DirectConvolutions convolutions(p);
  int64_t channel = 0;
  for (int64_t i = 0; i < p.num_sources; ++i) {
    const Source& s = p.sources[i];
    const Source operand{gradient, p.out_channels, s.dilation_h, s.dilation_w};
    if (grad_inputs[i].data || sums.scale.data)
      convolutions.append(
          {0, 1, p.out_channels, s.channels, 0, transposed(p, weight_from_channel(p, channel)), 0,
           grad_inputs[i], s.x, channel},
          &operand);
    channel += s.channels;
  }
  if (convolutions.empty()) return;
  Convolve params = params_of<Convolve>(device, p, coefficients);
  if (sums.scale.data) {
    params.partial =
        device.allocate(convolutions.parts() * p.in_channels * 2 * accumulator_bytes(p.dtype));
    params.partial_channels = p.in_channels;
  }
  convolutions.run(device, "direct_backward_data", params);
  if (sums.scale.data)
    launch(device, "finish_sums", divide_up(p.in_channels * 2, kFinishColumns),
           kFinishColumns * kFinishLanes,
           Finish{params.partial, is_double(p.dtype), convolutions.parts(), p.in_channels, 2,
                  sums.scale, sums.shift});
}

void backward_weight(Device& device, Problem p, const Coefficients& coefficients,
                     const View& gradient, void* weight, void* bias) {
  const int64_t taps = p.kernel_h * p.kernel_w, columns = p.in_channels * taps + 1;
  const int64_t groups = p.in_channels * divide_up(taps, kGradientTaps) + 1;
  WeightGradient params = params_of<WeightGradient>(device, p, coefficients);
  params.sources = upload(device, std::vector<Source>(p.sources, p.sources + p.num_sources));
  params.num_sources = p.num_sources;
  params.gradient = gradient;
  params.out_channels = p.out_channels, params.in_channels = p.in_channels;
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
