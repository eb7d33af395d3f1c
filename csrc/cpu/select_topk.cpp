// select_topk: the exact k largest magnitudes of a virtual concatenation, by radix selection.
//
// The bits of |x| order like |x|. A sample gives a bound that a little more than k keys reach: only these are looked at
// closely. Their histogram finds the bin of the k-th largest, and if that bin holds many, its own histogram the key
// itself. A last pass writes the positions above the bin, and puts aside the few inside it, of which the largest are
// then merged in: ascending, ties to the lower position.
//
// The first pass keeps the keys that reach the bound, in the memory of the result and a little beside it: then the
// scores are read once. Where they are too many (of equal keys, or of a wrong bound) or too wide, every pass reads the
// scores. Besides the result, the memory is a histogram per part, what was kept beside the result (at 1 % of the scores
// an eighth of it) and what was put aside.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#endif

#include "worklist.h"

namespace sparseft {
namespace {

constexpr int64_t kBins = 1 << 15;

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
  static constexpr bool kOne = true;  // one score, not the product of two
  using Bits = decltype(magnitude(T()));
  SPARSEFT_INLINE Bits operator[](int64_t i) const { return magnitude(score[i]); }
  Abs operator+(int64_t i) const { return {score + i}; }
  void prefetch() const { __builtin_prefetch(score); }
  const T* score;
};

template <typename T>
struct Product {
  static constexpr bool kOne = false;
  using Bits = decltype(magnitude(Wide<T>()));
  SPARSEFT_INLINE Bits operator[](int64_t i) const {
    return magnitude(static_cast<Wide<T>>(score[i]) * static_cast<Wide<T>>(other[i]));
  }
  Product operator+(int64_t i) const { return {score + i, other + i}; }
  void prefetch() const {
    __builtin_prefetch(score);
    __builtin_prefetch(other);
  }
  const T* score;
  const T* other;
};

// Calls f(i, bits) for all keys of at least `low`, in order. Most are smaller: groups without any are passed over.
template <typename Key, typename F>
SPARSEFT_CLONES void each_at_least_of_any(const Key& key, int64_t size, typename Key::Bits low, const F& f) {
  constexpr int64_t group = 64;
  for (int64_t first = 0; first < size; first += group) {
    const int64_t last = std::min(first + group, size);
    typename Key::Bits most = 0;  // a maximum becomes vectors where a disjunction of comparisons does not
    for (int64_t i = first; i < last; ++i) most = std::max(most, key[i]);
    if (most < low) continue;
    for (int64_t i = first; i < last; ++i)
      if (key[i] >= low) f(i, key[i]);
  }
}

#ifdef SPARSEFT_X86
// The processor looks ahead to the end of a page of memory only, and a wrong guess of what will be found undoes that.
SPARSEFT_INLINE void ask_for_next_page(const void* from) {
  __builtin_prefetch(static_cast<const char*>(from) + 4096);
}

// Bit j of `which`: the magnitude of element j of the 64 at `from` is at least `low`.
struct Avx512 {
  static SPARSEFT_AVX512 inline uint64_t which(const float* from, uint32_t low) {
    const __m512i magnitudes = _mm512_set1_epi32(0x7fffffff), bound = _mm512_set1_epi32(static_cast<int>(low));
    const auto some = [&](int part) SPARSEFT_AVX512 {
      return _mm512_cmpge_epu32_mask(_mm512_and_si512(load(from + 16 * part), magnitudes), bound);
    };
    return _mm512_kunpackd(_mm512_kunpackw(some(3), some(2)), _mm512_kunpackw(some(1), some(0)));
  }
  template <typename T, typename = std::enable_if_t<sizeof(T) == 2>>
  static SPARSEFT_AVX512 inline uint64_t which(const T* from, uint16_t low) {
    const __m512i magnitudes = _mm512_set1_epi16(0x7fff), bound = _mm512_set1_epi16(static_cast<short>(low));
    const auto some = [&](int part) SPARSEFT_AVX512 {
      return _mm512_cmpge_epu16_mask(_mm512_and_si512(load(from + 32 * part), magnitudes), bound);
    };
    return _mm512_kunpackd(some(1), some(0));
  }

