#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>

namespace sparse_ops {
namespace {

using Clock = std::chrono::steady_clock;

// How long a helper looks out for the next job before it sleeps, and calls count as following closely.
constexpr std::chrono::microseconds kSpin{200};
// Waking a helper costs the caller some 15 us: a job of fewer cycles has none but those that are awake.
constexpr double kWorthWaking = 3e5;
// A thread with less than this to do costs more than it gives.
constexpr double kWorthSharing = 3e4;
constexpr int kMostCpus = 1024;

void relax(int round) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
  if (round > 200) sched_yield();  // whoever else wants this processor has it
}

// ---- Which processors -------------------------------------------------------------------------------------

#ifdef __linux__
// The processors that the calling thread may use, and the one that it is on.
struct Cpus {
  cpu_set_t set;
  int here;
  Cpus() : here(sched_getcpu()) {
    if (sched_getaffinity(0, sizeof set, &set)) CPU_ZERO(&set);  // more than 1024: no helpers
  }
  int count() const { return std::max(1, CPU_COUNT(&set)); }
  bool has(int cpu) const { return cpu != here && CPU_ISSET(cpu, &set); }
};
#else
struct Cpus {  // no masks: the helpers are just numbered
  int number = static_cast<int>(std::thread::hardware_concurrency());
  int count() const { return std::max(1, number); }
  bool has(int cpu) const { return cpu + 1 < count(); }
};
#endif

int64_t read_number(const char* path, int64_t* second = nullptr) {
  int64_t first = -1;
  if (FILE* file = std::fopen(path, "re")) {
    long long a = -1, b = -1;
    const int got = std::fscanf(file, "%lld %lld", &a, &b);
    std::fclose(file);
    if (got >= 1) first = a;
    if (second && got == 2) *second = b;
  }
  return first;
}

// What a container may use: "docker run --cpus", Kubernetes' limits.
int64_t quota() {
  int64_t period = -1, share = read_number("/sys/fs/cgroup/cpu.max", &period);
  if (share < 0) {
    share = read_number("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
    period = read_number("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  }
  return share > 0 && period > 0 ? (share + period - 1) / period : INT_MAX;
}

int64_t limit_of_environment() {
  const char* text = std::getenv("SPARSEJAX_NUM_THREADS");
  const long long number = text ? std::atoll(text) : 0;
  return number > 0 ? number : INT_MAX;
}

}  // namespace

// ---- The pool ---------------------------------------------------------------------------------------------

struct Helper {
  explicit Helper(class Pool* pool) : pool(pool) {}
  class Pool* const pool;
  std::atomic<unsigned> called{0};  // the last job that it was called to
  std::atomic<bool> asleep{false};
  std::mutex mutex;
  std::condition_variable wake;
};

class Pool {
 public:
  // Each helper lives on one processor, so that it never sits behind the caller on the caller's own.
  bool take(int64_t limit, double cycles, int* size) {
    if (taken_.exchange(true, std::memory_order_acquire)) return false;
    const auto now = Clock::now();
    const bool patient = cycles > kWorthWaking || now - last_ < kSpin;
    last_ = now;
    const Cpus cpus;
    limit = std::min({limit, limit_, int64_t{cpus.count()}});
    calling_ = 0;
    for (int cpu = 0; cpu < kMostCpus && calling_ + 1 < limit; cpu++) {
      if (!cpus.has(cpu)) continue;
      Helper* helper = start(cpu, patient);
      if (helper && (patient || !helper->asleep)) team_[calling_++] = helper;
    }
    *size = calling_ + 1;
    if (calling_ == 0) give_back();
    return calling_ > 0;
  }

  void give_back() { taken_.store(false, std::memory_order_release); }

  void share(int64_t items, void (*call)(void*, int64_t), void* item) {
    items_ = items, call_ = call, item_ = item;
    next_ = 0;
    roused_ = 0;
    const unsigned job = ++job_;
    open_ = true;
    for (int i = 0; i < calling_; i++) team_[i]->called = job;  // those that are awake start now
    rouse();
    work();
    open_ = false;
    for (int i = 0; active_; i++) relax(i);
  }

  int64_t limit() const { return limit_; }

 private:
  void work() {
    for (int64_t i; (i = next_++) < items_;) call_(item_, i);
  }

  // Wakes two sleepers of the team, who wake others in turn.
  void rouse() {
    for (int two = 0; two < 2;) {
      const int i = roused_++;
      if (i >= calling_) return;
      Helper& helper = *team_[i];
      if (!helper.asleep) continue;
      { std::lock_guard<std::mutex> lock(helper.mutex); }  // it waits, or has not yet looked at `called`
      helper.wake.notify_one();
      two++;
    }
  }

  static void await(Helper& self, unsigned seen) {
    const auto start = Clock::now();
    for (int i = 1; self.called == seen; i++) {
      relax(i);
      if (i % 64 || Clock::now() - start < kSpin) continue;
      std::unique_lock<std::mutex> lock(self.mutex);
      self.asleep = true;
      self.wake.wait(lock, [&] { return self.called != seen; });
      self.asleep = false;
    }
  }

  void help(Helper& self) {
    for (unsigned seen = 0;;) {
      await(self, seen);
      seen = self.called;
      active_++;  // and only then a look at `open_`: the owner closes the job before it waits for `active_`
      if (open_ && seen == job_) {
        rouse();
        work();
      }
      active_--;
    }
  }

  static void* live(void* helper) {
    auto& self = *static_cast<Helper*>(helper);
    self.pool->help(self);
    return nullptr;
  }

  // The helper of a processor; none if it has to be created and may or can not be.
  Helper* start(int cpu, bool may_create) {
    if (helpers_[cpu] || !may_create) return helpers_[cpu];
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes)) return nullptr;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
#ifdef __linux__
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    pthread_attr_setaffinity_np(&attributes, sizeof one, &one);
#endif
    sigset_t all, before;  // signals are for the program's own threads
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t id;
    auto* helper = new (std::nothrow) Helper(this);
    if (helper && pthread_create(&id, &attributes, live, helper)) {
      delete helper;
      helper = nullptr;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
    return helpers_[cpu] = helper;
  }

  std::atomic<bool> taken_{false};

  // Of the job: written by who has taken the pool while nobody is active.
  int64_t items_ = 0;
  void (*call_)(void*, int64_t) = nullptr;
  void* item_ = nullptr;
  Helper* team_[kMostCpus];
  int calling_ = 0;
  std::atomic<unsigned> job_{0};
  std::atomic<bool> open_{false};

  [[maybe_unused]] char apart_[64];  // what all threads write shares no cache line with what they only read
  std::atomic<int64_t> next_{0};
  [[maybe_unused]] char apart_too_[64];
  std::atomic<int> active_{0};
  std::atomic<int> roused_{0};

  Helper* helpers_[kMostCpus] = {};
  Clock::time_point last_{};
  const int64_t limit_ = std::min(limit_of_environment(), quota());
};

namespace {

// Never destroyed: its threads outlive main. A forked child has none of them, perhaps in the middle of a job: it forgets
// the pool and makes its own.
std::atomic<Pool*> the_pool{nullptr};
[[maybe_unused]] const int forgotten_by_children = pthread_atfork(nullptr, nullptr, [] { the_pool = nullptr; });

Pool* pool() {
  Pool* mine = the_pool;
  if (mine) return mine;
  Pool* made = new (std::nothrow) Pool;
  if (the_pool.compare_exchange_strong(mine, made)) return made;
  delete made;  // another thread was quicker
  return mine;
}

struct Memory {
  float* data = nullptr;
  size_t count = 0;
  void release() {
    std::free(data);
    data = nullptr, count = 0;
  }
  ~Memory() { release(); }
};
thread_local Memory kept[Scratch::kSlots];
constexpr size_t kMostKept = (size_t{64} << 20) / sizeof(float);

}  // namespace

Team::Team(int64_t limit, double cycles) {
  if (limit <= 0) limit = INT_MAX;
  if (!(cycles / kWorthSharing < INT_MAX)) cycles = kWorthSharing * INT_MAX;
  limit = std::min(limit, static_cast<int64_t>(cycles / kWorthSharing) + 1);
  if (limit <= 1) return;
  Pool* all = pool();
  if (all && all->take(limit, cycles, &size_)) pool_ = all;
}

Team::~Team() {
  if (pool_) pool_->give_back();
}

void Team::share(int64_t items, void (*call)(void*, int64_t), void* item) { pool_->share(items, call, item); }

int allowed_threads() {
  Pool* all = pool();
  return all ? static_cast<int>(std::min(all->limit(), int64_t{Cpus().count()})) : 1;
}

Scratch::Scratch(int slot, size_t count) : slot_(slot), data_(kept[slot].data) {
  Memory& memory = kept[slot];
  if (memory.count >= count && data_) return;
  memory.release();
  data_ = nullptr;
  constexpr size_t step = 1024;
  if (count > SIZE_MAX / sizeof(float) - step) return;
  const size_t rounded = std::max(step, (count + step - 1) / step * step);
  void* fresh = nullptr;
  if (posix_memalign(&fresh, 64, rounded * sizeof(float))) return;
  memory.data = data_ = static_cast<float*>(fresh);
  memory.count = rounded;
}

Scratch::~Scratch() {
  if (kept[slot_].count > kMostKept) kept[slot_].release();
}

}  // namespace sparse_ops
