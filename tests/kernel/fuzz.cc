// Random and corrupted structures, threads and forks: what tests/test_kernel_safety.py compiles with sanitizers and runs.
// Every array is allocated to its exact size, so that an address sanitizer sees whatever leaves it.
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "pool.h"
#include "sparse_ops.h"

using namespace sparse_ops;

static std::mt19937_64 rng;
static int64_t below(int64_t n) { return n <= 0 ? 0 : static_cast<int64_t>(rng() % static_cast<uint64_t>(n)); }
static double uniform() { return std::uniform_real_distribution<>()(rng); }
template <class T>
static T pick(std::initializer_list<T> list) {
  return list.begin()[below(static_cast<int64_t>(list.size()))];
}

[[noreturn]] static void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::_Exit(1);
}

// ---- Products that are right ------------------------------------------------------------------------------

template <class T>
struct Array {
  int64_t n = 0;
  std::unique_ptr<T[]> data;
  Array() = default;
  explicit Array(const std::vector<T>& from) : n(static_cast<int64_t>(from.size())), data(new T[from.size()]) {
    std::copy(from.begin(), from.end(), data.get());
  }
  void resize(int64_t size) {
    std::vector<T> all(data.get(), data.get() + n);
    all.resize(static_cast<size_t>(size));
    *this = Array(all);
  }
};

struct Case {
  bool is_conv = false, bf16 = false;
  int64_t K = 0, N = 0, B = 0, kb = 1, nt = 4, width = 1;
  Window window{};
  Options options{0, 0};
  std::vector<float> dense;  // [K, N]
  std::vector<char> kept;    // [K, N]
  Array<uint16_t> offs, cnt, col, values16;
  Array<int32_t> base;
  Array<float> values32, x, y;

  Structure structure() const {
    return {K, N, kb, nt, width, offs.data.get(), cnt.data.get(), col.data.get(), base.data.get(),
            offs.n, cnt.n, col.n, base.n};
  }
  Status run() {
    std::fill_n(y.data.get(), y.n, NAN);  // whatever is not written shows
    const Values values{bf16 ? static_cast<const void*>(values16.data.get()) : values32.data.get(), bf16,
                        bf16 ? values16.n : values32.n};
    return is_conv ? conv(structure(), values, window, x.data.get(), y.data.get(), options)
                   : matmul(structure(), values, x.data.get(), B, y.data.get(), options);
  }
};

static float rounded(float value, bool bf16) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (bf16) bits &= 0xffff0000u;
  std::memcpy(&value, &bits, 4);
  return value;
}

static void pack(Case& c) {
  const int64_t ntile = (c.N + c.nt - 1) / c.nt, nkb = std::max<int64_t>(1, (c.K + c.kb - 1) / c.kb);
  const int64_t groups = c.nt / c.width;
  std::vector<uint16_t> offs, cnt, col, values16;
  std::vector<int32_t> base{0};
  std::vector<float> values;
  for (int64_t t = 0; t < ntile; t++) {
    for (int64_t b = 0; b < nkb; b++) {
      const int64_t k0 = b * c.kb, rows = std::min(c.kb, c.K - k0);
      std::vector<std::vector<int64_t>> entries(static_cast<size_t>(groups));
      for (int64_t g = 0; g < groups; g++) {
        for (int64_t k = 0; k < rows; k++) {
          bool any = false;
          for (int64_t j = 0; j < c.width; j++) {
            const int64_t out = t * c.nt + g * c.width + j;
            any |= out < c.N && c.kept[(k0 + k) * c.N + out];
          }
          if (any) entries[g].push_back(k);
        }
      }
      std::vector<int64_t> order(static_cast<size_t>(groups));
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(),
                       [&](int64_t a, int64_t b) { return entries[a].size() < entries[b].size(); });
      const auto put = [&](int64_t g, size_t p) {
        const int64_t k = entries[g][p];
        offs.push_back(static_cast<uint16_t>(k));
        for (int64_t j = 0; j < c.width; j++) {
          const int64_t out = t * c.nt + g * c.width + j;
          values.push_back(out < c.N ? c.dense[(k0 + k) * c.N + out] : 0);
        }
      };
      for (int64_t g = 0; g < groups; g++) {
        cnt.push_back(static_cast<uint16_t>(entries[order[g]].size()));
        col.push_back(static_cast<uint16_t>(order[g]));
      }
      if (c.width == 1) {
        for (int64_t q = 0; q < groups; q += 4) {
          const size_t shared = entries[order[q]].size();
          for (size_t p = 0; p < shared; p++)
            for (int64_t i = q; i < q + 4; i++) put(order[i], p);
          for (int64_t i = q; i < q + 4; i++)
            for (size_t p = shared; p < entries[order[i]].size(); p++) put(order[i], p);
        }
      } else {
        for (int64_t g = 0; g < groups; g++)
          for (size_t p = 0; p < entries[order[g]].size(); p++) put(order[g], p);
      }
      base.push_back(static_cast<int32_t>(offs.size()));
    }
  }
  for (const float value : values) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    values16.push_back(static_cast<uint16_t>(bits >> 16));
  }
  c.offs = Array<uint16_t>(offs), c.cnt = Array<uint16_t>(cnt), c.col = Array<uint16_t>(col);
  c.base = Array<int32_t>(base);
  c.values16 = Array<uint16_t>(c.bf16 ? values16 : std::vector<uint16_t>());
  c.values32 = Array<float>(c.bf16 ? std::vector<float>() : values);
}