 private:
  static SPARSEFT_AVX512 inline __m512i load(const void* from) {
    ask_for_next_page(from);
    return _mm512_loadu_si512(from);
  }
};

struct Avx2 {  // compares signed numbers only: magnitudes are not negative, and low - 1 is not below -1
  static SPARSEFT_AVX2 inline uint64_t which(const float* from, uint32_t low) {
    const __m256i magnitudes = _mm256_set1_epi32(0x7fffffff), below = _mm256_set1_epi32(static_cast<int>(low) - 1);
    uint64_t found = 0;
#pragma GCC unroll 8
    for (int part = 0; part < 8; ++part) {
      const __m256i bits = _mm256_and_si256(load(from + 8 * part), magnitudes);
      const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(bits, below)));
      found |= static_cast<uint64_t>(mask) << 8 * part;
    }
    return found;
  }
  template <typename T, typename = std::enable_if_t<sizeof(T) == 2>>
  static SPARSEFT_AVX2 inline uint64_t which(const T* from, uint16_t low) {
    const __m256i magnitudes = _mm256_set1_epi16(0x7fff), below = _mm256_set1_epi16(static_cast<short>(low - 1));
    uint64_t found = 0;
#pragma GCC unroll 2
    for (int part = 0; part < 2; ++part) {
      const __m256i first = _mm256_and_si256(load(from + 32 * part), magnitudes);
      const __m256i second = _mm256_and_si256(load(from + 32 * part + 16), magnitudes);
      // as bytes of 0 or -1; packing takes turns between the operands, 8 bytes each: put back in order
      const __m256i bytes = _mm256_permute4x64_epi64(
          _mm256_packs_epi16(_mm256_cmpgt_epi16(first, below), _mm256_cmpgt_epi16(second, below)), 0xd8);
      found |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(bytes))) << 32 * part;
    }
    return found;
  }

 private:
  static SPARSEFT_AVX2 inline __m256i load(const void* from) {
    ask_for_next_page(from);
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  }
};

template <typename Isa, typename T, typename F>
SPARSEFT_INLINE void each_at_least_by(const Abs<T>& key, int64_t size, typename Abs<T>::Bits low, const F& f) {
  const int64_t whole = size / 64 * 64;
  for (int64_t first = 0; first < whole; first += 64)
    for (uint64_t found = Isa::which(key.score + first, low); found; found &= found - 1) {
      const int64_t i = first + __builtin_ctzll(found);
      f(i, key[i]);
    }
  for (int64_t i = whole; i < size; ++i)
    if (key[i] >= low) f(i, key[i]);
}
template <typename T, typename F>
SPARSEFT_AVX512 void each_at_least_avx512(const Abs<T>& key, int64_t size, typename Abs<T>::Bits low, const F& f) {
  each_at_least_by<Avx512>(key, size, low, f);
}
template <typename T, typename F>
SPARSEFT_AVX2 void each_at_least_avx2(const Abs<T>& key, int64_t size, typename Abs<T>::Bits low, const F& f) {
  each_at_least_by<Avx2>(key, size, low, f);
}
#endif

template <typename Key, typename F>
void each_at_least(const Key& key, int64_t size, typename Key::Bits low, const F& f) {
#ifdef SPARSEFT_X86
  if constexpr (Key::kOne && sizeof(typename Key::Bits) < 8) {
    if (has_avx512()) return each_at_least_avx512(key, size, low, f);
    if (has_avx2()) return each_at_least_avx2(key, size, low, f);
  }
#endif
  each_at_least_of_any(key, size, low, f);
}

