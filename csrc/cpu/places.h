// Where the entries of a tile lie in its weight, asked for on the way: 16 at a time with AVX-512, where a tile has at
// most 64 rows and columns.
#pragma once

#include "worklist.h"

#ifdef SPARSEFT_X86
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own intrinsics (GCC bug 105593)
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace sparseft {

// Into the second-level cache: a core can have twice as many lines under way to it as to the first.
SPARSEFT_INLINE void ask_for_line(const void* address) {
  __builtin_prefetch(address, 0, 2);
}

// A tile's place in a layer: its first row and column in their orders, and how many these still have.
template <typename T>
struct Site {
  T* weight;
  int64_t stride;  // of a row of the weight
  const int32_t* rows;
  int64_t row_count;
  const int32_t* cols;
  int64_t col_count;
  Divider width;  // of a tile
};

// Writes the addresses of `count` entries to `to`.
template <typename T>
void place(const Site<T>& site, const uint16_t* local, int64_t count, T** to) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t row = site.width.quotient(local[i]);
    const uint32_t col = local[i] - row * site.width.size;
    to[i] = site.weight + site.rows[row] * site.stride + site.cols[col];
    ask_for_line(to[i]);
  }
}

constexpr int64_t kSide = 64;    // rows and columns of a tile that four vectors hold
constexpr int64_t kAtOnce = 16;  // entries

#ifdef SPARSEFT_X86

// Up to kSide row or column indices of a tile.
struct Indices {
  __m512i quarters[4];
};

SPARSEFT_AVX512 SPARSEFT_INLINE Indices first_indices(const int32_t* from, int64_t count) {
  const uint64_t there = count >= kSide ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
  Indices all;
  for (int q = 0; q < 4; ++q)
    all.quarters[q] = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(there >> (16 * q)), from + 16 * q);
  return all;
}

// The indices with these numbers, all below kSide.
SPARSEFT_AVX512 SPARSEFT_INLINE __m512i pick(const Indices& all, __m512i numbers) {
  const __m512i lower = _mm512_permutex2var_epi32(all.quarters[0], numbers, all.quarters[1]);
  const __m512i upper = _mm512_permutex2var_epi32(all.quarters[2], numbers, all.quarters[3]);
  return _mm512_mask_blend_epi32(_mm512_test_epi32_mask(numbers, _mm512_set1_epi32(32)), lower, upper);
}

// As place, for tiles of at most kSide x kSide in weights of less than 2^31 elements. Writes whole groups of kAtOnce.
template <typename T>
SPARSEFT_AVX512 void place_together(const Site<T>& site, const uint16_t* local, int64_t count, T** to) {
  constexpr int kShift = sizeof(T) == 2 ? 1 : sizeof(T) == 4 ? 2 : 3;
  Indices rows = first_indices(site.rows, site.row_count);
  const Indices cols = first_indices(site.cols, site.col_count);
  for (__m512i& quarter : rows.quarters)
    quarter = _mm512_mullo_epi32(quarter, _mm512_set1_epi32(static_cast<int>(site.stride)));
  const __m512i width = _mm512_set1_epi32(static_cast<int>(site.width.size));
  const __m512i weight = _mm512_set1_epi64(reinterpret_cast<int64_t>(site.weight));
  // (position + 1/2) / width is at least 1/128 away from a whole number, and its rounding errors are below 2^-16
  const __m512 inverse = _mm512_set1_ps(1.0f / static_cast<float>(site.width.size));
  const __m512 half = _mm512_mul_ps(inverse, _mm512_set1_ps(0.5f));
  for (int64_t i = 0; i < count; i += kAtOnce) {
    const int64_t here = std::min(kAtOnce, count - i);
    const __mmask16 mask = static_cast<__mmask16>((1 << here) - 1);
    const __m512i position = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, local + i));
    const __m512i row = _mm512_cvttps_epi32(_mm512_fmadd_ps(_mm512_cvtepi32_ps(position), inverse, half));
    const __m512i col = _mm512_sub_epi32(position, _mm512_mullo_epi32(row, width));
    const __m512i offset = _mm512_add_epi32(pick(rows, row), pick(cols, col));
    const __m512i low = _mm512_cvtepu32_epi64(_mm512_castsi512_si256(offset));
    const __m512i high = _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(offset, 1));
    _mm512_storeu_si512(to + i, _mm512_add_epi64(_mm512_slli_epi64(low, kShift), weight));
    _mm512_storeu_si512(to + i + 8, _mm512_add_epi64(_mm512_slli_epi64(high, kShift), weight));
    for (int64_t j = i; j < i + here; ++j) ask_for_line(to[j]);
  }
}

#endif

}  // namespace sparseft
