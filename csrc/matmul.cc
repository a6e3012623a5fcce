// y = x @ W: cuts x into panels of batch columns, hands out (tile of W, panels) to the threads.
#include <algorithm>
#include <atomic>
#include <cstring>
#include "kernels.h"
#include "pool.h"
#include "sparse_ops.h"

namespace sparse_ops {

int64_t best_isa() {
#ifdef __x86_64__
  static const int64_t best = [] {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 1;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") ? 3 : 2;
  }();
  return best;
#else
  return 1;
#endif
}

const Kernels& kernels(int64_t isa) {
#ifdef __x86_64__
  const int64_t best = best_isa(), i = isa == 0 ? best : std::min(isa, best);
  if (i == 3) return avx512_kernels;
  if (i == 2) return avx2_kernels;
#endif
  return (void)isa, plain_kernels;
}

Status to_pack(const Structure& s, const Values& v, Pack* out) {
  if (s.K < 0 || s.N < 0 || s.K > INT32_MAX || s.N > INT32_MAX) return "W is too large";
  if (s.width != 1 && s.width != 8) return "width must be 1 or 8";
  if (s.kb < 1 || s.kb > 65535) return "kb must be 1 to 65535";
  if (s.nt < 4 * s.width || s.nt > 65536 || s.nt % (4 * s.width)) return "nt must be a multiple of 4 * width, to 65536";
  const int64_t ntile = (s.N + s.nt - 1) / s.nt, nkb = std::max<int64_t>(1, (s.K + s.kb - 1) / s.kb);
  const int64_t groups = s.nt / s.width, blocks = ntile * nkb;
  if (s.n_base != blocks + 1) return "base does not have one entry for each block and one more";
  if (s.n_cnt != blocks * groups || s.n_col != blocks * groups) return "cnt or col does not fit the blocks";
  if (s.n_offs > INT32_MAX || v.size != s.n_offs * s.width) return "the values do not fit the offsets";
  *out = {v.data, s.offs, s.cnt, s.col, s.base, s.n_offs, (int)s.K, (int)s.kb, (int)nkb, (int)s.nt, (int)groups};
  return nullptr;
}

namespace {

struct Panel {
  int64_t b0;
  int rows, kind;
};

// Panels of 64 rows of x, then the rest: at best 32 and a few for 33 to 48 rows, whose work a panel of 64 exceeds.
struct Panels {
  int64_t full;
  Panel rest[2];
  int n_rest = 0;
  explicit Panels(int64_t B) : full(B / 64) {
    for (int b = 0, left = B % 64, rows; left; b += rows, left -= rows) {
      rows = left > 32 && left <= 48 ? 32 : left;
      const int kind = std::lower_bound(kPanel, kPanel + kPanels, rows) - kPanel;
      rest[n_rest++] = {full * 64 + b, rows, kind};
    }
  }
  int64_t size() const { return full + n_rest; }
  Panel operator[](int64_t i) const { return i < full ? Panel{i * 64, 64, kPanels - 1} : rest[i - full]; }
};

}  // namespace

Status matmul(const Structure& s, const Values& values, const float* x, int64_t B, float* y, const Options& options) {
  Pack w;
  if (Status bad = to_pack(s, values, &w)) return bad;
  if (B <= 0 || s.N == 0) return nullptr;
  const int64_t K = s.K, N = s.N, nt = s.nt, ntile = (N + nt - 1) / nt;
  const Kernels& kern = kernels(options.isa);
  const Tiles& tiles = kern.tiles[values.bf16][s.width == 8];
  const Panels panels(B);
  const int64_t np = panels.size(), chunk = 256, nchunk = (K + chunk - 1) / chunk;

  Team team(options.threads, values.size * ((s.width == 1) + B / 12.) + (double)B * (K + N) + 8. * s.n_cnt);
  // Panels with P > 1 are transposed: P floats for each row of W, zeros where there are no more rows of x.
  const bool in_place = panels[np - 1].kind == 0;  // the last panel, of a single row
  size_t need = 0;
  for (int i = 0; i < panels.n_rest; i++) if (panels.rest[i].kind) need += (size_t)K * kPanel[panels.rest[i].kind];
  const Scratch xt(0, need + (size_t)panels.full * 64 * K);
  if (!xt.data()) return "no memory";
  auto place = [&](int64_t i) {
    size_t at = (size_t)std::min(i, panels.full) * 64 * K;
    for (int64_t j = panels.full; j < i; j++) at += (size_t)K * kPanel[panels[j].kind];
    return xt.data() + at;
  };
  auto in = [&](int64_t i) {
    const Panel p = panels[i / nchunk];
    const int P = kPanel[p.kind];
    const int64_t k = i % nchunk * chunk, n = std::min(chunk, K - k);
    float* d = place(i / nchunk) + k * P;
    if (p.rows < P) memset(d, 0, n * P * sizeof(float));
    kern.transpose(x + p.b0 * K + k, K, p.rows, n, d, P);
  };
  team.run((np - in_place) * nchunk, in);

  // A tile is checked once for all the panels of an item; items are as large as leaves enough of them for everyone.
  const int64_t step = std::max<int64_t>(1, std::min(np, np * ntile / (4 * team.size()))), nstep = (np + step - 1) / step;
  std::atomic<Status> status{nullptr};
  auto mul = [&](int64_t item) {  // tile-major, so that all panels read a tile of W while it is in cache
    const int64_t t = item / nstep, j = t * nt, first = item % nstep * step, last = std::min(np, first + step);
    const int n = std::min(nt, N - j);
    if (!kern.check(w, t)) {
      status = "the structure of the sparse matrix is corrupted";
      return;
    }
    const Scratch yt(1, nt * 64);
    if (!yt.data()) {
      status = "no memory";
      return;
    }
    for (int64_t i = first; i < last; i++) {
      const Panel p = panels[i];
      float* d = y + p.b0 * N + j;
      tiles.tile[p.kind](w, t, p.kind ? place(i) : x + p.b0 * K, yt.data());
      if (p.kind) kern.transpose(yt.data(), kPanel[p.kind], n, p.rows, d, N);
      else memcpy(d, yt.data(), n * sizeof(float));
    }
  };
  team.run(ntile * nstep, mul);
  return status;
}

}  // namespace sparse_ops
