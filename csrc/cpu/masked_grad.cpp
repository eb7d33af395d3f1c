// masked_grad_: the weight gradient of y = x W^T at the selected entries only.
//
// A dot product over T walks a column of grad_out and a column of input. The needed columns are first gathered into
// rows of a scratch buffer, padded with zeros to whole vectors: bf16 stays bf16 where the processor multiplies it,
// everything else is widened to fp32 (fp64). A column that lies in memory in this form already is read where it is.
// A block of tokens is taken at a time: the scratch stays in the cache, and its size does not grow with T. (Sums take
// up to three more numbers for each entry: those of the shares, below.)
//
// Threads share the tokens, not the entries: what a core has gathered, it reads from its own cache. An entry's sum
// always has the same order (lanes, then their tree, then the blocks of a share, then the shares), whatever the number
// of threads.
#include <torch/csrc/stable/library.h>

#include <deque>
#include <memory>
#include <new>

#include "dots.h"
#include "phases.h"

namespace sparseft {
namespace {

// Tokens of a block, for the rows of both operands together. Where a row has fewer than 16 entries on average (each
// entry reads two rows), it is worth more that the rows stay in the second-level cache until they are read.
template <typename S>
int64_t block_tokens(int64_t entries, int64_t rows) {
  return entries < 8 * rows ? kHalf<S> : kTokens<S>;
}

// Of the rows of the scratch. A power of two would crowd few sets of the cache.
template <typename S>
int64_t stride_of(int64_t tokens) {
  return tokens + kStep<S>;
}

constexpr int64_t kNear = 600 << 10;   // bytes of it that the second-level cache holds, and more beside them
constexpr int64_t kScratch = 1 << 26;  // bytes of all scratch together; one alone may be larger

// Memory that starts at a cache line, for as long as a call takes. (A tensor of its own would cost as much as gathering
// some hundred columns.)
template <typename N>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(static_cast<N*>(::operator new(size * sizeof(N), kLine))) {}
  N* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Delete {
    void operator()(N* data) const { ::operator delete(data, kLine); }
  };
  std::unique_ptr<N, Delete> data_;
};

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

// The columns of one operand that the worklist uses, and how they become rows of S.
template <typename T, typename S>
class Operand {
 public:
  // tokens: of a block.
  Operand(const Tensor& tensor, const Order& order, std::pair<int64_t, int64_t> range, int64_t tokens)
      : order_(order),
        stride_(stride_of<S>(tokens)),
        x_(matrix_of<T>(tensor)),
        begin_(range.first),
        size_(range.second - range.first),
        in_place_(std::is_same_v<T, S> && x_.token_stride == 1 && x_.tokens % kStep<S> == 0),
        columns_(order, begin_, in_place_ ? begin_ : range.second, x_) {}

  // Blocks of columns that a block of tokens has to be gathered from.
  int64_t blocks() const { return in_place_ ? 0 : columns_.blocks(); }
  int64_t size() const { return in_place_ ? 0 : size_; }  // rows that have to be gathered
  int64_t scratch_bytes() const { return size() * stride_ * sizeof(S); }

  // One block of tokens at a time, as rows.
  class Block {
   public:
    explicit Block(const Operand& from) : from_(from), scratch_(from.size() * from.stride_), rows_(from.size_) {
      if constexpr (std::is_same_v<T, S>) {
        if (from_.in_place_) {
          for (int64_t i = 0; i < from_.size_; ++i) {
            // Indices that no entry uses were not checked.
            const int64_t column = std::clamp<int64_t>(from_.order_[from_.begin_ + i], 0, from_.x_.width - 1);
            rows_[i] = from_.x_.data + column * from_.x_.column_stride;
          }
          return;
        }
      }
      for (int64_t i = 0; i < from_.size_; ++i) rows_[i] = scratch_.data() + i * from_.stride_;
    }

    // For the blocks of columns [begin, end).
    void gather_tokens(int64_t begin, int64_t end, int64_t token0, int64_t count) const {
      Matrix<T> x = from_.x_;
      x.data += token0 * x.token_stride;
      x.tokens = count;
      gather(x, from_.columns_, begin, end, scratch_.data(), from_.stride_);
    }

    Rows<S> rows(int64_t token0) const { return {rows_.data(), from_.begin_, from_.in_place_ ? token0 : 0}; }

   private:
    const Operand& from_;
    Scratch<S> scratch_;
    std::vector<const S*> rows_;
  };

 private:
  Order order_;
  int64_t stride_;
  Matrix<T> x_;
  int64_t begin_, size_;
  bool in_place_;
  Columns columns_;
};

// A call's tokens, in blocks; consecutive blocks form shares, each with sums of its own.
template <typename W>
class Shares {
 public:
  // block_tokens: of a block, but the last. accumulate: the first share's sums are added to `out`; it holds all sums
  // after `add_up` of all runs. Entries outside the runs are left alone.
  Shares(W* out, const std::vector<Run>& runs, int64_t tokens, int64_t block_tokens, bool accumulate)
      : tokens_(tokens),
        block_tokens_(block_tokens),
        accumulate_(accumulate),
        out_(out),
        first_(first_of(runs)),
        size_(last_of(runs) - first_),
        others_((count() - 1) * size_) {}