// Which weights there are; with blocks, all 8 of a block or none.
static void weights(Case& c, double density) {
  c.dense.assign(static_cast<size_t>(c.K * c.N), 0);
  c.kept.assign(c.dense.size(), 0);
  for (int64_t k = 0; k < c.K; k++) {
    for (int64_t n = 0; n < c.N; n += c.width) {
      if (uniform() >= density) continue;
      for (int64_t j = n; j < std::min(c.N, n + c.width); j++) {
        c.kept[k * c.N + j] = 1;
        c.dense[k * c.N + j] = rounded(static_cast<float>(uniform() * 2 - 1), c.bf16);
      }
    }
  }
}

static void inputs(Case& c, int64_t size) {
  std::vector<float> x(static_cast<size_t>(size));
  for (float& value : x) value = static_cast<float>(uniform() * 2 - 1);
  if (size && below(4) == 0) x[below(size)] = pick<float>({INFINITY, -INFINITY, NAN});
  c.x = Array<float>(x);
}

static Case random_case(bool large) {
  Case c;
  c.is_conv = below(3) == 0;
  c.bf16 = below(3) == 0;
  c.width = pick({1, 8});
  c.N = large ? 100 + below(150) : pick<int64_t>({0, 1, 3, 4, 8, 17, 32, below(80)});
  c.nt = 4 * c.width * (1 + below(large ? 8 : 4));
  c.options = {below(4), below(4)};
  if (c.is_conv) {
    Window& w = c.window;
    w.n = large ? 4 : below(4), w.h = large ? 16 : below(10), w.w = large ? 16 : below(10);
    w.c = large ? 16 : below(7), w.kh = 1 + below(4), w.kw = 1 + below(4);
    w.stride_h = 1 + below(3), w.stride_w = 1 + below(3), w.dilation_h = 1 + below(3), w.dilation_w = 1 + below(3);
    w.pad_top = below(5) - 1, w.pad_left = below(5) - 1;
    w.out_h = large ? 12 : below(9), w.out_w = large ? 12 : below(9);
    c.K = w.c * w.kh * w.kw;
    inputs(c, w.n * w.h * w.w * w.c);
    c.y = Array<float>(std::vector<float>(static_cast<size_t>(w.n * w.out_h * w.out_w * c.N)));
  } else {
    c.K = large ? 200 + below(300) : pick<int64_t>({0, 1, 2, 5, 31, below(100), below(200)});
    c.B = large ? pick<int64_t>({1, 65, 130, 200}) : pick<int64_t>({0, 1, 1, 2, 4, 7, 8, 16, 17, 33, 64, 65, 129});
    inputs(c, c.B * c.K);
    c.y = Array<float>(std::vector<float>(static_cast<size_t>(c.B * c.N)));
  }
  c.kb = pick<int64_t>({1 + below(8), 1 + below(std::max<int64_t>(1, c.K)), 128, 65535});
  if (large) c.kb = std::max<int64_t>(c.kb, 16);
  weights(c, pick({0., .02, .1, .5, .9, 1.}));
  pack(c);
  return c;
}

// The same by plain loops over the kept weights alone, in double precision.
static void check(const Case& c) {
  const Window& w = c.window;
  const int64_t rows = c.is_conv ? w.n * w.out_h * w.out_w : c.B;
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t n = 0; n < c.N; n++) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < c.K; k++) {
        if (!c.kept[k * c.N + n]) continue;
        double x = 0;
        if (c.is_conv) {
          const int64_t image = r / (w.out_h * w.out_w), oy = r / w.out_w % w.out_h, ox = r % w.out_w;
          const int64_t channel = k / (w.kh * w.kw), ky = k / w.kw % w.kh, kx = k % w.kw;
          const int64_t iy = oy * w.stride_h - w.pad_top + ky * w.dilation_h;
          const int64_t ix = ox * w.stride_w - w.pad_left + kx * w.dilation_w;
          if (iy >= 0 && iy < w.h && ix >= 0 && ix < w.w)
            x = c.x.data[((image * w.h + iy) * w.w + ix) * w.c + channel];
        } else {
          x = c.x.data[r * c.K + k];
        }
        sum += x * c.dense[k * c.N + n];
        size += std::abs(x * c.dense[k * c.N + n]);
      }
      const double got = c.y.data[r * c.N + n];
      const bool same = std::isfinite(sum) ? std::abs(got - sum) <= 1e-6 * size + 1e-30
                                           : std::isnan(sum) ? std::isnan(got) : got == sum;
      if (!same) {
        char text[400];
        std::snprintf(text, sizeof text,
                      "%s K %lld N %lld B %lld kb %lld nt %lld width %lld bf16 %d isa %lld: y[%lld, %lld] is %g, not %g",
                      c.is_conv ? "conv" : "matmul", (long long)c.K, (long long)c.N, (long long)c.B, (long long)c.kb,
                      (long long)c.nt, (long long)c.width, c.bf16, (long long)c.options.isa, (long long)r, (long long)n,
                      got, sum);
        fail(text);
      }
    }
  }
}

