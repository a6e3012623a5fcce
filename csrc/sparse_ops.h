// The products of sparsejax: y = x @ W and convolutions whose weights are sparse, on CPUs, in float32 arithmetic.
#pragma once
#include <cstdint>

namespace sparse_ops {

// Where the kept weights of W[K,N] are; CONTRIBUTING.md, "The kernel", has the format.
struct Structure {
  int64_t K, N;
  int64_t kb, nt, width;
  const uint16_t *offs, *cnt, *col;
  const int32_t* base;
  int64_t n_offs, n_cnt, n_col, n_base;
};

struct Values {
  const void* data;
  bool bf16;
  int64_t size;
};

struct Options {
  int64_t isa;      // 0: the best there is, 1: plain C++, 2: AVX2, 3: AVX-512
  int64_t threads;  // 0: one for each processor allowed
};

struct Window {
  int64_t n, h, w, c;  // x: NHWC
  int64_t kh, kw, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
  int64_t out_h, out_w;
};

using Status = const char*;  // nullptr, or what is wrong

Status matmul(const Structure&, const Values&, const float* x, int64_t B, float* y, const Options&);
Status conv(const Structure&, const Values&, const Window&, const float* x, float* y, const Options&);
int64_t best_isa();

}  // namespace sparse_ops
