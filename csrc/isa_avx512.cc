// Compile with -mavx512f -mavx512vl -mavx512bw -mavx512dq -mfma.
#ifdef __x86_64__
#define KERNELS avx512_kernels
#define QUADS(V, X) tile<V, X<4>, 4, 1, 4, 2>, tile<V, X<8>, 8, 1, 4, 2>, tile<V, X<16>, 16, 1, 4, 2>, \
                    tile<V, X<32>, 16, 2, 4, 1>, tile<V, X<64>, 16, 4, 4, 1>
#define WIDES(V, X) wide<V, X<4>, 4, 1, 8>, wide<V, X<8>, 8, 1, 8>, wide<V, X<16>, 16, 1, 8>, \
                    wide<V, X<32>, 16, 2, 8>, wide<V, X<64>, 16, 2, 8>
#include "tiles.inl"
#endif