  // One may be empty.
  int64_t blocks() const { return std::max<int64_t>(1, (tokens_ + block_tokens_ - 1) / block_tokens_); }
  int64_t count() const { return std::min(kShares, blocks()); }
  int64_t first_block(int64_t share) const { return share * blocks() / count(); }
  int64_t token0(int64_t block) const { return block * block_tokens_; }
  int64_t tokens(int64_t block) const { return std::min(block_tokens_, tokens_ - token0(block)); }
  int64_t share_of(int64_t block) const { return ((block + 1) * count() - 1) / blocks(); }
  bool adds(int64_t block) const {
    const int64_t share = share_of(block);
    return block > first_block(share) || (accumulate_ && share == 0);
  }
  // By the number of the entry.
  W* sums(int64_t share) const { return share == 0 ? out_ : others_.data() + (share - 1) * size_ - first_; }
  void add_up(const Run& run) const {
    for (int64_t share = 1; share < count(); ++share) {
      const W* from = sums(share);
      for (int64_t e = run.first; e < run.last; ++e) out_[e] += from[e];
    }
  }

 private:
  static int64_t first_of(const std::vector<Run>& runs) {
    int64_t first = runs.empty() ? 0 : runs[0].first;
    for (const Run& run : runs) first = std::min(first, run.first);
    return first;
  }
  static int64_t last_of(const std::vector<Run>& runs) {
    int64_t last = 0;
    for (const Run& run : runs) last = std::max(last, run.last);
    return last;
  }

  static constexpr int64_t kShares = 4;
  int64_t tokens_, block_tokens_;
  bool accumulate_;
  W* out_;
  int64_t first_, size_;  // the entries of all runs lie between
  Scratch<W> others_;
};

// Threads that work on consecutive shares with one scratch.
template <typename T, typename S>
class Team {
 public:
  using W = Wide<T>;

  // The blocks of tokens [begin, end).
  Team(const Worklist& work, const std::vector<Run>& runs, const Operand<T, S>& left, const Operand<T, S>& right,
       const Shares<W>& shares, int64_t begin, int64_t end)
      : work_(work),
        runs_(runs),
        shares_(shares),
        begin_(begin),
        middle_(left.blocks()),
        left_(left),
        right_(right),
        phases_(sizes(end - begin, right.blocks())) {}

  void join() {
    phases_.join([&](int64_t phase, int64_t begin, int64_t end) {
      const int64_t block = begin_ + phase / 2;
      phase % 2 ? multiply(block, begin, end) : gather_tokens(block, begin, end);
    });
  }

 private:
  // Gather, then multiply, for each block.
  std::vector<Phases::Size> sizes(int64_t blocks, int64_t right) const {
    // Some microseconds each; a token's columns are neighbours in memory, the next token's are not.
    const int64_t blocks_at_once = 64, runs_at_once = 4;
    std::vector<Phases::Size> sizes;
    for (int64_t i = 0; i < blocks; ++i) {
      sizes.push_back({middle_ + right, blocks_at_once});
      sizes.push_back({static_cast<int64_t>(runs_.size()), runs_at_once});
    }
    return sizes;
  }

  void gather_tokens(int64_t block, int64_t begin, int64_t end) const {
    const int64_t token0 = shares_.token0(block), count = shares_.tokens(block);
    if (begin < middle_) left_.gather_tokens(begin, std::min(end, middle_), token0, count);
    if (end > middle_) right_.gather_tokens(std::max(begin, middle_) - middle_, end - middle_, token0, count);
  }

  void multiply(int64_t block, int64_t begin, int64_t end) const {
    const int64_t token0 = shares_.token0(block), count = shares_.tokens(block);
    const int64_t padded = (count + kStep<S> - 1) / kStep<S> * kStep<S>;
    const Dots<S, W> dots{left_.rows(token0), right_.rows(token0), padded, shares_.adds(block),
                          shares_.sums(shares_.share_of(block))};
    for (; begin < end; ++begin) dots_of(work_, runs_[begin], dots);
  }

