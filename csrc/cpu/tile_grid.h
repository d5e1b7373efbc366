// A convolution with dilation d is d x d undilated ones, each on the lattice of pixels d apart. A
// tile is a square of outputs x outputs neighbours on one such lattice, so that Winograd's
// transforms serve every dilation: only the distance between the pixels of a tile changes.
#pragma once

#include <algorithm>
#include <cstdint>

namespace d3net::cpu {

struct TileGrid {
  int64_t batch = 0, height = 0, width = 0;
  int64_t dilation_h = 1, dilation_w = 1;  // distance of neighbours on a lattice
  int64_t outputs = 1;                     // along each side of a tile

  int64_t count() const { return batch * origins(height, dilation_h) * origins(width, dilation_w); }
  /// Tiles side by side along an axis of `size` pixels; the last ones may pass its end.
  int64_t origins(int64_t size, int64_t dilation) const {
    const int64_t band = outputs * dilation;
    return size / band * dilation + std::min(dilation, size % band);
  }
};

/// Walks over a grid from top to bottom; the lattices take turns within a band of `outputs *
/// dilation` rows and columns, so that tiles which follow each other read neighbouring memory. Low
/// maps, where one band would soon be all rows, are walked in stripes from left to right: whatever
/// the dilation, the first half of the walk is then about the same half of the map, and so the same
/// thread's.
class TileCursor {
 public:
  static constexpr int64_t kLow = 64;  // rows

  int64_t image = 0, y = 0, x = 0;  // of the tile's first output
  int64_t left, right;              // of the stripe

  TileCursor(const TileGrid& grid, int64_t index) : grid_(grid) {
    const int64_t rows = grid.origins(grid.height, grid.dilation_h);
    const int64_t in_image = rows * grid.origins(grid.width, grid.dilation_w);
    const int64_t in_stripe = rows * grid.origins(stripe(), grid.dilation_w);
    image = index / in_image;
    index %= in_image;
    left = index / in_stripe * stripe();
    index %= in_stripe;
    right = std::min(left + stripe(), grid.width);
    const int64_t columns = grid.origins(right - left, grid.dilation_w);
    band_y_ = index / (grid.dilation_h * columns) * band_h();
    index %= grid.dilation_h * columns;
    rows_ = std::min(grid.dilation_h, grid.height - band_y_);
    band_x_ = left + index / (rows_ * grid.dilation_w) * band_w();
    index %= rows_ * grid.dilation_w;
    columns_ = std::min(grid.dilation_w, right - band_x_);
    y = band_y_ + index / columns_;
    x = band_x_ + index % columns_;
  }

  void advance() {
    if (++x < band_x_ + columns_) return;
    if (++y == band_y_ + rows_) next_band();
    x = band_x_;
  }

 private:
  static constexpr int64_t kStripe = 64;  // columns

  int64_t band_h() const { return grid_.outputs * grid_.dilation_h; }
  int64_t band_w() const { return grid_.outputs * grid_.dilation_w; }
  int64_t stripe() const {
    const int64_t whole = grid_.height > kLow ? grid_.width : kStripe;
    return (whole + band_w() - 1) / band_w() * band_w();
  }

  void next_band() {
    band_x_ += band_w();
    if (band_x_ >= right) {
      band_y_ += band_h();
      if (band_y_ >= grid_.height) {
        band_y_ = 0;
        left = right;
        if (left == grid_.width) {
          left = 0;
          ++image;
        }
        right = std::min(left + stripe(), grid_.width);
      }
      band_x_ = left;
      rows_ = std::min(grid_.dilation_h, grid_.height - band_y_);
    }
    columns_ = std::min(grid_.dilation_w, right - band_x_);
    y = band_y_;
  }

  TileGrid grid_;
  int64_t band_y_, band_x_, rows_, columns_;
};

struct Box {
  int64_t y, rows, x, columns;
};

/// Of a grid of single pixels: what `count` of them from number `begin` on lie in.
inline Box box_of(const TileGrid& pixels, int64_t begin, int64_t count) {
  const TileCursor first(pixels, begin), last(pixels, begin + count - 1);
  if (first.image != last.image || first.left != last.left)
    return {0, pixels.height, 0, pixels.width};
  if (first.y == last.y) return {first.y, 1, first.x, count};
  return {first.y, last.y - first.y + 1, first.left, first.right - first.left};
}

}  // namespace d3net::cpu
