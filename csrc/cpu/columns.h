// Columns of a [T, *] matrix as rows of a buffer: a dot product over T then walks memory in order.
//
// Blocks of neighbouring columns are transposed in registers, as many units of 32 bits each way as a register holds (a
// unit is one fp32 number, or two consecutive tokens of a 16-bit one); where only a few columns of a block are wanted,
// one by one.
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

// Columns of a block: units of a register.
constexpr int64_t kWide = 16;   // AVX-512
constexpr int64_t kNarrow = 8;  // AVX2: 16 x 16 units would be twice its registers
inline int64_t block_size() {
  return has_avx512() ? kWide : kNarrow;
}

template <int64_t lanes>
struct VectorsOf {
  typedef uint32_t Units __attribute__((vector_size(4 * lanes), aligned(2), may_alias));
  typedef uint16_t Halves __attribute__((vector_size(2 * lanes), aligned(2), may_alias));
};
template <int64_t lanes>
using Units = typename VectorsOf<lanes>::Units;

// The wanted columns, grouped by block.
class Columns {
 public:
  // Columns order[begin], ..., order[end - 1] of a matrix. Indices that no entry uses were not checked: they are
  // clamped.
  Columns(const Order& order, int64_t begin, int64_t end, int64_t width)
      : width_(width),
        start_(width / block_ + 2),
        items_(end - begin) {
    const auto column = [&](int64_t i) { return std::clamp<int64_t>(order[begin + i], 0, width - 1); };
    for (int64_t i = 0; i < end - begin; ++i) ++start_[column(i) / block_ + 1];
    for (size_t block = 1; block < start_.size(); ++block) start_[block] += start_[block - 1];
    std::vector<int64_t> next = start_;
    for (int64_t i = 0; i < end - begin; ++i) items_[next[column(i) / block_]++] = {column(i), i};
  }

  struct Item {
    int64_t column;
    int64_t row;  // of the buffer
  };
  int64_t blocks() const { return static_cast<int64_t>(start_.size()) - 1; }
  const Item* begin(int64_t block) const { return items_.data() + start_[block]; }
  const Item* end(int64_t block) const { return items_.data() + start_[block + 1]; }
  int64_t block_size() const { return block_; }
  // Where a vector of neighbouring columns that holds the block starts.
  int64_t first_column(int64_t block) const { return std::min(block * block_, width_ - block_); }

 private:
  const int64_t block_ = sparseft::block_size();
  int64_t width_;
  std::vector<int64_t> start_;
  std::vector<Item> items_;
};

// Lanes of two vectors, exchanged in groups of `group`: low keeps a's even groups, high b's odd ones.
template <size_t group, int64_t lanes, size_t... Lane>
SPARSEFT_INLINE void exchange(Units<lanes>& a, Units<lanes>& b, std::index_sequence<Lane...>) {
  const Units<lanes> low = __builtin_shufflevector(a, b, (Lane & group ? lanes + Lane - group : Lane)...);
  b = __builtin_shufflevector(a, b, (Lane & group ? lanes + Lane : Lane + group)...);
  a = low;
}

template <int64_t lanes, size_t group = lanes / 2>
SPARSEFT_INLINE void transpose(Units<lanes> (&rows)[lanes]) {
#pragma GCC unroll 16
  for (size_t i = 0; i < lanes; ++i)
    if (!(i & group)) exchange<group, lanes>(rows[i], rows[i + group], std::make_index_sequence<lanes>());
  if constexpr (group > 1) transpose<lanes, group / 2>(rows);
}

template <typename T, typename S>
constexpr bool kTransposable = sizeof(S) == 2 || std::is_same_v<T, float> || std::is_same_v<T, uint32_t> ||
                               (std::is_same_v<T, BFloat16> && std::is_same_v<S, float>);

