// What the kernels take: plain structs that the host fills in and every kernel receives by value.
#pragma once

#include "../multidilated_conv.h"

namespace d3net::cuda {

/// A vector in device memory; the stride counts elements. Null data: not given, or not wanted.
struct Vector {
  void* data = nullptr;
  int64_t stride = 1;
  DType dtype = DType::float32;
};

/// Carries a piece of a table that the host built to device memory inside the arguments of a
/// launch: no host synchronisation, no pinned memory, and right when a CUDA graph is replayed.
struct Upload {
  static constexpr int kWords = 960;
  uint32_t* to;
  int32_t words;
  uint32_t data[kWords];
};

/// Makes a dense vector of the accumulation type (double or float) out of `from`.
struct Widen {
  Vector from;
  void* to;
  bool to_double;
  int64_t size;
};

/// One convolution of consecutive sources into one result: a whole layer in the forward pass, the
/// data gradient of one source in the backward pass (whose only "source" is grad_output).
struct Convolution {
  int64_t first_source, num_sources, in_channels;
  int64_t out_channels;
  int64_t first_tile;  // its number of tiles of outputs goes on from those of the ones before
  Weight weight;       // [out_channels][in_channels][kh][kw], not packed yet
  int64_t packed;      // where its packed weights start, in elements
  View out;            // null: only the sums for scale and shift are wanted
  View x;              // backward: the source, which decides about the ReLU
  int64_t channel;     // backward: the source's first channel in scale and shift
};

/// Weights of all convolutions to [in_channels][tap][out_channels rounded up], accumulation type.
struct Pack {
  const Convolution* convolutions;
  int64_t num_convolutions;
  int64_t kernel_h, kernel_w;
  DType dtype;
  void* to;
  int64_t size;
};

/// The direct kernels, forward and data gradient. Null scale and shift: no affine part.
struct Convolve {
  const Convolution* convolutions;
  int64_t num_tiles;  // of output channels, over all convolutions
  const Source* sources;
  const void* weights;
  const void *scale, *shift, *bias;
  bool relu;
  int64_t batch, height, width;
  int64_t kernel_h, kernel_w;
  void* partial;             // [tile of pixels][channels][4 forward, 2 backward] or null
  int64_t partial_channels;  // of all convolutions
};

/// First stage of the weight gradient: sums over a part of the rows each.
struct WeightGradient {
  const Source* sources;
  int64_t num_sources;
  const void *scale, *shift;
  bool relu;
  View gradient;
  int64_t batch, height, width;
  int64_t out_channels, in_channels;
  int64_t kernel_h, kernel_w;
  int64_t parts;
  void* partial;  // [part][out_channels][in_channels * kh * kw + 1]; the last column is the bias
};

/// Second stage of every gradient sum: adds the parts in their order, in double.
struct Finish {
  const void* partial;  // [part][row][column], double or float
  bool from_double;
  int64_t parts, rows, columns;
  Vector body;  // columns 0 .. columns - 2 of every row
  Vector last;  // the last column
};

/// Second stage of the moments. Of each part, (pivot, sum and sum of squares of the distances from
/// it, count): the pivot is the mean of some of the part's values, so that no mean, however large,
/// cancels.
struct FinishMoments {
  const void* partial;  // [part][channel][4], double or float
  bool from_double;
  int64_t parts, pixels, channels;
  Vector mean, variance;
};

// Geometry of the direct kernels, which the host needs to size grids and partial sums.
constexpr int kDirectThreads = 128;
constexpr int kDirectPixels = 4;     // of a thread; its outputs share what it loads
constexpr int kDirectOutputs = 16;   // of a thread
constexpr int kGradientOutputs = 8;  // of a thread of the weight gradient
constexpr int kGradientTaps = 3;     // of a thread of the weight gradient
constexpr int kFinishColumns = 32;   // one warp reads neighbours, the lanes of others other parts
constexpr int kFinishLanes = 8;
constexpr int kMomentsThreads = 256;  // of a channel

/// The tile of pixels of a block of a direct kernel.
constexpr int64_t kDirectTile = int64_t{kDirectThreads} * kDirectPixels;

}  // namespace d3net::cuda
