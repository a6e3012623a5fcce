// The inner loops, compiled once for each instruction set: an isa_*.cc defines QUADS, WIDES and KERNELS and includes
// this file. Everything is in an anonymous namespace and nothing of the standard library is called: the linker, which
// keeps one copy of an inline function, could keep one that only another processor can run.
#include <cstring>
#include "kernels.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed to inlined functions only
#define INLINE inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define UNROLL _Pragma("GCC unroll 16")
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntVec<8>{__VA_ARGS__})
#endif

namespace sparse_ops {
namespace {

template <int L> struct VecOf {  // L lanes: F, I, W in registers; U, and H of 16 bits each, anywhere in memory
  typedef float F __attribute__((vector_size(4 * L)));
  typedef int I __attribute__((vector_size(4 * L)));
  typedef unsigned W __attribute__((vector_size(4 * L)));
  typedef float U __attribute__((vector_size(4 * L), aligned(4), may_alias));
  typedef uint16_t H __attribute__((vector_size(2 * L), aligned(2), may_alias));
};
template <int L> using Vec = typename VecOf<L>::F;
template <int L> using IntVec = typename VecOf<L>::I;
template <int L> INLINE Vec<L> ld(const float* p) { return *(const typename VecOf<L>::U*)p; }
template <int L> INLINE Vec<L> ld(const uint16_t* p) {  // bfloat16: the upper half of a float32
  return (Vec<L>)(__builtin_convertvector(*(const typename VecOf<L>::H*)p, typename VecOf<L>::W) << 16);
}
template <int L> INLINE void st(float* p, const Vec<L>& v) { *(typename VecOf<L>::U*)p = v; }
INLINE float value(float v) { return v; }
INLINE float value(uint16_t v) {
  const uint32_t bits = (uint32_t)v << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
INLINE uint64_t ld4(const uint16_t* o) {
  uint64_t k;
  memcpy(&k, o, 8);
  return k;
}

// Where a panel's rows are; `next` steps to those of the next block.
template <int P_> struct Dense {
  static constexpr int P = P_;
  const float* x;
  INLINE const float* row(unsigned k) const { return x + (size_t)k * P; }
  INLINE void next(int rows) { x += (size_t)rows * P; }
};
template <int P_> struct At {
  static constexpr int P = P_;
  const float* x;
  const ptrdiff_t* at;
  INLINE const float* row(unsigned k) const { return x + at[k]; }
  INLINE void next(int rows) { at += rows; }
};

template <class V> struct Block {
  const V* v;
  const uint16_t *o, *cnt, *col;
  Block(const Pack& w, int t, int b, int width) {
    const size_t s = (size_t)t * w.nkb + b;
    v = (const V*)w.values + (size_t)w.base[s] * width, o = w.offs + w.base[s];
    cnt = w.cnt + s * w.groups, col = w.col + s * w.groups;
  }
};

// One tile for one panel, L*R batch columns and C columns of W at a time, U independent sums for each.
template <class V, class X, int L, int R, int C, int U> INLINE void tile(const Pack& w, int t, X x, float* y) {
  constexpr int P = X::P;
  for (int b = 0; b < w.nkb; b++, x.next(w.kb)) {
    Block<V> k(w, t, b, 1);
    const V* v = k.v;
    const uint16_t *o = k.o, *cnt = k.cnt, *col = k.col;
    for (int q = 0; q < w.nt; q += 4) {
      const int n = cnt[q];
      const V* tv;
      const uint16_t* to;
      for (int r0 = 0; r0 < P; r0 += L * R) {
        tv = v + 4 * n, to = o + 4 * n;  // the tails
        UNROLL for (int c0 = 0; c0 < 4; c0 += C) {
          Vec<L> a[U][C][R] = {};
          if (b) UNROLL for (int c = 0; c < C; c++)
            UNROLL for (int r = 0; r < R; r++) a[0][c][r] = ld<L>(y + (size_t)col[q + c0 + c] * P + r0 + L * r);
          int p = 0;
          auto row = [&](Vec<L>(&acc)[C][R]) __attribute__((always_inline)) {  // entry p of C columns
            const uint64_t o4 = C == 4 ? ld4(o + 4 * p) : 0;
            UNROLL for (int c = 0; c < C; c++) {
              const float* xr = x.row(C == 4 ? uint16_t(o4 >> 16 * c) : o[4 * p + c0 + c]) + r0;
              const float f = value(v[4 * p + c0 + c]);
              UNROLL for (int r = 0; r < R; r++) acc[c][r] += f * ld<L>(xr + L * r);
            }
            p++;
          };
          if constexpr (U == 1) {  // apart: GCC would unroll this loop 16 times, too
            while (p < n) row(a[0]);
          } else {
            while (p + U <= n) UNROLL for (int u = 0; u < U; u++) row(a[u]);
            if (p < n) row(a[0]);
          }
          UNROLL for (int c = 0; c < C; c++) {
            UNROLL for (int r = 0; r < R; r++) UNROLL for (int u = 1; u < U; u++) a[0][c][r] += a[u][c][r];
            for (int i = cnt[q + c0 + c] - n; i > 0; i--, tv++, to++) {
              const float* xr = x.row(*to) + r0;
              const float f = value(*tv);
              UNROLL for (int r = 0; r < R; r++) a[0][c][r] += f * ld<L>(xr + L * r);
            }
            UNROLL for (int r = 0; r < R; r++) st<L>(y + (size_t)col[q + c0 + c] * P + r0 + L * r, a[0][c][r]);
          }
        }
      }
      v = tv, o = to;
    }
  }
}

// The same for a single row of x: gathers the x of two entries of four columns into one vector.
template <class V, class X> INLINE void tile1(const Pack& w, int t, X x, float* y) {
  for (int b = 0; b < w.nkb; b++, x.next(w.kb)) {
    Block<V> k(w, t, b, 1);
    const V* v = k.v;
    const uint16_t *o = k.o, *cnt = k.cnt, *col = k.col;
    for (int q = 0; q < w.nt; q += 4) {
      const int n = cnt[q];
      Vec<8> a[2] = {};
      auto two = [&](int p) __attribute__((always_inline)) {
        const uint64_t k = ld4(o + 4 * p), l = ld4(o + 4 * p + 4);
        Vec<8> g = {*x.row(uint16_t(k)), *x.row(uint16_t(k >> 16)), *x.row(uint16_t(k >> 32)), *x.row(k >> 48),
                    *x.row(uint16_t(l)), *x.row(uint16_t(l >> 16)), *x.row(uint16_t(l >> 32)), *x.row(l >> 48)};
        return g * ld<8>(v + 4 * p);
      };
      int p = 0;
      for (; p + 4 <= n; p += 4) {
        __builtin_prefetch(v + 4 * p + 512);
        __builtin_prefetch(o + 4 * p + 1024);
        a[0] += two(p), a[1] += two(p + 2);
      }
      if (p + 2 <= n) a[0] += two(p), p += 2;
      a[0] += a[1];
      const V* tv = v + 4 * n;
      const uint16_t* to = o + 4 * n;
      UNROLL for (int c = 0; c < 4; c++) {
        float f = a[0][c] + a[0][c + 4], &d = y[col[q + c]];
        if (p < n) f += value(v[4 * p + c]) * *x.row(o[4 * p + c]);
        for (int i = cnt[q + c] - n; i > 0; i--) f += value(*tv++) * *x.row(*to++);
        d = b ? d + f : f;
      }
      v = tv, o = to;
    }
  }
}

// Blocks of eight outputs: L*R batch columns and C of the outputs at a time.
template <class V, class X, int L, int R, int C> INLINE void wide(const Pack& w, int t, X x, float* y) {
  constexpr int P = X::P;
  for (int b = 0; b < w.nkb; b++, x.next(w.kb)) {
    Block<V> k(w, t, b, 8);
    for (int g = 0; g < w.groups; g++) {
      const int n = k.cnt[g];
      float* yg = y + (size_t)k.col[g] * 8 * P;
      for (int r0 = 0; r0 < P; r0 += L * R) for (int c0 = 0; c0 < 8; c0 += C) {
        Vec<L> a[C][R] = {};
        if (b) UNROLL for (int c = 0; c < C; c++)
          UNROLL for (int r = 0; r < R; r++) a[c][r] = ld<L>(yg + (c0 + c) * P + r0 + L * r);
        for (int p = 0; p < n; p++) {
          const float* xr = x.row(k.o[p]) + r0;
          Vec<L> xs[R];
          UNROLL for (int r = 0; r < R; r++) xs[r] = ld<L>(xr + L * r);
          UNROLL for (int c = 0; c < C; c++) {
            const float f = value(k.v[8 * p + c0 + c]);
            UNROLL for (int r = 0; r < R; r++) a[c][r] += f * xs[r];
          }
        }
        UNROLL for (int c = 0; c < C; c++)
          UNROLL for (int r = 0; r < R; r++) st<L>(yg + (c0 + c) * P + r0 + L * r, a[c][r]);
      }
      k.v += 8 * n, k.o += n;
    }
  }
}

// The same for a single row of x, with the outputs in the lanes.
template <class V, class X> INLINE void wide1(const Pack& w, int t, X x, float* y) {
  for (int b = 0; b < w.nkb; b++, x.next(w.kb)) {
    Block<V> k(w, t, b, 8);
    for (int g = 0; g < w.groups; g++) {
      const int n = k.cnt[g];
      Vec<8> a[4] = {};
      int p = 0;
      for (; p + 4 <= n; p += 4)
        UNROLL for (int u = 0; u < 4; u++) a[u] += *x.row(k.o[p + u]) * ld<8>(k.v + 8 * (p + u));
      for (; p < n; p++) a[0] += *x.row(k.o[p]) * ld<8>(k.v + 8 * p);
      float* yg = y + (size_t)k.col[g] * 8;
      a[0] = (a[0] + a[1]) + (a[2] + a[3]);
      st<8>(yg, b ? ld<8>(yg) + a[0] : a[0]);
      k.v += 8 * n, k.o += n;
    }
  }
}

// The largest of n numbers, or 0.
INLINE unsigned largest(const uint16_t* p, int64_t n) {
  typedef uint16_t T __attribute__((vector_size(32)));
  typedef uint16_t U __attribute__((vector_size(32), aligned(2), may_alias));
  T a = {}, b = {};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const T v = *(const U*)(p + i), w = *(const U*)(p + i + 16);
    a = a > v ? a : v, b = b > w ? b : w;
  }
  a = a > b ? a : b;
  uint16_t most = 0;
  UNROLL for (int l = 0; l < 16; l++) most = a[l] > most ? a[l] : most;
  for (; i < n; i++) most = p[i] > most ? p[i] : most;
  return most;
}

// Blocks lie one after another inside the arrays; their counts ascend in each quad and add up to the block; every
// column is there once; offsets stay inside the block.
bool check(const Pack& w, int t) {
  const int n = w.groups;
  uint8_t seen[65536];  // of a column: the last block that had it, counted from 1 and anew every 255 blocks
  for (int b = 0; b < w.nkb; b++) {
    const size_t s = (size_t)t * w.nkb + b;
    const int64_t first = w.base[s], size = w.base[s + 1] - first;
    if (first < 0 || size < 0 || first + size > w.n_offs) return false;
    const int64_t rest = (int64_t)w.K - (int64_t)b * w.kb, rows = rest < w.kb ? rest : w.kb;
    const uint16_t *cnt = w.cnt + s * n, *col = w.col + s * n;
    if (size && largest(w.offs + first, size) >= rows) return false;
    if ((int)largest(col, n) >= n) return false;
    const uint8_t stamp = b % 255 + 1;
    if (stamp == 1) memset(seen, 0, n);
    int64_t sum = 0;
    bool bad = false;
    int i = 0;
    if (n == w.nt) {
      for (; i < n; i += 4) {
        const unsigned c0 = cnt[i], c1 = cnt[i + 1], c2 = cnt[i + 2], c3 = cnt[i + 3];
        bad |= (c0 > c1) | (c1 > c2) | (c2 > c3);
        sum += c0 + c1 + c2 + c3;
        UNROLL for (int c = 0; c < 4; c++) seen[col[i + c]] = stamp;
      }
    } else {
      for (; i < n; i++) sum += cnt[i], seen[col[i]] = stamp;
    }
    for (i = 0; i < n; i++) bad |= seen[i] != stamp;
    if (bad || sum != size) return false;
  }
  return true;
}

// By blocks of 8x8: interleaving rows i and i+2 twice transposes each quarter, then quarters change places. A last block
// that is not full reaches back into the one before it, where there is one.
void transpose(const float* s, size_t ss, int rows, int cols, float* d, size_t ds) {
  auto block8 = [&](int r, int c) {
    if (r + 8 > rows && rows >= 8) r = rows - 8;
    if (c + 8 > cols && cols >= 8) c = cols - 8;
    if (r + 8 <= rows && c + 8 <= cols) {
      Vec<8> a[8], b[8];
      UNROLL for (int i = 0; i < 8; i++) a[i] = ld<8>(s + (r + i) * ss + c);
      UNROLL for (int k = 0; k < 2; k++) {
        UNROLL for (int i = 0; i < 4; i++) {
          const int j = i / 2 * 4 + i % 2;  // with j + 2
          b[i / 2 * 4 + i % 2 * 2] = SHUFFLE(a[j], a[j + 2], 0, 8, 1, 9, 4, 12, 5, 13);
          b[i / 2 * 4 + i % 2 * 2 + 1] = SHUFFLE(a[j], a[j + 2], 2, 10, 3, 11, 6, 14, 7, 15);
        }
        UNROLL for (int i = 0; i < 8; i++) a[i] = b[i];
      }
      UNROLL for (int i = 0; i < 4; i++) {
        st<8>(d + (c + i) * ds + r, SHUFFLE(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11));
        st<8>(d + (c + i + 4) * ds + r, SHUFFLE(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15));
      }
    } else {
      for (int i = r; i < r + 8 && i < rows; i++)
        for (int j = c; j < c + 8 && j < cols; j++) d[j * ds + i] = s[i * ss + j];
    }
  };
  // Run along the rows of the side with the large stride, which would otherwise thrash a few cache sets.
  if (ss > ds) {
    for (int r = 0; r < rows; r += 8) for (int c = 0; c < cols; c += 8) block8(r, c);
  } else {
    for (int c = 0; c < cols; c += 8) for (int r = 0; r < rows; r += 8) block8(r, c);
  }
}

// Plain functions around the templates: a panel stored row by row, and one whose rows are anywhere.
template <auto F, int P> void dense(const Pack& w, int t, const float* x, float* y) { F(w, t, Dense<P>{x}, y); }
template <auto F, int P> void at(const Pack& w, int t, const float* x, const ptrdiff_t* at, float* y) {
  F(w, t, At<P>{x, at}, y);
}
template <auto F0, auto F1, auto F2, auto F3, auto F4, auto F5, auto G0, auto G1, auto G2, auto G3, auto G4, auto G5>
constexpr Tiles tiles() {
  return {{dense<F0, 1>, dense<F1, 4>, dense<F2, 8>, dense<F3, 16>, dense<F4, 32>, dense<F5, 64>},
          {at<G0, 1>, at<G1, 4>, at<G2, 8>, at<G3, 16>, at<G4, 32>, at<G5, 64>}};
}
#define TILES(V) {tiles<tile1<V, Dense<1>>, QUADS(V, Dense), tile1<V, At<1>>, QUADS(V, At)>(), \
                  tiles<wide1<V, Dense<1>>, WIDES(V, Dense), wide1<V, At<1>>, WIDES(V, At)>()}
}  // namespace

extern const Kernels KERNELS;
const Kernels KERNELS = {{TILES(float), TILES(uint16_t)}, check, transpose};

}  // namespace sparse_ops