// ---- Corrupted structures ---------------------------------------------------------------------------------

static int64_t wild() {
  return pick<int64_t>({0, 1, -1, 2, 3, 4, 7, 8, 9, 32, 255, 4096, 32767, 32768, 65535, 65536, INT32_MAX, INT32_MIN,
                        int64_t{1} << 31, int64_t{1} << 32, int64_t{1} << 40, INT64_MAX, INT64_MIN, below(300), -below(300)});
}

template <class T>
static void damage(Array<T>& array) {
  if (below(4) == 0) {  // too short, too long
    array.resize(pick<int64_t>({0, array.n / 2, std::max<int64_t>(0, array.n - 1), array.n + 1, below(2 * array.n + 2)}));
  } else if (array.n && std::is_integral_v<T>) {  // any float is a value
    const int64_t at = pick<int64_t>({0, array.n - 1, below(array.n)});
    const auto old = static_cast<int64_t>(array.data[at]), other = static_cast<int64_t>(array.data[below(array.n)]);
    array.data[at] = static_cast<T>(pick<int64_t>({old + 1, old - 1, wild(), wild(), other}));
  }
}

// Whatever JAX may hand over with a tampered structure: x and y have the sizes that their shapes say.
static void corrupt(Case& c) {
  for (int64_t times = 1 + below(3); times > 0; times--) {
    Window& w = c.window;
    int64_t* numbers[] = {&w.kh, &w.kw, &w.stride_h, &w.stride_w, &w.dilation_h, &w.dilation_w, &w.pad_top, &w.pad_left};
    switch (below(c.is_conv ? 13 : 11)) {
      case 0: case 1: damage(c.offs); break;
      case 2: case 3: damage(c.cnt); break;
      case 4: case 5: damage(c.col); break;
      case 6: case 7: damage(c.base); break;
      case 8: c.bf16 ? damage(c.values16) : damage(c.values32); break;
      case 9: *pick({&c.kb, &c.nt, &c.width, &c.options.isa, &c.options.threads}) = wild(); break;
      case 10:  // another matrix altogether
        c.N = below(100);
        if (!c.is_conv) c.K = below(200);
        c.x.resize(c.is_conv ? c.x.n : c.B * c.K);
        c.y.resize(c.is_conv ? w.n * w.out_h * w.out_w * c.N : c.B * c.N);
        break;
      default: *numbers[below(8)] = wild();
    }
  }
}

static int fuzz(int64_t count, uint64_t seed) {
  int64_t right = 0, refused = 0, survived = 0;
  for (int64_t i = 0; i < count; i++) {
    rng.seed(seed + static_cast<uint64_t>(i));
    Case c = random_case(i % 100 == 0);
    if (i % 2 == 0) {
      if (Status status = c.run()) fail("case " + std::to_string(i) + " is right, but: " + status);
      check(c);
      right++;
    } else {
      corrupt(c);
      const Status status = c.run();
      (status ? refused : survived)++;
    }
  }
  std::printf("right %lld, corrupted and refused %lld, corrupted and harmless %lld\n", (long long)right,
              (long long)refused, (long long)survived);
  return 0;
}

// ---- Threads ----------------------------------------------------------------------------------------------

// Products that are worth helpers: of the same kind, the same product.
static Case large_case(bool is_conv = false) {
  rng.seed(is_conv);
  Case c;
  c.is_conv = is_conv, c.N = is_conv ? 96 : 512, c.nt = 64;
  if (is_conv) {
    c.window = {8, 14, 14, 32, 3, 3, 1, 1, 1, 1, 1, 1, 14, 14};
    c.K = 32 * 9, c.kb = 256, c.x = Array<float>(std::vector<float>(8 * 14 * 14 * 32));
    c.y = Array<float>(std::vector<float>(8 * 14 * 14 * 96));
  } else {
    c.K = 512, c.B = 72, c.kb = 128, c.x = Array<float>(std::vector<float>(72 * 512));
    c.y = Array<float>(std::vector<float>(72 * 512));
  }
  for (int64_t i = 0; i < c.x.n; i++) c.x.data[i] = static_cast<float>(uniform());
  weights(c, is_conv ? .1 : .3);
  pack(c);
  return c;
}