// Unit `number` (a token, or two of them) of `lanes` neighbouring columns.
template <int64_t lanes, typename T, typename S>
SPARSEFT_INLINE Units<lanes> load_units(const T* from, int64_t stride, int64_t number) {
  if constexpr (sizeof(T) == 4) {
    return *reinterpret_cast<const Units<lanes>*>(from + number * stride);
  } else {
    const auto widened = [&](int64_t token) {
      using Halves = typename VectorsOf<lanes>::Halves;
      return __builtin_convertvector(*reinterpret_cast<const Halves*>(from + token * stride), Units<lanes>);
    };
    if constexpr (sizeof(S) == 4) return widened(number) << 16;  // bf16 is the upper half of fp32
    return widened(2 * number) | widened(2 * number + 1) << 16;
  }
}

// Tokens [t0, t0 + kStep) of one column; those past the end are zero.
template <typename T, typename S>
SPARSEFT_INLINE void copy_step(const Matrix<T>& x, int64_t column, int64_t t0, int64_t tokens, S* to) {
  const T* from = x.data + column * x.column_stride + t0 * x.token_stride;
  if (t0 + kStep<S> <= tokens) {
    for (int64_t t = 0; t < kStep<S>; ++t) to[t] = static_cast<S>(from[t * x.token_stride]);
  } else {
    for (int64_t t = 0; t < kStep<S>; ++t) to[t] = t0 + t < tokens ? static_cast<S>(from[t * x.token_stride]) : S(0);
  }
}

// The part of `gather` below for blocks of `lanes` columns.
template <int64_t lanes, typename T, typename S>
SPARSEFT_INLINE void gather_blocks(const Matrix<T>& x, const Columns& columns, int64_t begin, int64_t end,
                                   int64_t tokens, S* to, int64_t stride) {
  constexpr int64_t few = lanes / 4;                // columns that cost less one by one
  constexpr int64_t piece = lanes * 4 / sizeof(S);  // tokens of a transposed square
  for (int64_t t = 0; t < tokens; t += piece) {     // tokens outside: neighbouring blocks share cache lines
    const int64_t t0 = t / kStep<S> * kStep<S>;
    for (int64_t block = begin; block < end; ++block) {
      const Columns::Item *item = columns.begin(block), *last = columns.end(block);
      if constexpr (kTransposable<T, S>) {
        if (last - item > few && t0 + kStep<S> <= tokens && x.width >= lanes && x.column_stride == 1) {
          const int64_t first = columns.first_column(block);
          Units<lanes> units[lanes];
#pragma GCC unroll 16
          for (int64_t i = 0; i < lanes; ++i)
            units[i] = load_units<lanes, T, S>(x.data + t * x.token_stride + first, x.token_stride, i);
          // the next tokens lie in other pages, where the processor does not look ahead
          for (int64_t i = 0; i < piece && t + piece + i < tokens; ++i)
            __builtin_prefetch(x.data + (t + piece + i) * x.token_stride + first);
          transpose<lanes>(units);
          for (; item != last; ++item)
            *reinterpret_cast<Units<lanes>*>(to + item->row * stride + t) = units[item->column - first];
          continue;
        }
      }
      if (t != t0) continue;  // a step at a time
      for (; item != last; ++item) copy_step(x, item->column, t0, tokens, to + item->row * stride + t0);
    }
  }
}

template <typename T, typename S>
SPARSEFT_AVX512 void gather_wide(const Matrix<T>& x, const Columns& columns, int64_t begin, int64_t end, int64_t tokens,
                                 S* to, int64_t stride) {
  gather_blocks<kWide>(x, columns, begin, end, tokens, to, stride);
}

template <typename T, typename S>
SPARSEFT_CLONES void gather_narrow(const Matrix<T>& x, const Columns& columns, int64_t begin, int64_t end,
                                   int64_t tokens, S* to, int64_t stride) {
  gather_blocks<kNarrow>(x, columns, begin, end, tokens, to, stride);
}

// Rows `row` of the buffer (`stride` apart, t0 = 0 at `to`) for all columns of blocks [begin, end): tokens
// [0, tokens), then zeros up to a whole step.
template <typename T, typename S>
void gather(const Matrix<T>& x, const Columns& columns, int64_t begin, int64_t end, int64_t tokens, S* to,
            int64_t stride) {
  const auto gather_by_block = columns.block_size() == kWide ? gather_wide<T, S> : gather_narrow<T, S>;
  gather_by_block(x, columns, begin, end, tokens, to, stride);
}

}  // namespace sparseft
