#define KERNELS plain_kernels
#define QUADS(V, X) tile<V, X<4>, 4, 1, 4, 2>, tile<V, X<8>, 4, 2, 4, 1>, tile<V, X<16>, 4, 4, 2, 1>, \
                    tile<V, X<32>, 4, 8, 1, 1>, tile<V, X<64>, 4, 8, 1, 1>
#define WIDES(V, X) wide<V, X<4>, 4, 1, 8>, wide<V, X<8>, 4, 2, 4>, wide<V, X<16>, 4, 2, 4>, \
                    wide<V, X<32>, 4, 2, 4>, wide<V, X<64>, 4, 2, 4>
#include "tiles.inl"
