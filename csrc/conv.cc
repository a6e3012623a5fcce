// The driver of convolutions.
//
// The rows of x that some rows of outputs need, a region, are laid out by channel, padded, one row behind the other.
// For the output at place p of such a plane, W's row (channel, ky, kx) then meets the float at p and an offset of that
// row alone: a run of 64 places is a panel, as if it were 64 rows of a matrix. Places between two rows of outputs are
// computed, too, and dropped.
//
// With a stride, every stride-th place of x follows the other: a plane for each remainder, a slot, that the window's
// taps begin with. Several images may lie side by side; a place is then one float of each, and every run is aligned.
//
// A region is one thread's, and small enough for its cache until it is done. Regions do not depend on the number of
// threads, so y does not either.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "pool.h"
#include "sparse_ops.h"

namespace sparse_ops {
namespace {

// What things cost, in cycles, measured on a Zen 3.
constexpr double kPanelCost[kPanels] = {1.5, 1.7, 1.8, 2, 3.3, 6};  // a kept weight times a panel
constexpr double kMisaligned = 1.1;
constexpr double kLayOut = .7;  // a float of x
constexpr double kCopy = .5;    // a float of y
constexpr double kFew = .1;     // to have half as many items as there could be
constexpr double kItem = 2e5;   // an item that is large enough
constexpr int64_t kMostItems = 32, kMostBands = 64;
// Floats of a region that leave a small cache (512 KiB) room for a tile of W, and the cost of a larger region.
constexpr int64_t kCached = 65536;
constexpr double kUncached = 1.05;

constexpr int64_t kLine = 16;                  // floats of a cache line
constexpr int64_t kTail = kPanel[kPanels - 1];  // what a panel may read beyond its places
constexpr int64_t kLargest = int64_t{1} << 31;
constexpr int64_t kMostFloats = int64_t{1} << 28;  // of a region: 1 GiB

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b > 0); }  // of any a

// One direction of the window.
struct Axis {
  int64_t in, out, taps, stride, dilation, pad;
  int64_t slots, reach, pitch;

  Axis(int64_t in, int64_t out, int64_t taps, int64_t stride, int64_t dilation, int64_t pad)
      : in(in), out(out), taps(taps), stride(stride), dilation(dilation), pad(pad) {
    slots = std::min(taps, period());
    reach = shift(taps - 1);
    // One row's zeros at the end may be those that the next one begins with.
    int64_t zeros = out + reach, last = 0;
    for (int64_t s = 0; s < slots; s++) zeros = std::min(zeros, begin(s)), last = std::max(last, end(s));
    const int64_t all = out + reach;
    pitch = std::max({out, std::min(last, all), all - std::max<int64_t>(zeros, 0)});
  }

  // The output at place p meets at tap t the place p + shift(t) of slot(t).
  int64_t slot(int64_t tap) const { return tap % period(); }
  int64_t shift(int64_t tap) const { return tap * dilation / stride; }
  // Places begin(s) to end(s) of slot s are in x, at source(s, place); before and after are zeros.
  int64_t source(int64_t slot, int64_t place) const { return place * stride + first(slot); }
  int64_t begin(int64_t slot) const { return ceil_div(-first(slot), stride); }
  int64_t end(int64_t slot) const { return ceil_div(in - first(slot), stride); }

 private:
  int64_t period() const {
    int64_t a = stride;
    for (int64_t b = dilation; b;) std::swap(a %= b, b);
    return stride / a;
  }
  int64_t first(int64_t slot) const { return slot * dilation % stride - pad; }
};

struct Geometry {
  Axis down, across;
  int64_t channels;

  int64_t planes() const { return channels * slots(); }
  int64_t slots() const { return down.slots * across.slots; }
  // From the first output of `rows` rows to the last.
  int64_t places(int64_t rows) const { return (rows - 1) * across.pitch + across.out; }
};

// How some of the images are computed: `group` of them side by side, `rows` rows of outputs a region.
struct Plan {
  int64_t first, groups, group, rows, bands;
  int64_t plane, size;  // floats of a plane, and of a region
  double cycles;
  const ptrdiff_t* at = nullptr;

