// Geometry of the tensor-core convolution kernels, known at compile time to the kernels and at run
// time to the host that lists their stages.
//
// A block computes kRows rows x kColumns columns of some outputs. It walks over stages: each loads
// some rows of a chunk of channels of one source to shared memory and multiplies them with some
// taps.
//
// In shared memory lie slots of 16 bytes: 8 channels of a pixel in 16 bits, or 4 in 32 (TF32). A
// chunk of channels is two slots, the k of one product.
#pragma once

#include "params.h"

namespace d3net::cuda {

constexpr int kColumns = 64;     // of a block's tile; 16 a warp
constexpr int kWarps = 4;        // of a block
constexpr int kMostTiles = 5;    // of 8 outputs a block
constexpr int kWidestBand = 16;  // dilations up to here have their three columns in one stage
constexpr int kPixelsALoad = 4;  // neighbours along W that are loaded at once
constexpr int kPrefetch = 3;     // loads a thread holds in registers, of a slot's channels each

constexpr int slot_channels(int element_bytes) { return 16 / element_bytes; }
constexpr int chunk_channels(int element_bytes) { return 2 * slot_channels(element_bytes); }

/// all: nine taps of a small dilation, so that a row serves three rows of outputs.
/// row: the three taps of one row of taps. one: a single tap, of a dilation too wide for a band.
enum class Taps { all, row, one };

/// What a stage's code is compiled for.
struct Kind {
  Taps taps = Taps::one;
  int dilation = 0;   // of `all`; otherwise the stage says
  int first_row = 0;  // all: first input row, relative to the tile; else first row of outputs
  int rows = 0;       // of input
  int halo = 0;       // columns left and right of the tile
  // In shared memory, in slots: [half of the chunk][row][column]. The pitches make the transposing
  // stores and ldmatrix free of bank conflicts (see tensor.cuh).
  int columns = 0;
  int row_pitch = 0;   // 2 modulo 8
  int half_pitch = 0;  // 1 modulo 8
};

struct Kinds {
  Kind kind[16];
  int count = 0;
  constexpr void add(Taps taps, int dilation, int first_row, int rows, int halo) {
    const int columns = kColumns + 2 * halo;
    const int row_pitch = columns + (10 - columns % 8) % 8;
    const int half_pitch = row_pitch * rows + (9 - row_pitch * rows % 8) % 8;
    kind[count++] = {taps, dilation, first_row, rows, halo, columns, row_pitch, half_pitch};
  }
  constexpr bool has_all(int dilation) const {
    for (int i = 0; i < count; ++i)
      if (kind[i].taps == Taps::all && kind[i].dilation == dilation) return true;
    return false;
  }
  /// The least halo of Taps::row that holds a dilation.
  constexpr int halo_for(int dilation) const {
    int least = kWidestBand;
    for (int i = 0; i < count; ++i)
      if (kind[i].taps == Taps::row && kind[i].halo >= dilation && kind[i].halo < least)
        least = kind[i].halo;
    return least;
  }
};

constexpr int smaller(int a, int b) { return a < b ? a : b; }

/// All kinds of stages of a tile of so many rows.
constexpr Kinds kinds_of(int rows) {
  Kinds kinds;
  for (int d = 1; d <= 8 && d < rows; d *= 2) {
    const int halo = d <= 4 ? 4 : 8, most = d <= 4 ? 10 : 8;  // most: kPrefetch loads a thread
    const int total = rows + 2 * d, bands = (total + most - 1) / most;
    const int each = ((total + bands - 1) / bands + 1) / 2 * 2;
    for (int first = -d; first < rows + d; first += each)
      kinds.add(Taps::all, d, first, smaller(each, rows + d - first), halo);
  }
  for (int halo = rows > 8 ? kWidestBand : 8; halo <= kWidestBand; halo *= 2)
    for (int first = 0; first < rows; first += 8)
      kinds.add(Taps::row, 0, first, smaller(8, rows - first), halo);
  for (int first = 0; first < rows; first += 8)
    kinds.add(Taps::one, 0, first, smaller(8, rows - first), 0);
  return kinds;
}

constexpr int most_slots(int rows) {
  int most = 0;
  const Kinds kinds = kinds_of(rows);
  for (int i = 0; i < kinds.count; ++i)
    if (2 * kinds.kind[i].half_pitch > most) most = 2 * kinds.kind[i].half_pitch;
  return most;
}

/// Slots of one tap's weights: [half of the chunk][outputs].
constexpr int tap_slots(int tiles) { return 2 * 8 * tiles; }

/// Dynamic shared memory: two stages with their weights; the epilogue uses it again.
constexpr int tensor_shared_bytes(int tiles, int rows) {
  const int pipeline = 2 * 16 * (most_slots(rows) + 9 * tap_slots(tiles));
  const int epilogue = 8 * tiles * (rows * kColumns + 4) * 4;  // the backward one, in float
  return pipeline > epilogue ? pipeline : epilogue;
}

/// How four neighbouring pixels of a map are loaded. rows: as one aligned word of four elements of
/// a channel. pixels: one by one, as such words of 4 channels. any: element by element.
enum class Access : int32_t { rows, pixels, any };

/// One step of the pipeline.
struct Stage {
  int32_t kind;
  Access access;
  int32_t channels;       // up to a chunk
  int32_t row, column;    // where it starts to load, relative to the tile without halo
  int32_t rows, columns;  // what it loads
  int32_t dilation;
  int32_t weights;   // its taps, in slots
  int32_t chunk;     // for psi's coefficients
  const void* data;  // the first channel
  int64_t stride_n, stride_c, stride_h, stride_w;
};

/// A chunk of one source for one block of outputs, as the packing kernel sees it.
struct Chunk {
  Weight weight;    // at the first channel and output; [outputs][channels][3][3]
  int64_t channel;  // in scale and shift; -1 for none
  int32_t channels, outputs;
};

/// Up to 8 * kMostTiles outputs of one convolution.
struct Job {
  int32_t first_stage, num_stages;
  int32_t outputs;
  int32_t partial_channel;  // where its sums go
  View out;                 // at the first output; null where only sums are wanted
  View x;                   // backward: the source, at the first output
  int64_t channel;          // first output in bias (forward) or in scale and shift (backward)
};

/// Packed weights [chunk][tap][half][8 * tiles outputs][channels of a slot], rounded to TF32 where
/// they are float32, and coefficients [chunk][half][scale, shift][channels of a slot].
struct PackChunks {
  const Chunk* chunks;
  int64_t num_chunks;
  int32_t tiles;
  int32_t slot_channels;
  DType dtype;
  Vector scale, shift;
  void* weights;
  float* coefficients;
};

/// The tensor-core convolution kernels.
struct TensorConvolve {
  const Stage* stages;
  const Job* jobs;
  int32_t num_jobs;
  int32_t tiles_h, tiles_w;  // of the map
  int32_t height, width;
  bool relu;         // backward: of the psi that the gradient passes
  Access results;    // of all results, and of what psi's derivative reads
  bool wide_stores;  // 16-bit results are aligned to 16 bytes
  const void* weights;
  const float* coefficients;
  const float *scale, *shift, *bias;
  float* partial;
  int64_t partial_channels;
};

// The weight gradient: a block walks down the map, some rows of the gradient a step.
constexpr int kWeightChunk = 16;  // channels, which are the rows of a product
constexpr int weight_rows(int element_bytes) { return element_bytes == 4 ? 1 : 2; }
/// One warp for each row of taps and row of a step.
constexpr int weight_warps(int element_bytes) { return 3 * weight_rows(element_bytes); }
constexpr int weight_threads(int element_bytes) { return 32 * weight_warps(element_bytes); }

// Its staged source is a ring: the rows of a step, of the one before, the one after, and the one
// that is being loaded.
constexpr int ring_rows(int element_bytes) { return 4 * weight_rows(element_bytes); }
constexpr int kRingColumns = kColumns + 2 * kWidestBand;
// Of 16 bits, [half of the chunk][row][column] in slots as above.
constexpr int kRingPitch = kRingColumns + 2;              // 2 modulo 8
constexpr int kRingHalf = ring_rows(2) * kRingPitch + 1;  // 1 modulo 8
static_assert(kRingPitch % 8 == 2 && kRingHalf % 8 == 1);
// Of float32, [row][channel][column]: a fragment is read element by element, for its rows are
// channels and ldmatrix transposes 16-bit elements only. Eight channels by four columns lie in 32
// banks at any shift.
constexpr int kRingChannel = kRingColumns + 4;  // 4 modulo 32
static_assert(kRingChannel % 32 == 4);
constexpr int ring_bytes(int element_bytes) {
  return element_bytes == 4 ? ring_rows(4) * kWeightChunk * kRingChannel * 4 : 2 * kRingHalf * 16;
}
/// Bytes of an output in the staged gradient: odd in slots, so that ldmatrix has no conflicts.
constexpr int gradient_pitch(int element_bytes) {
  return weight_rows(element_bytes) * kColumns * element_bytes + 16;
}

/// Dynamic shared memory: the source's rows, two steps of the gradient.
constexpr int weight_shared_bytes(int element_bytes) {
  return ring_bytes(element_bytes) + 2 * 8 * kMostTiles * gradient_pitch(element_bytes);
}
/// Floats of an output as the sums pass shared memory at the end; the last one is the bias.
constexpr int kSumsPitch = 9 * kWeightChunk + 1;
static_assert(weight_shared_bytes(2) >= 8 * kMostTiles * kSumsPitch * 4 &&
              weight_shared_bytes(4) >= 8 * kMostTiles * kSumsPitch * 4);

/// What a block of the weight gradient sums: some channels of a source and some outputs, over all
/// rows of taps.
///
/// Rows are walked in steps of the dilation: those of one remainder are a walk of its own, in which
/// every row is staged once and serves all three rows of taps.
struct WeightJob {
  const void* data;  // the first channel
  int64_t stride_n, stride_c, stride_h, stride_w;
  Access access;
  int64_t first_column;  // of the result: the first channel's first tap
  int32_t channels;      // up to kWeightChunk
  int32_t chunk;         // for psi's coefficients
  int32_t taps;          // of a row: 3, or 1 of a dilation too wide for a band
  int32_t dilation;      // of the columns; 0 for a single tap
  int32_t column;        // where the staged columns start, relative to the tile
  int32_t columns;       // staged, a multiple of 8
  int32_t row_dilation;  // 0: the outer rows of taps see padding only
  int32_t stride;        // of a walk, in rows
  int32_t remainders;    // walks of a column of tiles
  int32_t steps;         // of a walk
  int32_t live;          // 0: the taps see padding only, their gradient is zero
  int32_t bias;          // 1: this block also sums the gradient itself
  int32_t first_output, outputs;
};

/// First stage of the weight gradient on tensor cores.
struct TensorWeightGradient {
  const WeightJob* jobs;
  int32_t num_jobs, parts;
  int32_t batch, height, width, tiles_w;
  View gradient;
  Access access;    // of the gradient
  bool wide_loads;  // it is aligned to 16 bytes
  const float* coefficients;
  int32_t outputs;
  int64_t columns;
  float* partial;  // [part][outputs][columns]
};

}  // namespace d3net::cuda