// Keys of at most 32 bits with their distances from a part's first position, ascending: in some of the result's memory,
// and what does not fit there beside it.
class Kept {
 public:
  void open(int64_t* begin, int64_t* end) {
    begin_ = begin;
    room_ = end - begin;
    most_ = room_ / 4 + 4096;
    open_ = true;
  }
  SPARSEFT_INLINE void add(uint32_t bits, int64_t distance) {
    if (!open_) return;
    const uint64_t one = static_cast<uint64_t>(bits) << 32 | static_cast<uint64_t>(distance);
    if (size_ < room_)
      std::memcpy(begin_ + size_++, &one, sizeof(one));
    else
      add_beside(one);
  }
  void close() {
    complete_ |= open_;
    open_ = false;
  }
  void forget() { *this = {}; }
  bool complete() const { return complete_; }
  const int64_t* begin() const { return begin_; }

  template <typename F>
  void each(const F& f) const {
    for (int64_t i = 0; i < size_; ++i) f(bits_of(begin_[i]));
    for (const int64_t one : beside_) f(bits_of(one));
  }

  // Leaves the positions of the keys with wins(bits, position).
  template <typename F>
  void filter(int64_t first_position, const F& wins) {
    const auto filtered = [&](int64_t* from, int64_t count) {
      int64_t* to = from;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t position = first_position + distance_of(from[i]);
        if (wins(bits_of(from[i]), position)) *to++ = position;
      }
      return to - from;
    };
    size_ = filtered(begin_, size_);
    beside_.resize(filtered(beside_.data(), static_cast<int64_t>(beside_.size())));
  }
  // The positions, all together.
  void move_to(int64_t* to) const {
    std::memmove(to, begin_, size_ * sizeof(int64_t));
    std::copy(beside_.begin(), beside_.end(), to + size_);
  }

 private:
  static uint32_t bits_of(int64_t one) { return static_cast<uint32_t>(static_cast<uint64_t>(one) >> 32); }
  static uint32_t distance_of(int64_t one) { return static_cast<uint32_t>(one); }
  void add_beside(uint64_t one) {
    if (static_cast<int64_t>(beside_.size()) == most_) {  // too many
      open_ = false;
      beside_ = {};
      return;
    }
    beside_.reserve(most_);  // once: growing would copy
    beside_.push_back(static_cast<int64_t>(one));
  }

  int64_t *begin_ = nullptr, room_ = 0, size_ = 0, most_ = 0;
  bool open_ = false, complete_ = false;
  std::vector<int64_t> beside_;
};

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
    std::vector<Part> found(parts);
    const Bin bin = find_bin(k, out, found);
    int64_t* start = out;
    for (Part& part : found) {
      part.first = start;
      start += part.above + part.ties;
    }
    // Whether a key belongs to the result. Those inside the bin are put aside.
    const auto wins = [&](Part& part, Bits bits, int64_t position) {
      if (bits > bin.high || (bits >= bin.low && part.ties-- > 0)) return true;
      if (bits >= bin.low && bin.low < bin.high) part.inside.push_back({bits, position});
      return false;
    };
    if (all_kept(found)) {
      torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          found[i].kept.filter(boundary(i, parts), [&](uint32_t bits, int64_t position) {
            return wins(found[i], static_cast<Bits>(bits), position);
          });
      });
      // Nothing is written where something waits to be moved: to the right from the last on, then to the left.
      for (int64_t i = parts - 1; i >= 0; --i)
        if (found[i].first >= found[i].kept.begin()) found[i].kept.move_to(found[i].first);
      for (int64_t i = 0; i < parts; ++i)
        if (found[i].first < found[i].kept.begin()) found[i].kept.move_to(found[i].first);
    } else {
      std::vector<int64_t*> next;
      for (const Part& part : found) next.push_back(part.first);
      for_each_piece(parts, [&](int64_t i, const Key& key, int64_t size, int64_t base) {
        int64_t* to = next[i];
        each_at_least(key, size, bin.low, [&](int64_t j, Bits bits) {
          if (wins(found[i], bits, base + j)) *to++ = base + j;
        });
        next[i] = to;
      });
    }
    if (bin.low < bin.high) merge_largest(found, bin.wanted, out + k);
  }

 private:
  struct Segment {
    Key key;
    int64_t begin;
    int64_t end;
  };

  struct Candidate {
    Bits bits;
    int64_t position;
  };

  static constexpr bool kKeeps = sizeof(Bits) <= 4;

  // What a part holds above and inside the bin; its positions are before those of the next.
  struct Part {
    int64_t above = 0;
    int64_t ties = 0;          // where the bin is a single key: how many of its own belong to the result
    int64_t* first = nullptr;  // of the result
    Kept kept;
    std::vector<Candidate> inside;
  };

  static bool all_kept(const std::vector<Part>& found) {
    return std::all_of(found.begin(), found.end(), [](const Part& part) { return part.kept.complete(); });
  }

  // The keys in [low, high]; `wanted` of them belong to the result, with all that are larger.
  struct Bin {
    Bits low;
    Bits high;
    int64_t wanted;
  };

  // A key that probably a few more than k keys reach, from a sample; 0 if there are few keys. The parts get memory to
  // keep as many keys as the sample lets expect.
  Bits bound(int64_t k, int64_t* out, std::vector<Part>& found) const {
    constexpr int64_t count = 1 << 16, together = 64;
    if (size_ < 8 * count) return 0;
    const double share = static_cast<double>(k) / size_ * count;
    const int64_t rank = static_cast<int64_t>(share + 3 * std::sqrt(share)) + 2;
    if (rank >= count) return 0;
    const int64_t parts = static_cast<int64_t>(found.size()), stride = size_ / count;
    std::vector<Bits> sample(count);
    torch::stable::parallel_for(0, count, count / parts + 1, [&](int64_t begin, int64_t end) {
      auto segment = segments_.begin();
      for (; begin < end; begin += together) {
        Key places[together];  // all asked for before the first is read: they are far apart
        const int64_t here = std::min(together, end - begin);
        for (int64_t i = 0; i < here; ++i) {
          const uint64_t random = static_cast<uint64_t>(begin + i + 1) * 0x9e3779b97f4a7c15;
          const int64_t position = (begin + i) * stride + static_cast<int64_t>((random >> 32) % stride);
          while (position >= segment->end) ++segment;
          places[i] = segment->key + (position - segment->begin);
          places[i].prefetch();
        }
        for (int64_t i = 0; i < here; ++i) sample[begin + i] = places[i][0];
      }
    });
    std::vector<Bits> sorted = sample;
    std::nth_element(sorted.begin(), sorted.begin() + rank, sorted.end(), std::greater<Bits>());
    const Bits low = sorted[rank];
    if (!kKeeps) return low;
    const auto reach = [&](int64_t begin, int64_t end) {
      return std::count_if(sample.begin() + begin, sample.begin() + end, [&](Bits bits) { return bits >= low; });
    };
    const int64_t all = reach(0, count);
    for (int64_t i = 0, before = 0; i < parts; ++i) {
      const int64_t until = before + reach(count * i / parts, count * (i + 1) / parts);
      found[i].kept.open(out + k * before / all, out + k * until / all);
      before = until;
    }
    return low;
  }

  // The bin of the k-th largest key: few keys, or a single one. Counts what each part has above it.
  Bin find_bin(int64_t k, int64_t* out, std::vector<Part>& found) const {
    const int64_t parts = static_cast<int64_t>(found.size());
    const Bits most = std::numeric_limits<Bits>::max() >> 1;
    Bin bin{bound(k, out, found), most, k};
    while (true) {
      int shift = 0;
      while ((bin.high - bin.low) >> shift >= kBins) ++shift;
      // 32 bits hold a part's counts: a part has at most 2^31 positions.
      std::vector<std::vector<uint32_t>> counts(parts, std::vector<uint32_t>(kBins));
      const auto counter = [&](int64_t part) {
        return [count = counts[part].data(), bin, shift](Bits bits) {
          if (bits <= bin.high) ++count[(bits - bin.low) >> shift];
        };
      };
      if (all_kept(found)) {
        torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i)
            found[i].kept.each([&, count = counter(i)](uint32_t bits) {
              if (bits >= bin.low) count(static_cast<Bits>(bits));
            });
        });
      } else {
        for_each_piece(parts, [&](int64_t i, const Key& key, int64_t size, int64_t base) {
          Kept& kept = found[i].kept;
          const int64_t before = base - boundary(i, parts);
          each_at_least(key, size, bin.low, [&, count = counter(i)](int64_t j, Bits bits) {
            count(bits);
            if constexpr (kKeeps) kept.add(bits, before + j);
          });
        });
        for (Part& part : found) part.kept.close();
      }
      int64_t here = 0, number = kBins;
      for (int64_t left = bin.wanted; left > 0;) {
        if (--number < 0) break;
        here = 0;
        for (const auto& count : counts) here += count[number];
        if (here < left)
          for (int64_t i = 0; i < parts; ++i) found[i].above += counts[i][number];
        else
          bin.wanted = left;
        left -= here;
      }
      if (number < 0) {  // the sample's bound was too high
        for (Part& part : found) {
          part.above = 0;
          part.kept.forget();
        }
        bin = {0, most, k};
        continue;
      }
      const uint64_t low = bin.low + (static_cast<uint64_t>(number) << shift);
      bin.high = static_cast<Bits>(std::min<uint64_t>(bin.high, low + (uint64_t{1} << shift) - 1));
      bin.low = static_cast<Bits>(low);
      if (bin.low == bin.high) {
        int64_t left = bin.wanted;
        for (int64_t i = 0; i < parts; ++i) {
          found[i].ties = std::min<int64_t>(left, counts[i][number]);
          left -= found[i].ties;
        }
      }
      const int64_t few = all_kept(found) ? 1 << 11 : 1 << 15;  // another pass takes little time, or much
      if (here <= few || bin.low == bin.high) return bin;
    }
  }

  // Merges the `wanted` largest of those inside the parts (the lower positions of equal ones) into the result, which
  // ends at `end`.
  static void merge_largest(std::vector<Part>& found, int64_t wanted, int64_t* end) {
    std::vector<Bits> keys;
    for (const Part& part : found)
      for (const Candidate& one : part.inside) keys.push_back(one.bits);
    std::nth_element(keys.begin(), keys.begin() + (wanted - 1), keys.end(), std::greater<Bits>());
    const Bits threshold = keys[wanted - 1];
    int64_t ties = wanted - std::count_if(keys.begin(), keys.end(), [&](Bits key) { return key > threshold; });
    for (Part& part : found) {
      const auto loses = [&](const Candidate& one) {
        return one.bits < threshold || (one.bits == threshold && ties-- <= 0);
      };
      std::vector<Candidate> kept;
      for (const Candidate& one : part.inside)
        if (!loses(one)) kept.push_back(one);
      part.inside.swap(kept);
    }
    // From the end on: nothing is written before what is still to be read.
    for (auto part = found.rbegin(); part != found.rend(); ++part) {
      const int64_t* from = part->first + part->above;
      const auto move = [&](const int64_t* begin) {
        end -= from - begin;
        std::memmove(end, begin, (from - begin) * sizeof(int64_t));
        from = begin;
      };
      for (auto one = part->inside.rbegin(); one != part->inside.rend(); ++one) {
        move(std::upper_bound(static_cast<const int64_t*>(part->first), from, one->position));
        *--end = one->position;
      }
      move(part->first);
    }
  }

  // Where part i of `parts` starts.
  int64_t boundary(int64_t i, int64_t parts) const { return size_ / parts * i + std::min(size_ % parts, i); }

  // f(part, key, size, base) in parallel over the parts, for each segment of a part in order: `size` keys from
  // position `base` on.
  template <typename F>
  void for_each_piece(int64_t parts, const F& f) const {
    torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        for (const Segment& s : segments_) {
          const int64_t begin = std::max(boundary(part, parts), s.begin);
          const int64_t end = std::min(boundary(part + 1, parts), s.end);
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
