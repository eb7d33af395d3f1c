// Dot products of the rows of two buffers, one for each entry of a run. Everything here is inlined into the translation
// unit that compiles it for an instruction set.
#pragma once

#include "columns.h"

namespace sparseft {

constexpr int64_t kLanes = 16;    // partial sums of a dot product
constexpr int64_t kTogether = 4;  // dot products at once: independent sums hide the latency of the additions

// Rows of a buffer by their number in the worklist's order, minus `begin`; a block of tokens starts at `offset`.
template <typename S>
struct Rows {
  const S* const* row;
  int64_t begin;
  int64_t offset;
};

// What a run needs; T tokens, a multiple of kStep<S>.
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
  } else if constexpr (parts == 2) {
    const Sum half = sum[0] + sum[1];
    return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
  } else {
    const auto half = __builtin_shufflevector(sum[0], sum[0], 0, 1, 2, 3, 4, 5, 6, 7) +
                      __builtin_shufflevector(sum[0], sum[0], 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
  }
}

// Four dot products; `one_row`: all of them with row[0].
template <typename Op, bool one_row, typename S, typename W>
SPARSEFT_INLINE void dot(const S* const* row, const S* const* col, int64_t tokens, W* out) {
  typename Op::Sum sums[kTogether][Op::parts] = {};
  for (int64_t t = 0; t < tokens; t += Op::parts * Op::width) {
#pragma GCC unroll 4
    for (int64_t p = 0; p < Op::parts; ++p) {
      const int64_t at = t + p * Op::width;
      const typename Op::Vector first = Op::load(row[0] + at);
#pragma GCC unroll 4
      for (int64_t j = 0; j < kTogether; ++j)
        Op::add(sums[j][p], one_row || j == 0 ? first : Op::load(row[j] + at), Op::load(col[j] + at));
    }
  }
  const auto a = quarter<W>(sums[0]), b = quarter<W>(sums[1]), c = quarter<W>(sums[2]), d = quarter<W>(sums[3]);
  const auto ab = __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
  const auto cd = __builtin_shufflevector(c, d, 0, 1, 4, 5) + __builtin_shufflevector(c, d, 2, 3, 6, 7);
  const auto total = __builtin_shufflevector(ab, cd, 0, 2, 4, 6) + __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
  std::memcpy(out, &total, sizeof(total));
}

// out[e] (+)= the dot product of entry e, for the entries of a run.
template <typename Op, typename S, typename W>
SPARSEFT_INLINE void dots_of_run(const Worklist& work, const Run& run, const Dots<S, W>& d) {
  const S* const* rows = d.rows.row + (run.tile->row0 - d.rows.begin);
  const S* const* cols = d.cols.row + (run.tile->col0 - d.cols.begin);
  for (int64_t e = run.first; e < run.last; e += kTogether) {
    const S *row[kTogether], *col[kTogether];
#pragma GCC unroll 4
    for (int64_t j = 0; j < kTogether; ++j) {  // past the end: the last entry again
      const uint32_t position = work.local[std::min(e + j, run.last - 1)];
      const uint32_t r = work.width.quotient(position);
      row[j] = rows[r] + d.rows.offset;
      col[j] = cols[position - r * work.width.size] + d.cols.offset;
    }
    W dots[kTogether];
    if (row[0] == row[kTogether - 1])  // entries are row-major: those between are in this row, too
      dot<Op, true>(row, col, d.tokens, dots);
    else
      dot<Op, false>(row, col, d.tokens, dots);
    const int64_t count = std::min(kTogether, run.last - e);
    for (int64_t j = 0; j < count; ++j) d.out[e + j] = d.add ? d.out[e + j] + dots[j] : dots[j];
  }
}

}  // namespace sparseft
