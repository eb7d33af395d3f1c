// select_topk: the exact k largest magnitudes of a virtual concatenation, by radix selection.
//
// The bits of |x| order like |x|. A histogram of their upper 15 finds the bin of the k-th largest; histograms of the
// next 16 bits inside that bin refine it until the threshold is known exactly. Then each part of the positions counts
// what it keeps, and writes it where it belongs: ascending, ties to the lower position. The scores are only read; the
// memory is one histogram per part and the result.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <limits>

#include "worklist.h"

namespace sparseft {
namespace {

constexpr int64_t kBins = 1 << 16;

SPARSEFT_INLINE uint16_t magnitude(Half x) {
  return x.x & 0x7fff;
}
SPARSEFT_INLINE uint16_t magnitude(BFloat16 x) {
  return x.x & 0x7fff;
}
SPARSEFT_INLINE uint32_t magnitude(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits & 0x7fffffff;
}
SPARSEFT_INLINE uint64_t magnitude(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits & 0x7fffffffffffffff;
}

// The two scores, as bits that order like them.
template <typename T>
struct Abs {
  using Bits = decltype(magnitude(T()));
  SPARSEFT_INLINE Bits operator[](int64_t i) const { return magnitude(score[i]); }
  Abs operator+(int64_t i) const { return {score + i}; }
  const T* score;
};

template <typename T>
struct Product {
  using Bits = decltype(magnitude(Wide<T>()));
  SPARSEFT_INLINE Bits operator[](int64_t i) const {
    return magnitude(static_cast<Wide<T>>(score[i]) * static_cast<Wide<T>>(other[i]));
  }
  Product operator+(int64_t i) const { return {score + i, other + i}; }
  const T* score;
  const T* other;
};

// Calls f(i, bits) for all keys in [low, high], in order. Whole groups without any are passed over.
template <typename Key, typename F>
SPARSEFT_INLINE void for_each_between(const Key& key, int64_t size, typename Key::Bits low, typename Key::Bits high,
                                      const F& f) {
  using Bits = typename Key::Bits;
  constexpr int64_t group = 64;
  const Bits span = high - low;
  for (int64_t first = 0; first < size; first += group) {
    const int64_t last = std::min(first + group, size);
    bool any = false;
    for (int64_t i = first; i < last; ++i) any |= static_cast<Bits>(key[i] - low) <= span;
    if (!any) continue;
    for (int64_t i = first; i < last; ++i)
      if (static_cast<Bits>(key[i] - low) <= span) f(i, key[i]);
  }
}

template <typename Key>
SPARSEFT_CLONES void add_histogram(const Key& key, int64_t size, int shift, uint32_t* counts) {
  for (int64_t i = 0; i < size; ++i) ++counts[key[i] >> shift];
}

template <typename Key, typename Bits = typename Key::Bits>
SPARSEFT_CLONES void add_histogram_between(const Key& key, int64_t size, int shift, Bits low, Bits high,
                                           uint32_t* counts) {
  for_each_between(key, size, low, high, [&](int64_t, Bits bits) { ++counts[bits >> shift & (kBins - 1)]; });
}

struct Kept {
  int64_t above = 0;  // keys above the threshold
  int64_t equal = 0;  // keys equal to it
};

template <typename Key, typename Bits = typename Key::Bits>
SPARSEFT_CLONES Kept count_kept(const Key& key, int64_t size, Bits threshold) {
  Kept kept;
  for (int64_t i = 0; i < size; ++i) {
    kept.above += key[i] > threshold;
    kept.equal += key[i] == threshold;
  }
  return kept;
}

// Writes base + i for every key above the threshold and for the first `ties` equal to it; returns the end.
template <typename Key, typename Bits = typename Key::Bits>
SPARSEFT_CLONES int64_t* collect(const Key& key, int64_t size, Bits threshold, int64_t base, int64_t& ties,
                                 int64_t* out) {
  for_each_between(key, size, threshold, std::numeric_limits<Bits>::max(), [&](int64_t i, Bits bits) {
    if (bits > threshold || ties-- > 0) *out++ = base + i;
  });
  return out;
}

// The concatenation, cut into parts for the threads.
template <typename Key>
class Scores {
 public:
  using Bits = typename Key::Bits;

