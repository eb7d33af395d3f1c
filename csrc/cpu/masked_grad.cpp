// masked_grad_: the weight gradient of y = x W^T at the selected entries only.
//
// A dot product over T walks a column of grad_out and a column of input. The needed columns are first gathered into
// rows of a scratch buffer, padded with zeros to whole vectors: bf16 stays bf16 where the processor multiplies it,
// everything else is widened to fp32 (fp64). A column that lies in memory in this form already is read where it is.
// Tokens are taken kTokens at a time: the scratch stays in the cache, and its size does not grow with T. An
// entry's sum always has the same order (lanes, then their tree, then the blocks of tokens), whatever the number of
// threads.
#include <torch/csrc/stable/library.h>

#include "dots.h"
#include "phases.h"

namespace sparseft {
namespace {

// A row of the scratch: 8 cache lines. More would hold fewer rows in the second-level cache, fewer would be too short
// for the work around each dot product.
template <typename S>
constexpr int64_t kTokens = 512 / sizeof(S);
template <typename S>
constexpr int64_t kStride = kTokens<S> + kStep<S>;  // a power of two would crowd few sets of the cache

template <typename S>
SPARSEFT_AVX512 void wide_dots_of_run(const Worklist& work, const Run& run, const Dots<S, S>& dots) {
  dots_of_run<Multiply<S, 64>>(work, run, dots);
}

template <typename S>
SPARSEFT_CLONES void narrow_dots_of_run(const Worklist& work, const Run& run, const Dots<S, S>& dots) {
  dots_of_run<Multiply<S, 32>>(work, run, dots);
}

template <typename S>
void dots_of(const Worklist& work, const Run& run, const Dots<S, S>& dots) {
  has_avx512() ? wide_dots_of_run(work, run, dots) : narrow_dots_of_run(work, run, dots);
}
void dots_of(const Worklist& work, const Run& run, const Dots<BFloat16, float>& dots) {
  bf16_dots_of_run(work, run, dots);
}

// The smallest [begin, end) of the order that holds all starts of non-empty tiles, and a tile's size beyond them.
std::pair<int64_t, int64_t> used(const Worklist& work, int64_t Tile::* start, int64_t size, const Order& order) {
  int64_t begin = order.size, end = 0;
  for (const Tile* tile = work.tiles; tile != work.tiles + work.size; ++tile) {
    if (tile->entry0 == tile->entry1) continue;
    begin = std::min(begin, tile->*start);
    end = std::max(end, std::min(tile->*start + size, order.size));
  }
  return {std::min(begin, end), end};
}

// The columns of one operand that the worklist uses, as rows of S; a block of tokens at a time.
template <typename T, typename S>
class Operand {
 public:
  Operand(const Tensor& tensor, const Order& order, std::pair<int64_t, int64_t> range)
      : x_(matrix_of<T>(tensor)),
        begin_(range.first),
        in_place_(std::is_same_v<T, S> && x_.token_stride == 1 && x_.tokens % kStep<S> == 0),
        columns_(order, begin_, in_place_ ? begin_ : range.second, x_.width),
        rows_(range.second - range.first) {
    if constexpr (std::is_same_v<T, S>) {
      if (in_place_) {
        for (size_t i = 0; i < rows_.size(); ++i) {
          // Indices that no entry uses were not checked.
          const int64_t column = std::clamp<int64_t>(order[begin_ + i], 0, x_.width - 1);
          rows_[i] = x_.data + column * x_.column_stride;
        }
        return;
      }
    }
    scratch_ = torch::stable::new_empty(tensor, {static_cast<int64_t>(rows_.size()), kStride<S>},
                                        sizeof(S) == 2 ? tensor.scalar_type() : wide_type(tensor.scalar_type()));
    to_ = scratch_.mutable_data_ptr<S>();
    for (size_t i = 0; i < rows_.size(); ++i) rows_[i] = to_ + i * kStride<S>;
  }

  // Blocks of columns that a block of tokens has to be gathered from.
  int64_t blocks() const { return in_place_ ? 0 : columns_.blocks(); }

