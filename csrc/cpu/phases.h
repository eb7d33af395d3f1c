// Work in phases, shared by the threads that are there.
//
// Waking a sleeping thread can take as long as a layer's whole gradient: one parallel region is entered, not one for
// each step, and who is awake takes the next items. A phase starts when all items of the one before are done; a thread
// that has not come yet holds none, so nobody waits for it.
#pragma once

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace sparseft {

class Phases {
 public:
  // Items of a phase; a thread takes `batch` at a time.
  struct Size {
    int64_t items;
    int64_t batch;
  };

  explicit Phases(const std::vector<Size>& sizes) : phases_(sizes.size()) {
    for (size_t p = 0; p < sizes.size(); ++p) phases_[p].size = sizes[p];
  }

  // Takes part in the phases, from any thread and at any time: calls f(phase, begin, end) for items that nobody has
  // taken, and returns when all items of all phases are done. f must not throw.
  template <typename F>
  void join(const F& f) {
    for (size_t p = 0; p < phases_.size(); ++p) {
      Phase& phase = phases_[p];
      const auto [items, batch] = phase.size;
      for (int64_t begin; (begin = phase.next.fetch_add(batch)) < items;) {
        const int64_t end = std::min(begin + batch, items);
        f(static_cast<int64_t>(p), begin, end);
        phase.done.fetch_add(end - begin, std::memory_order_release);
      }
      while (phase.done.load(std::memory_order_acquire) < items) std::this_thread::yield();
    }
  }

 private:
  struct alignas(64) Phase {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
    Size size{0, 1};
  };
  std::vector<Phase> phases_;
};

}  // namespace sparseft
