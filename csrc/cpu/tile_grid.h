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

/// Walks over a grid. The lattices take turns within a band of `outputs * dilation` rows and
/// columns, so that tiles which follow each other read neighbouring memory.
class TileCursor {
 public:
  int64_t image = 0, y = 0, x = 0;  // of the tile's first output

  TileCursor(const TileGrid& grid, int64_t index) : grid_(grid) {
    const int64_t columns = grid.origins(grid.width, grid.dilation_w);
    const int64_t in_image = grid.origins(grid.height, grid.dilation_h) * columns;
    image = index / in_image;
    index %= in_image;
    band_y_ = index / (grid.dilation_h * columns) * band_h();
    index %= grid.dilation_h * columns;
    rows_ = std::min(grid.dilation_h, grid.height - band_y_);
    band_x_ = index / (rows_ * grid.dilation_w) * band_w();
    index %= rows_ * grid.dilation_w;
    columns_ = std::min(grid.dilation_w, grid.width - band_x_);
    y = band_y_ + index / columns_;
    x = band_x_ + index % columns_;
  }

  void advance() {
    if (++x < band_x_ + columns_) return;
    if (++y == band_y_ + rows_) {
      band_x_ += band_w();
      if (band_x_ >= grid_.width) {
        band_x_ = 0;
        band_y_ += band_h();
        if (band_y_ >= grid_.height) {
          band_y_ = 0;
          ++image;
        }
        rows_ = std::min(grid_.dilation_h, grid_.height - band_y_);
      }
      columns_ = std::min(grid_.dilation_w, grid_.width - band_x_);
      y = band_y_;
    }
    x = band_x_;
  }

 private:
  int64_t band_h() const { return grid_.outputs * grid_.dilation_h; }
  int64_t band_w() const { return grid_.outputs * grid_.dilation_w; }

  TileGrid grid_;
  int64_t band_y_, band_x_, rows_, columns_;
};

}  // namespace d3net::cpu