  void gather_tokens(int64_t begin, int64_t end, int64_t token0, int64_t count) const {
    Matrix<T> from = x_;
    from.data += token0 * x_.token_stride;
    gather(from, columns_, begin, end, count, to_, kStride<S>);
  }

  Rows<S> rows(int64_t token0) const { return {rows_.data(), begin_, in_place_ ? token0 : 0}; }

 private:
  Matrix<T> x_;
  int64_t begin_;
  bool in_place_;
  Columns columns_;
  Tensor scratch_;
  S* to_ = nullptr;
  std::vector<const S*> rows_;
};

template <typename T, typename S>
void compute(const Worklist& work, Operand<T, S> left, Operand<T, S> right, int64_t tokens, bool accumulate,
             Wide<T>* out) {
  // Some microseconds each; columns are read a row of them at a time, and pages are far apart.
  const int64_t blocks_at_once = 128 / block_size(), runs_at_once = 4;
  constexpr int64_t block = kTokens<S>;
  const std::vector<Run> runs = runs_of(work);
  const int64_t middle = left.blocks();
  // For each block of tokens: gather, then multiply. An empty batch still takes one (empty) block: it sets the entries
  // to zero.
  const int64_t blocks = std::max<int64_t>(1, (tokens + block - 1) / block);
  std::vector<Phases::Size> sizes;
  for (int64_t i = 0; i < blocks; ++i) {
    sizes.push_back({middle + right.blocks(), blocks_at_once});
    sizes.push_back({static_cast<int64_t>(runs.size()), runs_at_once});
  }
  std::vector<Dots<S, Wide<T>>> dots;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t count = std::min(block, tokens - i * block);
    const int64_t padded = (count + kStep<S> - 1) / kStep<S> * kStep<S>;
    dots.push_back({left.rows(i * block), right.rows(i * block), padded, accumulate || i > 0, out});
  }
  const bool threaded = (work.entries + block_size() * sizes[0].items) * tokens > 1 << 18;
  Phases(sizes).run(threaded, [&](int64_t phase, int64_t begin, int64_t end) {
    const int64_t token0 = phase / 2 * block, count = std::min(block, tokens - token0);
    if (phase % 2) {
      for (; begin < end; ++begin) dots_of(work, runs[begin], dots[phase / 2]);
      return;
    }
    if (begin < middle) left.gather_tokens(begin, std::min(end, middle), token0, count);
    if (end > middle) right.gather_tokens(std::max(begin, middle) - middle, end - middle, token0, count);
  });
}

void masked_grad(Tensor out, const Tensor& grad_out, const Tensor& input, std::optional<Tensor> rows,
                 std::optional<Tensor> cols, const Tensor& tiles, const Tensor& local, std::vector<int64_t> tile,
                 bool accumulate) {
  check_masked_grad(out, grad_out, input, rows, cols, tiles, local, tile);
  const Worklist work(Order(rows, grad_out.size(1)), Order(cols, input.size(1)), tiles, local, tile);
  work.check_bounds("masked_grad_", {{grad_out.size(1), input.size(1)}}, /*one_shape=*/true);
  const auto dense = [](const Tensor& x) {
    return x.stride(0) == 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
  };
  const Tensor left = dense(grad_out), right = dense(input);
  const auto with = [&](auto from, auto to) {
    using T = typename decltype(from)::type;
    using S = typename decltype(to)::type;
    compute(work, Operand<T, S>(left, work.rows, used(work, &Tile::row0, tile[0], work.rows)),
            Operand<T, S>(right, work.cols, used(work, &Tile::col0, tile[1], work.cols)), grad_out.size(0), accumulate,
            out.mutable_data_ptr<Wide<T>>());
  };
  visit_float(grad_out.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same_v<T, BFloat16>) {
      static const bool keep_bf16 = has_bf16_dots();
      if (keep_bf16) return with(tag, tag);
    }
    with(tag, Tag<Wide<T>>{});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparseft_cpu, CPU, m) {
  m.impl("masked_grad_", TORCH_BOX(&masked_grad));
}

}  // namespace sparseft
