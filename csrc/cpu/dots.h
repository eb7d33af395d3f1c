// Dot products of the rows of two buffers, one for each entry of a run. Everything here is inlined into the translation
// unit that compiles it for an instruction set.
#pragma once

#include "columns.h"

namespace sparseft {

constexpr int64_t kLanes = 16;  // partial sums of a dot product
// Tokens of a row of the scratch, 8 cache lines: more would hold fewer rows in the second-level cache, fewer would be
// too short for the work around each dot product. kHalf: where rows have few entries.
template <typename S>
constexpr int64_t kTokens = 512 / sizeof(S);
template <typename S>
constexpr int64_t kHalf = kTokens<S> / 2;

constexpr int64_t kTogether = 4;  // dot products at once: independent sums hide the latency of the additions

// Rows of a buffer by their number in the worklist's order, minus `begin`; a block of tokens starts at `offset`.
template <typename S>
struct Rows {
  const S* const* row;
  int64_t begin;
  int64_t offset;
};

// What a run needs; at most kTokens<S> tokens, a multiple of kStep<S>.
template <typename S, typename W>
struct Dots {
  Rows<S> rows, cols;
  int64_t tokens;
  bool add;
  W* out;  // [k]
};

template <typename W, int64_t lanes>
struct VectorOf {
  typedef W type __attribute__((vector_size(lanes * sizeof(W)), aligned(sizeof(W)), may_alias));
};
// The same for bf16 buffers, by AVX-512's instruction for them (bf16_dots.cpp); only where `has_bf16_dots()`.
bool has_bf16_dots();
void bf16_dots_of_run(const Worklist& work, const Run& run, const Dots<BFloat16, float>& d);

// How numbers of S are loaded, multiplied and added up in registers of `bytes`: those of the processor. (Vectors wider
// than them would live in memory.)
template <typename S, int64_t bytes>
struct Multiply {
  static constexpr int64_t width = bytes / sizeof(S);  // tokens of a vector
  static constexpr int64_t parts = kLanes / width;     // vectors that hold the partial sums
  using Vector = typename VectorOf<S, width>::type;
  using Sum = Vector;
  static SPARSEFT_INLINE Vector load(const S* from) { return *reinterpret_cast<const Vector*>(from); }
  static SPARSEFT_INLINE void add(Sum& sum, const Vector& a, const Vector& b) { sum += a * b; }
};

// Partial sums i + 8 and i, then i + 4 and i: four are left.
template <typename W, typename Sum, size_t parts>
SPARSEFT_INLINE typename VectorOf<W, 4>::type quarter(const Sum (&sum)[parts]) {
  if constexpr (parts == 4) {
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
  } else {
    const Sum half = sum[0] + sum[1];
    return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
  }
}

// The totals of four times 16 partial sums: i + 8 and i, then i + 4 and i, then i + 2 and i, then the last two. The
// four share their vectors as soon as these are not full.
template <typename W, typename Sum, size_t parts>
SPARSEFT_INLINE typename VectorOf<W, 4>::type totals(const Sum (&sums)[kTogether][parts]) {
  if constexpr (parts == 1) {
    const auto halves = [](const Sum& a, const Sum& b) {
      return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
             __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    };
    const Sum ab = halves(sums[0][0], sums[1][0]), cd = halves(sums[2][0], sums[3][0]);
    const Sum quarters = __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                         __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    const Sum eighths = quarters + __builtin_shufflevector(quarters, quarters, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14,
                                                           15, 12, 13);  // their lower halves count
    return __builtin_shufflevector(eighths, eighths, 0, 4, 8, 12) +
           __builtin_shufflevector(eighths, eighths, 1, 5, 9, 13);
  } else {
    const auto a = quarter<W>(sums[0]), b = quarter<W>(sums[1]), c = quarter<W>(sums[2]), d = quarter<W>(sums[3]);
    const auto ab = __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
    const auto cd = __builtin_shufflevector(c, d, 0, 1, 4, 5) + __builtin_shufflevector(c, d, 2, 3, 6, 7);
    return __builtin_shufflevector(ab, cd, 0, 2, 4, 6) + __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
  }
}

// Four dot products; `one_row`: all of them with row[0]. `fixed`: over so many tokens, whatever `tokens` is; 0:
// `tokens`.
template <typename Op, bool one_row, int64_t fixed, typename S, typename W>
SPARSEFT_INLINE void dot(const S* const* row, const S* const* col, int64_t tokens, W* out) {
  typename Op::Sum sums[kTogether][Op::parts] = {};
#pragma GCC unroll 8
  for (int64_t t = 0; t < (fixed ? fixed : tokens); t += Op::parts * Op::width) {
#pragma GCC unroll 4
    for (int64_t p = 0; p < Op::parts; ++p) {
      const int64_t at = t + p * Op::width;
      const typename Op::Vector first = Op::load(row[0] + at);
#pragma GCC unroll 4
      for (int64_t j = 0; j < kTogether; ++j)
        Op::add(sums[j][p], one_row || j == 0 ? first : Op::load(row[j] + at), Op::load(col[j] + at));
    }
  }
  const auto four = totals<W>(sums);
  std::memcpy(out, &four, sizeof(four));
}

template <typename Op, int64_t fixed, typename S, typename W>
SPARSEFT_INLINE void dots_of_run(const Worklist& work, const Run& run, const Dots<S, W>& d) {
  const S* const* rows = d.rows.row + (run.tile->row0 - d.rows.begin);
  const S* const* cols = d.cols.row + (run.tile->col0 - d.cols.begin);
  // Found before, all at once: beside the dot products, no registers are left for it.
  const S *row[kRun + kTogether], *col[kRun + kTogether];
  const int64_t count = run.last - run.first;
  const uint16_t* local = work.local + run.first;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t r = work.width.quotient(local[i]);
    row[i] = rows[r] + d.rows.offset;
    col[i] = cols[local[i] - r * work.width.size] + d.cols.offset;
  }
  for (int64_t i = count; i % kTogether; ++i) {  // past the end: the last entry again
    row[i] = row[count - 1];
    col[i] = col[count - 1];
  }
  W* out = d.out + run.first;
  for (int64_t i = 0; i < count; i += kTogether) {
    W sums[kTogether];
    if (row[i] == row[i + kTogether - 1])  // row-major, each row once: those between are in it, too
      dot<Op, true, fixed>(row + i, col + i, d.tokens, sums);
    else
      dot<Op, false, fixed>(row + i, col + i, d.tokens, sums);
    if (i + kTogether <= count) {
      if (d.add)
#pragma GCC unroll 4
        for (int64_t j = 0; j < kTogether; ++j) sums[j] += out[i + j];
      std::memcpy(out + i, sums, sizeof(sums));
    } else {
      for (int64_t j = 0; i + j < count; ++j) out[i + j] = d.add ? out[i + j] + sums[j] : sums[j];
    }
  }
}

// out[e] (+)= the dot product of entry e, for the entries of a run.
template <typename Op, typename S, typename W>
SPARSEFT_INLINE void dots_of_run(const Worklist& work, const Run& run, const Dots<S, W>& d) {
  if (d.tokens == kTokens<S>) return dots_of_run<Op, kTokens<S>>(work, run, d);
  if (d.tokens == kHalf<S>) return dots_of_run<Op, kHalf<S>>(work, run, d);
  dots_of_run<Op, 0>(work, run, d);
}

}  // namespace sparseft
