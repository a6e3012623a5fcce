// What each instruction set offers to the drivers: matmul.cc and conv.cc.
#pragma once
#include <cstddef>
#include <cstdint>
#include "sparse_ops.h"

namespace sparse_ops {

// A Structure and its values, once their sizes were found to fit; a block's contents are not yet trusted.
struct Pack {
  const void* values;
  const uint16_t *offs, *cnt, *col;
  const int32_t* base;
  int64_t n_offs;
  int K, kb, nkb, nt, groups;  // nkb: blocks of kb rows in a tile; groups = nt / width: entries of cnt in a block
};

constexpr int kPanels = 6, kPanel[kPanels] = {1, 4, 8, 16, 32, 64};

struct Tiles {
  // y[nt,P] = tile t's product with a panel of P = kPanel[i] batch columns, all K rows of it.
  // `tile`: row k of the panel is at x + k * P. `tile_at`: at x + at[k]. Neither needs more than a float's alignment.
  void (*tile[kPanels])(const Pack&, int t, const float* x, float* y);
  void (*tile_at[kPanels])(const Pack&, int t, const float* x, const ptrdiff_t* at, float* y);
};

struct Kernels {
  Tiles tiles[2][2];  // [values are bfloat16][width is 8]
  // Whether tile t's part of the structure stays inside its arrays; only then may a tile function see it.
  bool (*check)(const Pack&, int t);
  // d[c * ds + r] = s[r * ss + c] for r < rows, c < cols.
  void (*transpose)(const float* s, size_t ss, int rows, int cols, float* d, size_t ds);
};

extern const Kernels plain_kernels;
#ifdef __x86_64__
extern const Kernels avx2_kernels, avx512_kernels;
#endif
const Kernels& kernels(int64_t isa);  // as in Options; the best below it where a processor lacks it

// Checks everything about the arrays but what `check` does for each tile.
Status to_pack(const Structure&, const Values&, Pack*);

}  // namespace sparse_ops
