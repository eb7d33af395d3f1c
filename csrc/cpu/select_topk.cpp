// select_topk: the exact k largest magnitudes of a virtual concatenation, by radix selection.
//
// The bits of |x| order like |x|. A sample gives a bound that a little more than k keys reach: only these are looked at
// closely. Their histogram finds the bin of the k-th largest, and if that bin holds many, its own histogram the key
// itself. A second pass writes the positions above the bin, and puts aside the few inside it, of which the largest are
// then merged in: ascending, ties to the lower position. The scores are read twice; besides the result, the memory is a
// histogram per part and what was put aside.
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
  static constexpr bool kOne = true;  // one score, not the product of two
  using Bits = decltype(magnitude(T()));
  SPARSEFT_INLINE Bits operator[](int64_t i) const { return magnitude(score[i]); }
  Abs operator+(int64_t i) const { return {score + i}; }
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
    uint64_t found = 0;
    for (int part = 0; part < 4; ++part) {
      const __m512i bits = _mm512_and_si512(load(from + 16 * part), magnitudes);
      found |= static_cast<uint64_t>(_mm512_cmpge_epu32_mask(bits, bound)) << 16 * part;
    }
    return found;
  }
  template <typename T, typename = std::enable_if_t<sizeof(T) == 2>>
  static SPARSEFT_AVX512 inline uint64_t which(const T* from, uint16_t low) {
    const __m512i magnitudes = _mm512_set1_epi16(0x7fff), bound = _mm512_set1_epi16(static_cast<short>(low));
    uint64_t found = 0;
    for (int part = 0; part < 2; ++part) {
      const __m512i bits = _mm512_and_si512(load(from + 32 * part), magnitudes);
      found |= static_cast<uint64_t>(_mm512_cmpge_epu16_mask(bits, bound)) << 32 * part;
    }
    return found;
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
    const Bin bin = find_bin(k, found);
    std::vector<int64_t*> next(parts);
    int64_t* start = out;
    for (int64_t part = 0; part < parts; ++part) {
      next[part] = start;
      start += found[part].above + found[part].ties;
    }
    for_each_piece(parts, [&](int64_t part, const Key& key, int64_t size, int64_t base) {
      int64_t *to = next[part], ties = found[part].ties;
      each_at_least(key, size, bin.low, [&](int64_t i, Bits bits) {
        if (bits > bin.high || ties-- > 0)
          *to++ = base + i;
        else if (bin.low < bin.high)
          found[part].inside.push_back({bits, base + i});
      });
      next[part] = to;
      found[part].ties = std::max<int64_t>(ties, 0);
    });
    if (bin.low == bin.high) return;
    keep_largest(found, bin.wanted);
    // From the end on: nothing is written before what is still to be read.
    int64_t* to = out + k;
    for (int64_t part = parts - 1; part >= 0; --part) {
      const auto& inside = found[part].inside;
      const int64_t *from = next[part], *first = from - found[part].above;
      const auto move = [&](const int64_t* begin) {
        to -= from - begin;
        std::memmove(to, begin, (from - begin) * sizeof(int64_t));
        from = begin;
      };
      for (auto one = inside.rbegin(); one != inside.rend(); ++one) {
        move(std::upper_bound(first, from, one->position));
        *--to = one->position;
      }
      move(first);
    }
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

  // What a part holds above and inside the bin; its positions are before those of the next.
  struct Part {
    int64_t above = 0;
    int64_t ties = 0;  // where the bin is a single key: how many of its own belong to the result
    std::vector<Candidate> inside;
  };

  // The keys in [low, high]; `wanted` of them belong to the result, with all that are larger.
  struct Bin {
    Bits low;
    Bits high;
    int64_t wanted;
  };

  // A key that probably a few more than k keys reach, from a sample; 0 if there are few keys.
  Bits bound(int64_t k) const {
    constexpr int64_t count = 1 << 15;
    if (size_ < 8 * count) return 0;
    const double share = static_cast<double>(k) / size_ * count;
    const int64_t rank = static_cast<int64_t>(share + 5 * std::sqrt(share)) + 8;
    if (rank >= count) return 0;
    std::vector<Bits> sample;
    uint64_t random = 0x9e3779b97f4a7c15;
    size_t segment = 0;
    for (int64_t i = 0; i < count; ++i) {
      random ^= random << 13, random ^= random >> 7, random ^= random << 17;
      const int64_t stride = size_ / count, position = i * stride + static_cast<int64_t>(random % stride);
      while (position >= segments_[segment].end) ++segment;
      sample.push_back(segments_[segment].key[position - segments_[segment].begin]);
    }
    std::nth_element(sample.begin(), sample.begin() + rank, sample.end(), std::greater<Bits>());
    return sample[rank];
  }

  // The bin of the k-th largest key: few keys, or a single one. Counts what each part has above it.
  Bin find_bin(int64_t k, std::vector<Part>& found) const {
    constexpr int64_t few = 1 << 15;
    const Bits most = std::numeric_limits<Bits>::max() >> 1;
    Bin bin{bound(k), most, k};
    while (true) {
      int shift = 0;
      while ((bin.high - bin.low) >> shift >= kBins) ++shift;
      // 32 bits hold a part's counts: a part has at most 2^31 positions.
      std::vector<std::vector<uint32_t>> counts(found.size(), std::vector<uint32_t>(kBins));
      for_each_piece(static_cast<int64_t>(found.size()), [&](int64_t part, const Key& key, int64_t size, int64_t) {
        uint32_t* count = counts[part].data();
        each_at_least(key, size, bin.low, [&](int64_t, Bits bits) {
          if (bits <= bin.high) ++count[(bits - bin.low) >> shift];
        });
      });
      int64_t here = 0, number = kBins;
      for (int64_t left = bin.wanted; left > 0;) {
        if (--number < 0) break;
        here = 0;
        for (const auto& count : counts) here += count[number];
        if (here < left)
          for (size_t part = 0; part < found.size(); ++part) found[part].above += counts[part][number];
        else
          bin.wanted = left;
        left -= here;
      }
      if (number < 0) {  // the sample's bound was too high
        for (Part& part : found) part.above = 0;
        bin = {0, most, k};
        continue;
      }
      const uint64_t low = bin.low + (static_cast<uint64_t>(number) << shift);
      bin.high = static_cast<Bits>(std::min<uint64_t>(bin.high, low + (uint64_t{1} << shift) - 1));
      bin.low = static_cast<Bits>(low);
      if (bin.low == bin.high) {
        int64_t left = bin.wanted;
        for (size_t part = 0; part < found.size(); ++part) {
          found[part].ties = std::min<int64_t>(left, counts[part][number]);
          left -= found[part].ties;
        }
      }
      if (here <= few || bin.low == bin.high) return bin;
    }
  }

  // Leaves the `wanted` largest inside the parts, the lower positions of equal ones.
  static void keep_largest(std::vector<Part>& found, int64_t wanted) {
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