  const Worklist& work_;
  const std::vector<Run>& runs_;
  const Shares<W>& shares_;
  int64_t begin_, middle_;
  typename Operand<T, S>::Block left_, right_;
  Phases phases_;
};

template <typename T, typename S>
void compute(const Worklist& work, const Operand<T, S>& left, const Operand<T, S>& right, int64_t tokens,
             int64_t block_tokens, bool accumulate, Wide<T>* out) {
  std::vector<Run> runs = runs_of(work);
  // A band of tiles reads a few rows and all columns: so many columns at a time that they stay in the second-level
  // cache.
  const int64_t row_bytes = stride_of<S>(block_tokens) * sizeof(S);
  const auto part = [&](const Run& run) { return run.tile->col0 * row_bytes / kNear; };
  std::stable_sort(runs.begin(), runs.end(), [&](const Run& a, const Run& b) { return part(a) < part(b); });
  const Shares<Wide<T>> shares(out, runs, tokens, block_tokens, accumulate);
  const bool threaded = (work.entries + left.size() + right.size()) * tokens > 1 << 18;
  const int64_t threads = threaded ? torch::stable::get_num_threads() : 1;
  const int64_t room = kScratch / std::max<int64_t>(1, left.scratch_bytes() + right.scratch_bytes());
  const int64_t size = std::clamp<int64_t>(room, 1, std::min(threads, shares.count()));
  std::deque<Team<T, S>> teams;
  const auto first_block = [&](int64_t team) { return shares.first_block(team * shares.count() / size); };
  for (int64_t i = 0; i < size; ++i)
    teams.emplace_back(work, runs, left, right, shares, first_block(i), first_block(i + 1));
  const int64_t many = 256;  // runs that are added up at once
  Phases last({{shares.count() > 1 ? static_cast<int64_t>(runs.size()) : 0, many}});
  // Who is done with the own team's work helps the others.
  const auto take_part = [&](int64_t thread) {
    for (int64_t i = 0; i < size; ++i) teams[(thread + i) % size].join();
    last.join([&](int64_t, int64_t begin, int64_t end) {
      for (; begin < end; ++begin) shares.add_up(runs[begin]);
    });
  };
  if (threads == 1) return take_part(0);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) take_part(begin);
  });
}

Worklist worklist_of(const Tensor& grad_out, const Tensor& input, const std::optional<Tensor>& rows,
                     const std::optional<Tensor>& cols, const Tensor& tiles, const Tensor& local,
                     const std::vector<int64_t>& tile) {
  const Worklist work(Order(rows, grad_out.size(1)), Order(cols, input.size(1)), tiles, local, tile);
  work.check_bounds("masked_grad_", {{grad_out.size(1), input.size(1)}}, /*one_shape=*/true);
  return work;
}

// What was checked: the gradient of the worklist's entries, into `out`.
void gradient_into(Tensor& out, const Tensor& grad_out, const Tensor& input, const Worklist& work, bool accumulate) {
  const auto dense = [](const Tensor& x) {
    return x.stride(0) == 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
  };
  const Tensor left = dense(grad_out), right = dense(input);
  const auto with = [&](auto from, auto to) {
    using T = typename decltype(from)::type;
    using S = typename decltype(to)::type;
    const int64_t width = work.width.size, height = work.positions / width;
    const auto rows = used(work, &Tile::row0, height, work.rows), cols = used(work, &Tile::col0, width, work.cols);
    const int64_t block = block_tokens<S>(work.entries, rows.second - rows.first + cols.second - cols.first);
    compute(work, Operand<T, S>(left, work.rows, rows, block), Operand<T, S>(right, work.cols, cols, block),
            grad_out.size(0), block, accumulate, out.mutable_data_ptr<Wide<T>>());
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

void masked_grad_(Tensor out, const Tensor& grad_out, const Tensor& input, std::optional<Tensor> rows,
                  std::optional<Tensor> cols, const Tensor& tiles, const Tensor& local, std::vector<int64_t> tile,
                  bool accumulate) {
  check_masked_grad(out, grad_out, input, rows, cols, tiles, local, tile);
  gradient_into(out, grad_out, input, worklist_of(grad_out, input, rows, cols, tiles, local, tile), accumulate);
}

// A new [count] on the CPU. (`stable::new_empty` looks its operation up by name: a small call takes 1 to 5 % longer.)
Tensor empty_vector(int64_t count, ScalarType dtype) {
  const int64_t stride = 1;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      1, &count, &stride, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Whether the tiles list all entries, one after the other.
bool lists_all(const Worklist& work) {
  int64_t next = 0;
  for (const Tile* tile = work.tiles; tile != work.tiles + work.size; ++tile) {
    if (tile->entry0 != next) return false;
    next = tile->entry1;
  }
  return next == work.entries;
}

// Entries that no tile lists get zero.
Tensor masked_grad(const Tensor& grad_out, const Tensor& input, std::optional<Tensor> rows, std::optional<Tensor> cols,
                   const Tensor& tiles, const Tensor& local, std::vector<int64_t> tile) {
  check_masked_grad_operands(grad_out, input, rows, cols, tiles, local, tile);
  const Worklist work = worklist_of(grad_out, input, rows, cols, tiles, local, tile);
  Tensor out = empty_vector(local.numel(), wide_type(grad_out.scalar_type()));
  if (!lists_all(work)) torch::stable::zero_(out);
  gradient_into(out, grad_out, input, work, /*accumulate=*/false);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparseft_cpu, CPU, m) {
  m.impl("masked_grad_", TORCH_BOX(&masked_grad_));
  m.impl("masked_grad", TORCH_BOX(&masked_grad));
}

}  // namespace sparseft
