// Columns of a [T, *] matrix as rows of a buffer: a dot product over T then walks memory in order.
//
// Blocks of 16 neighbouring columns are transposed in registers, 16 x 16 units of 32 bits at a time (a unit is one fp32
// number, or two consecutive tokens of a 16-bit one); where only a few columns of a block are wanted, one by one.
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

constexpr int64_t kBlock = 16;  // columns of a block; units of a vector

typedef uint32_t Units __attribute__((vector_size(4 * kBlock), aligned(2), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * kBlock), aligned(2), may_alias));

// Buffer elements that fill one vector: tokens are taken in steps of so many.
template <typename S>
constexpr int64_t kStep = sizeof(S) == 2 ? 2 * kBlock : kBlock;

// The wanted columns, grouped by block.
class Columns {
 public:
  // Columns order[begin], ..., order[end - 1] of a matrix. Indices that no entry uses were not checked: they are
  // clamped.
  Columns(const Order& order, int64_t begin, int64_t end, int64_t width)
      : width_(width),
        start_(width / kBlock + 2),
        items_(end - begin) {
    const auto column = [&](int64_t i) { return std::clamp<int64_t>(order[begin + i], 0, width - 1); };
    for (int64_t i = 0; i < end - begin; ++i) ++start_[column(i) / kBlock + 1];
    for (size_t block = 1; block < start_.size(); ++block) start_[block] += start_[block - 1];
    std::vector<int64_t> next = start_;
    for (int64_t i = 0; i < end - begin; ++i) items_[next[column(i) / kBlock]++] = {column(i), i};
  }

  struct Item {
    int64_t column;
    int64_t row;  // of the buffer
  };
  int64_t blocks() const { return static_cast<int64_t>(start_.size()) - 1; }
  const Item* begin(int64_t block) const { return items_.data() + start_[block]; }
  const Item* end(int64_t block) const { return items_.data() + start_[block + 1]; }
  // Where a vector of neighbouring columns that holds the block starts.
  int64_t first_column(int64_t block) const { return std::min(block * kBlock, width_ - kBlock); }

 private:
  int64_t width_;
  std::vector<int64_t> start_;
  std::vector<Item> items_;
};

// Lanes of two vectors, exchanged in groups of `Group`: low keeps a's even groups, high b's odd ones.
template <size_t Group, size_t... Lane>
SPARSEFT_INLINE void exchange(Units& a, Units& b, std::index_sequence<Lane...>) {
  const Units low = __builtin_shufflevector(a, b, (Lane & Group ? kBlock + Lane - Group : Lane)...);
  b = __builtin_shufflevector(a, b, (Lane & Group ? kBlock + Lane : Lane + Group)...);
  a = low;
}

template <size_t Group>
SPARSEFT_INLINE void exchange_all(Units (&rows)[kBlock]) {
#pragma GCC unroll 16
  for (size_t i = 0; i < kBlock; ++i)
    if (!(i & Group)) exchange<Group>(rows[i], rows[i + Group], std::make_index_sequence<kBlock>());
}

SPARSEFT_INLINE void transpose(Units (&rows)[kBlock]) {
  exchange_all<8>(rows);
  exchange_all<4>(rows);
  exchange_all<2>(rows);
  exchange_all<1>(rows);
}

template <typename T, typename S>
constexpr bool kTransposable = sizeof(S) == 2 || std::is_same_v<T, float> || std::is_same_v<T, uint32_t> ||
                               (std::is_same_v<T, BFloat16> && std::is_same_v<S, float>);

// Unit `number` (a token, or two of them) of 16 neighbouring columns.
template <typename T, typename S>
SPARSEFT_INLINE Units load_units(const T* from, int64_t stride, int64_t number) {
  if constexpr (sizeof(T) == 4) {
    return *reinterpret_cast<const Units*>(from + number * stride);
  } else {
    const auto widened = [&](int64_t token) {
      return __builtin_convertvector(*reinterpret_cast<const Halves*>(from + token * stride), Units);
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

// Rows `row` of the buffer (`stride` apart, t0 = 0 at `to`) for all columns of blocks [begin, end): tokens
// [0, tokens), then zeros up to a whole step.
template <typename T, typename S>
SPARSEFT_INLINE void gather_blocks(const Matrix<T>& x, const Columns& columns, int64_t begin, int64_t end,
                                   int64_t tokens, S* to, int64_t stride) {
  constexpr int64_t few = 3;  // columns that cost less one by one
  for (int64_t t0 = 0; t0 < tokens; t0 += kStep<S>) {
    for (int64_t block = begin; block < end; ++block) {
      const Columns::Item *item = columns.begin(block), *last = columns.end(block);
      if constexpr (kTransposable<T, S>) {
        if (last - item > few && t0 + kStep<S> <= tokens && x.width >= kBlock && x.column_stride == 1) {
          const int64_t first = columns.first_column(block);
          Units units[kBlock];
#pragma GCC unroll 16
          for (int64_t i = 0; i < kBlock; ++i)
            units[i] = load_units<T, S>(x.data + t0 * x.token_stride + first, x.token_stride, i);
          transpose(units);
          for (; item != last; ++item)
            *reinterpret_cast<Units*>(to + item->row * stride + t0) = units[item->column - first];
          continue;
        }
      }
      for (; item != last; ++item) copy_step(x, item->column, t0, tokens, to + item->row * stride + t0);
    }
  }
}

}  // namespace sparseft
