// Columns of a [T, *] matrix as rows of a buffer: a dot product over T then walks memory in order.
//
// The columns of a cache line are transposed in registers, those that fill 16 bytes of a token together, as many tokens
// in each of a register's lanes of 128 bits; where only a few of them are wanted, one by one.
#pragma once

#include <cstring>
#include <utility>

#include "worklist.h"

namespace sparseft {

// A [T, *] operand: either stride may be 1.
template <typename T>
struct Matrix {
  const T* data;
  int64_t tokens;
  int64_t width;
  int64_t token_stride;
  int64_t column_stride;
};

template <typename T>
Matrix<T> matrix_of(const Tensor& tensor) {
  return {tensor.const_data_ptr<T>(), tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1)};
}

// Buffer elements that fill 64 bytes: tokens are taken in steps of so many.
template <typename S>
constexpr int64_t kStep = sizeof(S) == 2 ? 32 : 16;

// The wanted columns. A block are those that share a cache line of a token.
class Columns {
 public:
  // Columns order[begin], ..., order[end - 1] of a matrix of T, as rows 0, 1, ... of the buffer. Indices that no entry
  // uses were not checked: they are clamped.
  template <typename T>
  Columns(const Order& order, int64_t begin, int64_t end, const Matrix<T>& x)
      : block_size_(64 / sizeof(T)),
        width_(x.width),
        row_(width_, -1),
        same_(end - begin) {
    for (int64_t i = end - begin - 1; i >= 0; --i) {
      int64_t& row = row_[std::clamp<int64_t>(order[begin + i], 0, width_ - 1)];
      same_[i] = row;
      row = i;
    }
    for (int64_t first = 0; first < width_; first += block_size_) {
      const int64_t last = std::min(first + block_size_, width_);
      int64_t wanted = 0;
      bool once = true;
      for (int64_t column = first; column < last; ++column) {
        wanted += row_[column] >= 0;
        once &= row_[column] < 0 || same_[row_[column]] < 0;
      }
      const bool full = last - first == block_size_;
      if (wanted > 0) blocks_.push_back({first, full && once && wanted > block_size_ / 8});
    }
  }

  int64_t block_size() const { return block_size_; }
  // Of those blocks that hold a wanted column.
  int64_t blocks() const { return static_cast<int64_t>(blocks_.size()); }
  // The columns [first, last) of a block.
  int64_t first(int64_t block) const { return blocks_[block].first; }
  int64_t last(int64_t block) const { return std::min(first(block) + block_size_, width_); }
  // Whether a block has all its columns, none becomes two rows, and not just a few become one.
  bool dense(int64_t block) const { return blocks_[block].dense; }
  // The row that each column of a dense block becomes, or -1.
  const int64_t* rows(int64_t block) const { return row_.data() + first(block); }
  // f(row) for the rows that a column becomes.
  template <typename F>
  SPARSEFT_INLINE void each_row(int64_t column, const F& f) const {
    for (int64_t row = row_[column]; row >= 0; row = same_[row]) f(row);
  }

 private:
  struct Block {
    int64_t first;
    bool dense;
  };
  int64_t block_size_, width_;
  std::vector<int64_t> row_;   // the first of a column, or -1
  std::vector<int64_t> same_;  // the next row of the same column, or -1
  std::vector<Block> blocks_;
};

// Numbers of T as bits, in a register of `bytes`.
template <typename T, int64_t bytes>
struct VectorOfBits {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  typedef Bits type __attribute__((vector_size(bytes), aligned(sizeof(T)), may_alias));
};
template <typename T, int64_t bytes>
using Bits = typename VectorOfBits<T, bytes>::type;

template <typename T>
constexpr int64_t kGroup = 16 / sizeof(T);  // neighbouring columns that are transposed together

template <typename V, size_t... I>
SPARSEFT_INLINE auto joined(const V& low, const V& high, std::index_sequence<I...>) {
  return __builtin_shufflevector(low, high, I...);
}

// A group of columns; lane l: token l * kGroup.
template <typename T, int64_t bytes>
SPARSEFT_INLINE Bits<T, bytes> load_lanes(const T* from, int64_t stride) {
  if constexpr (bytes == 16) {
    return *reinterpret_cast<const Bits<T, 16>*>(from);
  } else {
    const auto low = load_lanes<T, bytes / 2>(from, stride);
    const auto high = load_lanes<T, bytes / 2>(from + bytes / 32 * kGroup<T> * stride, stride);
    return joined(low, high, std::make_index_sequence<bytes / sizeof(T)>());
  }
}

// In each lane: the numbers of the lower (or upper) halves of a and b, in turn.
template <size_t group, bool upper, typename V, size_t... I>
SPARSEFT_INLINE V in_turn(const V& a, const V& b, std::index_sequence<I...>) {
  constexpr size_t all = sizeof...(I);
  return __builtin_shufflevector(a, b, (I / group * group + upper * group / 2 + I % group / 2 + I % 2 * all)...);
}

// In each lane: number j of vector i becomes number i of vector j. Each round brings rows together that are half of
// them apart, like shuffling a pack of cards perfectly.
template <int64_t rounds, typename V, size_t group>
SPARSEFT_INLINE void transpose(V (&rows)[group]) {
  constexpr auto lanes = std::make_index_sequence<sizeof(V) * group / 16>();
  V next[group];
#pragma GCC unroll 8
  for (size_t i = 0; i < group / 2; ++i) {
    next[2 * i] = in_turn<group, false>(rows[i], rows[i + group / 2], lanes);
    next[2 * i + 1] = in_turn<group, true>(rows[i], rows[i + group / 2], lanes);
  }
#pragma GCC unroll 8
  for (size_t i = 0; i < group; ++i) rows[i] = next[i];
  if constexpr (rounds > 1) transpose<rounds - 1>(rows);
}

