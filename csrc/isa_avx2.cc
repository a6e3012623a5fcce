// Compile with -mavx2 -mfma.
#ifdef __x86_64__
#define KERNELS avx2_kernels
#define QUADS(V, X) tile<V, X<4>, 4, 1, 4, 2>, tile<V, X<8>, 8, 1, 4, 2>, tile<V, X<16>, 8, 2, 4, 1>, \
                    tile<V, X<32>, 8, 4, 2, 1>, tile<V, X<64>, 8, 8, 1, 1>
#define WIDES(V, X) wide<V, X<4>, 4, 1, 8>, wide<V, X<8>, 8, 1, 8>, wide<V, X<16>, 8, 2, 4>, \
                    wide<V, X<32>, 8, 2, 4>, wide<V, X<64>, 8, 2, 4>
#include "tiles.inl"
#endif
