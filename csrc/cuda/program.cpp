#include "program.h"

#include <string>
#include <vector>

#include "tables.h"

namespace d3net::cuda {
namespace {

const char* suffix_of(DType dtype) {
  switch (dtype) {
    case DType::float32: return "_float32";
    case DType::float64: return "_float64";
    case DType::bfloat16: return "_bfloat16";
    case DType::float16: return "_float16";
  }
  return "";
}

/// Of the tensor-core kernels.
std::string tensor_suffix_of(DType dtype) {
  return dtype == DType::float32 ? "_tf32" : suffix_of(dtype);
}

bool is_double(DType dtype) { return dtype == DType::float64; }
int64_t accumulator_bytes(DType dtype) { return is_double(dtype) ? 8 : 4; }
int element_bytes(DType dtype) {
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

/// Whether every row of a 16-bit map starts at a multiple of 16 bytes.
bool aligned_to_16_bytes(const View& v) {
  return reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && v.stride_h % 8 == 0 &&
         v.stride_c % 8 == 0 && v.stride_n % 8 == 0;
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
    Tables tables;
    tables.add(convolutions_, &params.convolutions);
    tables.add(sources_, &params.sources);
    tables.upload(device);
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

/// Fills in what is left of `pack`, the memory it writes among it, and launches it.
void pack_weight_chunks(Device& device, PackChunks& pack, DType dtype, const Coefficients& c) {
  const int bytes = element_bytes(dtype);
  pack.slot_channels = slot_channels(bytes);
  pack.dtype = dtype;
  pack.scale = c.scale, pack.shift = c.shift;
  const int64_t size = pack.num_chunks * 9 * tap_slots(pack.tiles) * pack.slot_channels;
  const int64_t coefficients = pack.num_chunks * 4 * pack.slot_channels;
  pack.weights = device.allocate(size * bytes);
  pack.coefficients = static_cast<float*>(device.allocate(coefficients * 4));
  launch(device, "pack_weight_chunks", divide_up(size, kThreads), kThreads, pack);
}

/// Those of one launch of a tensor-core kernel: every one in jobs of up to 8 * tile.tiles outputs.
class TensorConvolutions {
 public:
  TensorConvolutions(const Problem& p, TensorTile tile)
      : p_(p), bytes_(element_bytes(p.dtype)), tile_(tile) {}

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
        for (int64_t in = 0; in < sources[i].channels; in += chunk_channels(bytes_))
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

  void run(Device& device, std::string kernel, const Coefficients& c, TensorConvolve params) const {
    PackChunks pack{};
    Tables tables;
    tables.add(chunks_, &pack.chunks);
    tables.add(stages_, &params.stages);
    tables.add(jobs_, &params.jobs);
    tables.upload(device);
    pack.num_chunks = static_cast<int64_t>(chunks_.size());
    pack.tiles = tile_.tiles;
    pack_weight_chunks(device, pack, p_.dtype, c);
    params.num_jobs = static_cast<int32_t>(jobs_.size());
    params.tiles_h = static_cast<int32_t>(divide_up(p_.height, tile_.rows));
    params.tiles_w = static_cast<int32_t>(divide_up(p_.width, kColumns));
    params.height = static_cast<int32_t>(p_.height);
    params.width = static_cast<int32_t>(p_.width);
    params.weights = pack.weights, params.coefficients = pack.coefficients;
    auto all_have = [&](Access access) {
      return std::all_of(jobs_.begin(), jobs_.end(), [&](const Job& job) {
        auto has = [&](const View& v) {
          return !v.data || access_of(v, job.outputs, p_.width, bytes_) == access;
        };
        return has(job.out) && has(job.x);
      });
    };
    params.results = all_have(Access::rows)     ? Access::rows
                     : all_have(Access::pixels) ? Access::pixels
                                                : Access::any;
    params.wide_stores = p_.width % 8 == 0;
    for (const Job& job : jobs_) params.wide_stores &= aligned_to_16_bytes(job.out);
    kernel += "_" + std::to_string(tile_.tiles) + "x" + std::to_string(tile_.rows);
    launch(device, kernel + tensor_suffix_of(p_.dtype), blocks_of_map() * params.num_jobs,
           32 * kWarps, params, tensor_shared_bytes(tile_.tiles, tile_.rows));
  }

 private:
  View from_channel(View v, int64_t channel) const {
    if (v.data) v.data = static_cast<char*>(v.data) + bytes_ * channel * v.stride_c;
    return v;
  }
  void append_chunk(const Convolution& c, const Source& source, int64_t output, int64_t outputs,
                    int64_t first_of_source, int64_t in, bool psi) {
    const int64_t channels = std::min<int64_t>(chunk_channels(bytes_), source.channels - in);
    Chunk chunk{c.weight, psi ? first_of_source + in : -1, static_cast<int32_t>(channels),
                static_cast<int32_t>(outputs)};
    chunk.weight.data =
        static_cast<const char*>(c.weight.data) +
        bytes_ * (output * c.weight.stride_k + (first_of_source + in) * c.weight.stride_c);
    Stage stage{};
    stage.channels = static_cast<int32_t>(channels);
    stage.chunk = static_cast<int32_t>(chunks_.size());
    stage.data = from_channel(source.x, in).data;
    stage.stride_n = source.x.stride_n, stage.stride_c = source.x.stride_c;
    stage.stride_h = source.x.stride_h, stage.stride_w = source.x.stride_w;
    stage.access = access_of(source.x, source.channels, p_.width, bytes_);
    append_stages(stages_, stage, source.dilation_h, source.dilation_w, tile_, p_);
    chunks_.push_back(chunk);
  }

  const Problem& p_;
  int bytes_;  // of an element
  TensorTile tile_;
  std::vector<Stage> stages_;
  std::vector<Job> jobs_;
  std::vector<Chunk> chunks_;
};

/// The weight gradient on tensor cores: a job for every chunk of channels, column of taps where the
/// dilation is wide, and block of outputs.
class TensorWeightJobs {
 public:
  explicit TensorWeightJobs(const Problem& p) : p_(p), bytes_(element_bytes(p.dtype)) {
    int64_t channel = 0;
    for (int64_t i = 0; i < p.num_sources; ++i) {
      const Source& source = p.sources[i];
      for (int64_t in = 0; in < source.channels; in += kWeightChunk)
        append_chunk(source, channel + in, in);
      channel += source.channels;
    }
  }

  /// Sums the parts' gradients into memory it allocates; returns it and their number.
  float* run(Device& device, const Coefficients& c, const View& gradient, int64_t* parts) const {
    TensorWeightGradient params{};
    PackChunks pack{};
    Tables tables;
    tables.add(chunks_, &pack.chunks);
    tables.add(jobs_, &params.jobs);
    tables.upload(device);
    pack.num_chunks = static_cast<int64_t>(chunks_.size());
    pack.tiles = 1;  // the coefficients only are of use, their weights are few
    pack_weight_chunks(device, pack, p_.dtype, c);
    params.coefficients = pack.coefficients;
    params.batch = static_cast<int32_t>(p_.batch);
    params.height = static_cast<int32_t>(p_.height);
    params.width = static_cast<int32_t>(p_.width);
    params.tiles_w = static_cast<int32_t>(divide_up(p_.width, kColumns));
    params.gradient = gradient;
    params.access = access_of(gradient, p_.out_channels, p_.width, bytes_);
    params.wide_loads = p_.width % 8 == 0 && aligned_to_16_bytes(gradient);
    params.num_jobs = static_cast<int32_t>(jobs_.size());
    *parts = tensor_gradient_parts(
        params.num_jobs, p_.batch * params.tiles_w * divide_up(p_.height, weight_rows(bytes_)),
        device.arch());
    params.parts = static_cast<int32_t>(*parts);
    params.outputs = static_cast<int32_t>(p_.out_channels);
    params.columns = p_.in_channels * 9 + 1;
    params.partial =
        static_cast<float*>(device.allocate(*parts * p_.out_channels * params.columns * 4));
    launch(device,
           (p_.psi.relu ? "tensor_weight_relu" : "tensor_weight") + tensor_suffix_of(p_.dtype),
           *parts * params.num_jobs, weight_threads(bytes_), params, weight_shared_bytes(bytes_));
    return params.partial;
  }

 private:
  void append_chunk(const Source& source, int64_t channel, int64_t in) {
    WeightJob job{};
    job.channels = static_cast<int32_t>(std::min<int64_t>(kWeightChunk, source.channels - in));
    job.chunk = static_cast<int32_t>(chunks_.size());
    const int32_t packed = chunk_channels(bytes_);
    for (int32_t c = 0; c < job.channels; c += packed)
      chunks_.push_back({p_.weight, channel + c, std::min(packed, job.channels - c), 0});
    job.data = static_cast<const char*>(source.x.data) + bytes_ * in * source.x.stride_c;
    job.stride_n = source.x.stride_n, job.stride_c = source.x.stride_c;
    job.stride_h = source.x.stride_h, job.stride_w = source.x.stride_w;
    const Access access = access_of(source.x, source.channels, p_.width, bytes_);
    set_walks(job, source.dilation_h, p_.height, weight_rows(bytes_));
    const bool horizontal = source.dilation_w < p_.width;
    const bool band = horizontal && source.dilation_w <= kWidestBand;
    const int32_t d = horizontal ? static_cast<int32_t>(source.dilation_w) : 0;
    job.taps = band ? 3 : 1;
    job.dilation = band ? d : 0;
    const int32_t halo = !band ? 0 : d <= kWidestBand / 2 ? kWidestBand / 2 : kWidestBand;
    job.columns = kColumns + 2 * halo;
    for (int s = 0; s < (band ? 1 : 3); ++s) {
      job.column = band ? -halo : (s - 1) * d;
      job.access = access_from(job.column, access);
      job.live = band || s == 1 || horizontal;
      job.bias = channel == 0 && (band || s == 1);
      job.first_column = channel * 9 + s;
      // Blocks of outputs as equal as can be.
      const int64_t blocks = divide_up(p_.out_channels, 8 * kMostTiles);
      const int64_t most = round_up(divide_up(p_.out_channels, blocks), 8);
      for (int64_t k = 0; k < p_.out_channels; k += most) {
        job.first_output = static_cast<int32_t>(k);
        job.outputs = static_cast<int32_t>(std::min<int64_t>(most, p_.out_channels - k));
        jobs_.push_back(job);
      }
    }
  }

  const Problem& p_;
  int bytes_;  // of an element
  std::vector<Chunk> chunks_;
  std::vector<WeightJob> jobs_;
};

/// First stage of the weight gradient; returns the parts' sums and their number.
const void* direct_backward_weight(Device& device, const Problem& p, const Coefficients& c,
                                   const View& gradient, int64_t columns, int64_t* parts) {
  WeightGradient params = params_of<WeightGradient>(device, p, c);
  Tables tables;
  tables.add(std::vector<Source>(p.sources, p.sources + p.num_sources), &params.sources);
  tables.upload(device);
  params.num_sources = p.num_sources;
  params.gradient = gradient;
  params.out_channels = p.out_channels, params.in_channels = p.in_channels;
  params.parts = *parts = direct_gradient_parts(p, device.arch());
  params.partial = device.allocate(*parts * p.out_channels * columns * accumulator_bytes(p.dtype));
  const int64_t groups = p.in_channels * divide_up(p.kernel_h * p.kernel_w, kGradientTaps) + 1;
  launch(device, std::string("direct_backward_weight") + suffix_of(p.dtype),
         groups * divide_up(p.out_channels, kGradientOutputs) * *parts, kDirectThreads, params);
  return params.partial;
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
      partial = device.allocate(parts * p.out_channels * 4 * accumulator_bytes(p.dtype));
  };
  if (!tensor_refuses(p, device.arch())) {
    TensorConvolutions convolutions(p, tensor_tile(tensor_tiles({p.out_channels})));
    convolutions.append(layer, p.sources, true, 0);
    allocate_partial(convolutions.blocks_of_map() * kWarps);
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
    launch(device, "finish_channel_moments", p.out_channels, kMomentsThreads,
           FinishMoments{partial, is_double(p.dtype), parts, p.batch * p.height * p.width,
                         p.out_channels, moments.mean, moments.variance});
}

void backward_data(Device& device, Problem p, const Coefficients& coefficients,
                   const View& gradient, const View* grad_inputs, const Coefficients& sums) {
  // A convolution of the gradient for each source that needs one.
  std::vector<Convolution> wanted;
  std::vector<Source> operands;
  std::vector<int64_t> outputs;
  int64_t channel = 0;
  for (int64_t i = 0; i < p.num_sources; ++i) {
    const Source& s = p.sources[i];
    if (grad_inputs[i].data || sums.scale.data) {
      wanted.push_back({0, 1, p.out_channels, s.channels, 0,
                        transposed(p, weight_from_channel(p, channel)), 0, grad_inputs[i], s.x,
                        channel});
      operands.push_back({gradient, p.out_channels, s.dilation_h, s.dilation_w});
      outputs.push_back(s.channels);
    }
    channel += s.channels;
  }
  if (wanted.empty()) return;
  void* partial = nullptr;
  int64_t parts = 0;
  auto allocate_partial = [&](int64_t number) {
    parts = number;
    if (sums.scale.data)
      partial = device.allocate(parts * p.in_channels * 2 * accumulator_bytes(p.dtype));
  };
  if (!tensor_refuses(p, device.arch())) {
    TensorConvolutions convolutions(p, tensor_tile(tensor_tiles(outputs)));
    for (size_t i = 0; i < wanted.size(); ++i)
      convolutions.append(wanted[i], &operands[i], false, wanted[i].channel);
    allocate_partial(convolutions.blocks_of_map());
    TensorConvolve params{};
    params.scale =
        static_cast<const float*>(widened(device, coefficients.scale, p.dtype, p.in_channels));
    params.shift =
        static_cast<const float*>(widened(device, coefficients.shift, p.dtype, p.in_channels));
    params.relu = p.psi.relu;
    params.partial = static_cast<float*>(partial), params.partial_channels = p.in_channels;
    convolutions.run(device, "tensor_backward_data", coefficients, params);
  } else {
    DirectConvolutions convolutions(p);
    for (size_t i = 0; i < wanted.size(); ++i) convolutions.append(wanted[i], &operands[i]);
    allocate_partial(convolutions.parts());
    Convolve params = params_of<Convolve>(device, p, coefficients);
    params.partial = partial, params.partial_channels = p.in_channels;
    convolutions.run(device, "direct_backward_data", params);
  }
  if (sums.scale.data)
    launch(device, "finish_sums", divide_up(p.in_channels * 2, kFinishColumns),
           kFinishColumns * kFinishLanes,
           Finish{partial, is_double(p.dtype), parts, p.in_channels, 2, sums.scale, sums.shift});
}

void backward_weight(Device& device, Problem p, const Coefficients& coefficients,
                     const View& gradient, void* weight, void* bias) {
  const int64_t taps = p.kernel_h * p.kernel_w, columns = p.in_channels * taps + 1;
  int64_t parts = 0;
  const void* partial =
      tensor_refuses(p, device.arch())
          ? direct_backward_weight(device, p, coefficients, gradient, columns, &parts)
          : TensorWeightJobs(p).run(device, coefficients, gradient, &parts);
  launch(device, "finish_sums", divide_up(p.out_channels * columns, kFinishColumns),
         kFinishColumns * kFinishLanes,
         Finish{partial, is_double(p.dtype), parts, p.out_channels, columns,
                Vector{weight, 1, p.dtype}, Vector{bias, 1, p.dtype}});
}

}  // namespace d3net::cuda