  Plan() = default;
  Plan(const Geometry& geo, int64_t images, int64_t group, int64_t rows, double kept)
      : groups(images / group), group(group), rows(rows), bands(ceil_div(geo.down.out, rows)) {
    const Axis& across = geo.across;
    const int64_t length = (rows + geo.down.reach) * across.pitch + across.out + across.reach - across.pitch;
    plane = (ceil_div(length * group, kLine) | 1) * kLine;  // odd: channels fall on different sets of a cache
    size = plane * geo.planes() + kTail;
    const int64_t places = geo.places(rows) * group, full = places / kTail, rest = places % kTail;
    double panels = full * kPanelCost[kPanels - 1] + (rest ? kPanelCost[panel(rest)] : 0);
    panels *= (group == 1 ? kMisaligned : 1) * (size > kCached + kTail ? kUncached : 1);
    cycles = regions() * (kept * panels + kLayOut * size);
  }

  static int panel(int64_t places) {
    int i = 0;
    while (i + 1 < kPanels && kPanel[i] < places) i++;
    return i;
  }
  int64_t regions() const { return groups * bands; }
};

// The cheapest plan for as many of the images as it takes.
Plan plan(const Geometry& geo, int64_t images, double kept, int64_t tiles, int64_t lanes) {
  Plan best{};
  for (int64_t group : {lanes, int64_t{8}, int64_t{1}}) {
    const int64_t row = geo.planes() * geo.across.pitch * group;
    if (group > images || group == best.group) continue;
    if (group > 1 && row * (1 + geo.down.reach) > 8 * kCached) continue;
    const int64_t fewest = ceil_div(geo.down.out, std::max<int64_t>(1, kCached / row - geo.down.reach));
    Plan plan{};
    double least = -1;
    for (int64_t bands = fewest; bands <= geo.down.out && bands < fewest + kMostBands; bands++) {
      const Plan p(geo, images, group, ceil_div(geo.down.out, bands), kept);
      const double items = std::min<double>(kMostItems, p.cycles / kItem) / (p.regions() * tiles);
      const double cost = p.cycles * (1 + kFew * std::max(0., std::log2(items)));
      if (least < 0 || cost < least) least = cost, plan = p;
    }
    const bool better = !best.group || plan.cycles * best.groups * best.group < best.cycles * plan.groups * plan.group;
    if (better) best = plan;
  }
  return best;
}

// The offset of each of W's rows.
void offsets(const Geometry& geo, const Plan& plan, ptrdiff_t* at) {
  const int64_t taps = geo.down.taps * geo.across.taps;
  for (int64_t k = 0; k < taps; k++) {
    const int64_t ky = k / geo.across.taps, kx = k % geo.across.taps;
    at[k] = (geo.down.slot(ky) * geo.across.slots + geo.across.slot(kx)) * plan.plane +
            (geo.down.shift(ky) * geo.across.pitch + geo.across.shift(kx)) * plan.group;
  }
  for (int64_t k = taps; k < geo.channels * taps; k++) at[k] = at[k - taps] + plan.plane * geo.slots();
}