static std::vector<float> answer(Case& c) {
  if (Status status = c.run()) fail(status);
  return std::vector<float>(c.y.data.get(), c.y.data.get() + c.y.n);
}

// Six threads at once give the bits that one thread gives alone.
static int concurrent(int64_t calls) {
  std::vector<Case> cases;
  std::vector<std::vector<float>> want;
  for (int t = 0; t < 6; t++) {
    cases.push_back(large_case(t % 2));
    cases[t].options.threads = 1;
    want.push_back(answer(cases[t]));
    if (t < 2) check(cases[t]);
    cases[t].options.threads = t % 3;
  }
  std::vector<std::thread> threads;
  for (int t = 0; t < 6; t++) {
    threads.emplace_back([&, t] {
      for (int64_t i = 0; i < calls; i++)
        if (answer(cases[t]) != want[t]) fail("another answer in thread " + std::to_string(t));
    });
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}

// The processors that a team's work ran on, and the most threads that it had at once.
static std::set<int> processors(int64_t limit, int64_t* threads) {
  std::mutex mutex;
  std::set<int> all;
  *threads = 0;
  for (int round = 0; round < 20; round++) {
    std::set<std::thread::id> ids;
    Team team(limit, 1e9);
    auto item = [&](int64_t) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));  // time for helpers to come
      std::lock_guard<std::mutex> lock(mutex);
      all.insert(sched_getcpu());
      ids.insert(std::this_thread::get_id());
    };
    team.run(8, item);
    *threads = std::max(*threads, static_cast<int64_t>(ids.size()));
  }
  return all;
}

static int affinity() {
  cpu_set_t before, one;
  sched_getaffinity(0, sizeof before, &before);
  const int64_t cpus = CPU_COUNT(&before);
  int64_t threads;
  processors(0, &threads);
  if (threads != cpus) fail(std::to_string(threads) + " threads on " + std::to_string(cpus) + " processors");
  processors(1, &threads);
  if (threads != 1) fail("a limit of 1 gives " + std::to_string(threads) + " threads");
  const int here = sched_getcpu();
  CPU_ZERO(&one);
  CPU_SET(here, &one);
  sched_setaffinity(0, sizeof one, &one);
  const std::set<int> used = processors(0, &threads);
  if (threads != 1 || used != std::set<int>{here}) fail("the work left the affinity mask");
  Case c = large_case();
  answer(c);
  check(c);
  sched_setaffinity(0, sizeof before, &before);
  processors(0, &threads);
  if (threads != cpus) fail("the mask is wide again, but not the team");
  return 0;
}

static int limit() {  // SPARSEJAX_NUM_THREADS=1
  int64_t threads;
  processors(0, &threads);
  return threads != 1 || allowed_threads() != 1;
}

static int idle() {
  Case c = large_case();
  for (int i = 0; i < 20; i++) answer(c);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const std::clock_t start = std::clock();
  std::this_thread::sleep_for(std::chrono::milliseconds(1000));
  const double used = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
  if (used > .02) fail(std::to_string(used) + " s of processor time in a second of idleness");
  return 0;
}

// ---- Forks ------------------------------------------------------------------------------------------------

static void compute_in_child(Case& c, const std::vector<float>& want) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);  // a child that waits for threads it does not have ends here
    for (int i = 0; i < 3; i++)
      if (answer(c) != want) std::_Exit(1);
    int64_t threads;
    processors(0, &threads);  // helpers of its own
    std::_Exit(threads == allowed_threads() ? 0 : 2);
  }
  int status = 1;
  waitpid(child, &status, 0);
  if (status) fail("a child ended with status " + std::to_string(status));
}

static int forks() {
  Case c = large_case();
  compute_in_child(c, answer(c));  // after the parent has used its pool
  const std::vector<float> want = answer(c);
  std::atomic<bool> done{false};
  Case other = large_case(true);
  std::thread busy([&] {
    while (!done) answer(other);
  });
  for (int i = 0; i < 10; i++) compute_in_child(c, want);  // while another thread holds it
  done = true;
  busy.join();
  if (answer(c) != want) fail("another answer after the forks");
  return 0;
}

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "fuzz";
  const int64_t count = argc > 2 ? std::atoll(argv[2]) : 1000;
  if (mode == "fuzz") return fuzz(count, argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 0);
  if (mode == "concurrent") return concurrent(count);
  if (mode == "affinity") return affinity();
  if (mode == "limit") return limit();
  if (mode == "idle") return idle();
  if (mode == "forks") return forks();
  fail("no mode " + mode);
}