template <typename T, typename S>
constexpr bool kTransposable = std::is_same_v<T, S> || (std::is_same_v<T, BFloat16> && std::is_same_v<S, float>);

// Consecutive tokens of one column.
template <typename T, typename V>
SPARSEFT_INLINE void store(const V& tokens, T* to) {
  *reinterpret_cast<V*>(to) = tokens;
}
template <typename V>
SPARSEFT_INLINE void store(const V& tokens, float* to) {
  if constexpr (sizeof(tokens[0]) == 2) {  // bf16 is the upper half of fp32
    using Wide = Bits<float, 2 * sizeof(V)>;
    *reinterpret_cast<Wide*>(to) = __builtin_convertvector(tokens, Wide) << 16;
  } else {
    *reinterpret_cast<V*>(to) = tokens;
  }
}

// Tokens [begin, end) of one column; those past the last one are zero.
template <typename T, typename S>
SPARSEFT_INLINE void copy_column(const Matrix<T>& x, int64_t column, int64_t begin, int64_t end, S* to) {
  const T* from = x.data + column * x.column_stride;
  const int64_t last = std::min(end, x.tokens);
  for (int64_t t = begin; t < last; ++t) to[t] = static_cast<S>(from[t * x.token_stride]);
  for (int64_t t = std::max(begin, last); t < end; ++t) to[t] = S(0);
}

// The part of `gather` below with registers of `bytes`.
template <int64_t bytes, typename T, typename S>
SPARSEFT_INLINE void gather_blocks(const Matrix<T>& x, const Columns& columns, int64_t begin, int64_t end, S* to,
                                   int64_t stride) {
  const auto copy = [&](int64_t block, int64_t t0, int64_t t1) {
    for (int64_t column = columns.first(block); column < columns.last(block); ++column)
      columns.each_row(column, [&](int64_t row) { copy_column(x, column, t0, t1, to + row * stride); });
  };
  int64_t t = 0;
  if constexpr (kTransposable<T, S>) {
    constexpr int64_t group = kGroup<T>, piece = bytes / sizeof(T);  // tokens of a register
    // Groups at once, as far as there are registers: a token's line is read once then. (Where tokens are a power of two
    // apart, the first-level cache holds only some of their lines together.)
    constexpr int64_t groups = bytes == 64 ? 4 : 1;
    S unwanted[piece];
    const int64_t whole = x.column_stride == 1 ? x.tokens / piece * piece : 0;
    for (; t < whole; t += piece) {
      for (int64_t block = begin; block < end; ++block) {
        // The next tokens of a column lie in another page, where the processor does not look ahead.
        const bool more = block + 1 < end;
        if (more || t + piece < whole) {
          const T* next = x.data + (more ? t : t + piece) * x.token_stride + columns.first(more ? block + 1 : begin);
          for (int64_t i = 0; i < piece; ++i) __builtin_prefetch(next + i * x.token_stride);
        }
        if (!columns.dense(block)) {
          copy(block, t, t + piece);
          continue;
        }
        const T* from = x.data + t * x.token_stride + columns.first(block);
        const int64_t* row = columns.rows(block);
        for (int64_t column = 0; column < 64 / static_cast<int64_t>(sizeof(T)); column += groups * group) {
          Bits<T, bytes> tokens[groups][group];
#pragma GCC unroll 8
          for (int64_t i = 0; i < group; ++i)
#pragma GCC unroll 4
            for (int64_t g = 0; g < groups; ++g)
              tokens[g][i] = load_lanes<T, bytes>(from + i * x.token_stride + column + g * group, x.token_stride);
#pragma GCC unroll 4
          for (int64_t g = 0; g < groups; ++g) {
            transpose<group == 8 ? 3 : group == 4 ? 2 : 1>(tokens[g]);
#pragma GCC unroll 8
            for (int64_t i = 0; i < group; ++i) {
              const int64_t own = row[column + g * group + i];
              store(tokens[g][i], own < 0 ? unwanted : to + own * stride + t);
            }
          }
        }
      }
    }
  }
  const int64_t padded = (x.tokens + kStep<S> - 1) / kStep<S> * kStep<S>;
  if (t == padded) return;
  for (int64_t block = begin; block < end; ++block) copy(block, t, padded);
}

template <typename T, typename S>
SPARSEFT_AVX512 void gather_wide(const Matrix<T>& x, const Columns& columns, int64_t begin, int64_t end, S* to,
                                 int64_t stride) {
  gather_blocks<64>(x, columns, begin, end, to, stride);
}

template <typename T, typename S>
SPARSEFT_CLONES void gather_narrow(const Matrix<T>& x, const Columns& columns, int64_t begin, int64_t end, S* to,
                                   int64_t stride) {
  gather_blocks<32>(x, columns, begin, end, to, stride);
}

// Rows of the buffer (`stride` apart) for all columns of the blocks [begin, end): the tokens, then zeros up to a whole
// step.
template <typename T, typename S>
void gather(const Matrix<T>& x, const Columns& columns, int64_t begin, int64_t end, S* to, int64_t stride) {
  has_avx512() ? gather_wide(x, columns, begin, end, to, stride) : gather_narrow(x, columns, begin, end, to, stride);
}

}  // namespace sparseft