// The planes, by channel and slot, of the images from `image` and the rows of outputs from `row` on.
void lay_out(const Kernels& kernels, const Geometry& geo, const Plan& plan, int64_t image, int64_t row, const float* x,
             float* planes) {
  const Axis &down = geo.down, &across = geo.across;
  const int64_t c = geo.channels, group = plan.group, pixel = across.stride * c, step = plan.plane * geo.slots();
  const int64_t whole = down.in * across.in * c;
  memset(planes, 0, plan.size * sizeof(float));
  for (int64_t slot = 0; slot < geo.slots(); slot++) {
    const int64_t sy = slot / across.slots, sx = slot % across.slots;
    const int64_t p0 = std::max<int64_t>(0, across.begin(sx)), n = std::min(across.end(sx), across.pitch) - p0;
    const int64_t y0 = std::max(row, down.begin(sy)), y1 = std::min(row + plan.rows + down.reach, down.end(sy));
    for (int64_t y = y0; n > 0 && y < y1; y++) {
      const float* from = x + image * whole + (down.source(sy, y) * across.in + across.source(sx, p0)) * c;
      float* to = planes + slot * plan.plane + ((y - row) * across.pitch + p0) * group;
      if (across.pitch == 1 && group == 1) {  // all rows at once
        kernels.transpose(from, down.stride * across.in * c, y1 - y, c, to, step);
        break;
      }
      if (pixel == 1 && group == 1) {
        memcpy(to, from, n * sizeof(float));
      } else if (pixel == 1) {
        kernels.transpose(from, whole, group, n, to, group);
      } else if (group == 1) {
        kernels.transpose(from, pixel, n, c, to, step);
      } else {
        constexpr int64_t some = 64;  // channels whose lines of the planes stay in the cache for the next place
        for (int64_t k = 0; k < c; k += some)
          for (int64_t p = 0; p < n; p++)
            kernels.transpose(from + p * pixel + k, whole, group, std::min(some, c - k), to + p * group + k * step, step);
      }
    }
  }
}

// The outputs among a panel's places [first, last): n columns of y, which begins with the first image and row.
void copy_out(const Kernels& kernels, const Geometry& geo, int64_t group, int64_t first, int64_t last, const float* panel,
              int P, int64_t n, float* y, int64_t N) {
  const int64_t pitch = geo.across.pitch, out = geo.across.out, image = geo.down.out * out * N;
  for (int64_t p = first; p < last;) {
    const int64_t oy = p / pitch, ox = p % pitch;
    const int64_t run = pitch == out ? last - p : std::min(out - ox, last - p);
    const float* from = panel + (p - first) * group;
    float* to = y + (oy * out + ox) * N;
    if (group == 1 && run > 0) kernels.transpose(from, P, n, run, to, N);
    for (int64_t i = 0; group > 1 && i < run; i++) kernels.transpose(from + i * group, P, n, group, to + i * N, image);
    p += pitch == out ? run : pitch - ox;
  }
}

// Whether all sizes are sensible and nothing that is computed of them leaves an int64.
Status check(const Structure& s, const Window& v) {
  for (int64_t size : {v.n, v.h, v.w, v.c, v.kh, v.kw, v.out_h, v.out_w})
    if (size < 0 || size >= kLargest) return "a size of the window is negative or too large";
  for (int64_t size : {v.stride_h, v.stride_w, v.dilation_h, v.dilation_w})
    if (size < 1 || size >= kLargest) return "strides and dilations must be at least 1";
  for (int64_t pad : {v.pad_top, v.pad_left})
    if (pad <= -kLargest || pad >= kLargest) return "the padding is too large";
  if (double(v.c) * v.kh * v.kw != double(s.K)) return "W does not have the rows of the window";
  const double large = double(kLargest) * kLargest / 4;
  const double down = double(v.kh) * v.dilation_h, across = double(v.kw) * v.dilation_w;
  if (double(v.n) * v.h * v.w * v.c > large || double(v.n) * v.out_h * v.out_w * s.N > large ||
      down >= kLargest || across >= kLargest || (down + 1) * (across + v.out_w) * (s.K + 1.) * 64 > large)
    return "the window is too large";
  return nullptr;
}

}  // namespace