  void append(const Key& key, int64_t size) {
    segments_.push_back({key, size_, size_ + size});
    size_ += size;
  }

  // Ascending positions of the k largest; 0 < k <= size.
  void select(int64_t k, int64_t* out) const {
    const int64_t parts = std::max(std::min<int64_t>(torch::stable::get_num_threads(), size_ >> 16), (size_ >> 31) + 1);
    const auto [threshold, ties] = find_threshold(k, parts);
    std::vector<Kept> kept(parts);
    for_each_piece(parts, [&, t = threshold](int64_t part, const Key& key, int64_t size, int64_t) {
      const Kept more = count_kept(key, size, t);
      kept[part].above += more.above;
      kept[part].equal += more.equal;
    });
    std::vector<int64_t*> next(parts);
    std::vector<int64_t> ties_of(parts);
    int64_t left = ties;
    for (int64_t part = 0; part < parts; ++part) {
      ties_of[part] = std::min(left, kept[part].equal);
      left -= ties_of[part];
      next[part] = out;
      out += kept[part].above + ties_of[part];
    }
    for_each_piece(parts, [&, t = threshold](int64_t part, const Key& key, int64_t size, int64_t base) {
      next[part] = collect(key, size, t, base, ties_of[part], next[part]);
    });
  }

 private:
  struct Segment {
    Key key;
    int64_t begin;
    int64_t end;
  };

  struct Threshold {
    Bits bits;     // the k-th largest key
    int64_t ties;  // how many keys equal to it belong to the result
  };

  Threshold find_threshold(int64_t k, int64_t parts) const {
    constexpr int top = 8 * sizeof(Bits) - 16;
    uint64_t prefix = 0;
    for (int shift = top; shift >= 0; shift -= 16) {
      // 32 bits hold a part's counts: a part has at most 2^31 positions.
      std::vector<std::vector<uint32_t>> counts(parts, std::vector<uint32_t>(kBins));
      for_each_piece(parts, [&](int64_t part, const Key& key, int64_t size, int64_t) {
        if (shift == top) {
          add_histogram(key, size, shift, counts[part].data());
        } else {
          const uint64_t low = prefix << shift << 16, high = low + ((uint64_t{1} << shift << 16) - 1);
          add_histogram_between(key, size, shift, static_cast<Bits>(low), static_cast<Bits>(high), counts[part].data());
        }
      });
      int64_t bin = kBins;
      for (int64_t here = 0;; k -= here) {
        here = 0;
        --bin;
        for (const auto& count : counts) here += count[bin];
        if (here >= k) break;
      }
      prefix = prefix << 16 | static_cast<uint64_t>(bin);
    }
    return {static_cast<Bits>(prefix), k};
  }

  // f(part, key, size, base) in parallel over the parts, for each segment of a part in order: `size` keys from
  // position `base` on.
  template <typename F>
  void for_each_piece(int64_t parts, const F& f) const {
    torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        const auto boundary = [&](int64_t i) { return size_ / parts * i + std::min(size_ % parts, i); };
        for (const Segment& s : segments_) {
          const int64_t begin = std::max(boundary(part), s.begin), end = std::min(boundary(part + 1), s.end);
          if (begin < end) f(part, s.key + (begin - s.begin), end - begin, begin);
        }
      }
    });
  }

  std::vector<Segment> segments_;
  int64_t size_ = 0;
};

Tensor select_topk(std::vector<Tensor> scores, std::vector<Tensor> others, int64_t k, std::string score) {
  const bool product = check_select_topk(scores, others, k, score);
  Tensor out = torch::stable::new_empty(scores[0], {k}, ScalarType::Long);
  if (k == 0) return out;
  visit_float(scores[0].scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    Scores<Abs<T>> plain;
    Scores<Product<T>> products;
    for (size_t i = 0; i < scores.size(); ++i) {
      const T* data = scores[i].const_data_ptr<T>();
      if (product)
        products.append({data, others[i].const_data_ptr<T>()}, scores[i].numel());
      else
        plain.append({data}, scores[i].numel());
    }
    int64_t* positions = out.mutable_data_ptr<int64_t>();
    product ? products.select(k, positions) : plain.select(k, positions);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparseft_cpu, CPU, m) {
  m.impl("select_topk", TORCH_BOX(&select_topk));
}

}  // namespace sparseft
