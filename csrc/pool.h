// Threads and scratch memory of the kernels.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparse_ops {

// The threads of one call: the caller and, while the team lives, helpers of the process's pool. Whoever finds
// the pool taken by another call works alone, as does whoever has too little to do (`cycles`, an estimate of the
// whole call's work on one thread). Threads stay within the caller's affinity mask, `limit` (0: none),
// SPARSEJAX_NUM_THREADS and the container's quota of processors.
//
//   Team team(options.threads, cycles);
//   auto item = [&](int64_t i) { ... };  // must not throw
//   team.run(items, item);               // item(0) ... item(items - 1), in no order; several runs may follow
//
// Items are handed out one by one and a helper may join late or never: one that wakes up late costs nothing.
class Team {
 public:
  Team(int64_t limit, double cycles);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // How many threads may take part, the caller included.
  int size() const { return size_; }

  template <class F>
  void run(int64_t items, F& item) {
    if (size_ <= 1 || items <= 1) {
      for (int64_t i = 0; i < items; i++) item(i);
    } else {
      share(items, [](void* f, int64_t i) { (*static_cast<F*>(f))(i); }, &item);
    }
  }

 private:
  void share(int64_t items, void (*call)(void*, int64_t), void* item);

  class Pool* pool_ = nullptr;  // held by this team, or none
  int size_ = 1;
};

// `count` floats, aligned to 64 bytes and of any content, that belong to the calling thread until the end of the
// scope. A thread keeps what it had for the next time, up to 64 MiB a slot. Two of one thread at a time need two slots.
class Scratch {
 public:
  static constexpr int kSlots = 4;
  Scratch(int slot, size_t count);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // nullptr: there is not that much memory.
  float* data() const { return data_; }

 private:
  int slot_;
  float* data_;
};

// How many threads a large product called from this thread may have.
int allowed_threads();

}  // namespace sparse_ops