Status conv(const Structure& s, const Values& values, const Window& v, const float* x, float* y, const Options& options) {
  Pack w;
  if (Status bad = to_pack(s, values, &w)) return bad;
  if (Status bad = check(s, v)) return bad;
  const int64_t N = s.N, count = v.n * v.out_h * v.out_w * N;
  if (count == 0) return nullptr;
  if (s.K == 0) {
    memset(y, 0, count * sizeof(float));
    return nullptr;
  }
  const bool one_place = v.kh == 1 && v.kw == 1 && v.stride_h == 1 && v.stride_w == 1 && !v.pad_top && !v.pad_left;
  if (one_place && v.out_h == v.h && v.out_w == v.w) return matmul(s, values, x, v.n * v.h * v.w, y, options);

  const Kernels& kern = kernels(options.isa);
  const Tiles& tiles = kern.tiles[values.bf16][s.width == 8];
  const Axis down{v.h, v.out_h, v.kh, v.stride_h, v.dilation_h, v.pad_top};
  const Axis across{v.w, v.out_w, v.kw, v.stride_w, v.dilation_w, v.pad_left};
  // A single row of outputs is as well a single column, which can be cut into regions.
  const bool flat = v.h == 1 && v.kh == 1 && v.out_h == 1 && v.pad_top == 0;
  const Geometry geo{flat ? across : down, flat ? down : across, v.c};
  if (Plan(geo, 1, 1, 1, 0).size > kMostFloats) return "the window is too large: it needs more than 1 GiB for a row of outputs";
  const int64_t ntile = ceil_div(N, s.nt);
  const double kept = values.size * (s.width == 8 ? .5 : 1.);
#ifdef __x86_64__
  const int64_t lanes = &kern == &avx512_kernels ? 16 : 8;
#else
  const int64_t lanes = 8;
#endif
  Plan plans[3];  // each takes all the images but fewer than its group
  int n_plans = 0;
  int64_t regions = 0;
  double cycles = kCopy * count;
  for (int64_t done = 0; done < v.n; n_plans++) {
    Plan& p = plans[n_plans] = plan(geo, v.n - done, kept, ntile, lanes);
    p.first = done;
    done += p.groups * p.group;
    regions += p.regions();
    cycles += p.cycles;
  }
  static_assert(sizeof(ptrdiff_t) % sizeof(float) == 0, "");
  const Scratch ats(2, n_plans * s.K * (sizeof(ptrdiff_t) / sizeof(float)));
  if (!ats.data()) return "no memory";
  for (int i = 0; i < n_plans; i++) {
    ptrdiff_t* at = reinterpret_cast<ptrdiff_t*>(ats.data()) + i * s.K;
    offsets(geo, plans[i], at);
    plans[i].at = at;
  }

  Team team(options.threads, cycles);
  // Where regions are few, threads share one: each lays it out and computes some of the tiles.
  const int64_t enough = team.size() > 1 ? ceil_div(2 * team.size(), regions) : 1;
  const int64_t step = ceil_div(ntile, std::min(ntile, enough)), parts = ceil_div(ntile, step);
  std::atomic<Status> status{nullptr};
  auto item = [&](int64_t i) {
    const Plan* p = plans;
    int64_t region = i % regions;
    for (; region >= p->regions(); p++) region -= p->regions();
    const int64_t image = p->first + region / p->bands * p->group, row = region % p->bands * p->rows;
    const Scratch planes(0, p->size), yt(1, s.nt * kTail);
    if (!planes.data() || !yt.data()) {
      status = "no memory";
      return;
    }
    lay_out(kern, geo, *p, image, row, x, planes.data());
    const int64_t end = geo.places(std::min(p->rows, geo.down.out - row)) * p->group;
    const int64_t t0 = i / regions * step, t1 = std::min(ntile, t0 + step);
    for (int64_t t = t0; t < t1; t++) {
      if (!kern.check(w, t)) {
        status = "the structure of the sparse matrix is corrupted";
        return;
      }
      float* corner = y + (image * geo.down.out + row) * geo.across.out * N + t * s.nt;
      for (int64_t at = 0, P; at < end; at += P) {
        const int kind = Plan::panel(end - at);
        P = kPanel[kind];
        tiles.tile_at[kind](w, t, planes.data() + at, p->at, yt.data());
        copy_out(kern, geo, p->group, at / p->group, std::min(at + P, end) / p->group, yt.data(), P,
                 std::min(s.nt, N - t * s.nt), corner, N);
      }
    }
  };
  team.run(regions * parts, item);
  return status;
}

}  // namespace sparse_ops
