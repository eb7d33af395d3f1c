// masked_grad_: the weight gradient of y = x W^T at the selected entries only.
//
// A dot product over T walks a column of grad_out and a column of input, so the needed columns of both are first
// gathered into rows of a scratch buffer, widened to fp32 (fp64) and padded with zeros to whole vectors. Tokens are
// taken kTokens at a time: the scratch of a tile stays in the cache, and its size does not grow with T. An entry's sum
// always has the same order (lanes, then their tree, then the blocks of tokens), whatever the number of threads.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "worklist.h"

namespace sparseft {
namespace {

constexpr int64_t kTokens = 512;
constexpr int64_t kLanes = 16;    // per step of a dot product
constexpr int64_t kTogether = 4;  // dot products at once: independent sums hide the latency of the additions

template <typename W>
struct Lanes {
  typedef W type __attribute__((vector_size(kLanes * sizeof(W)), aligned(sizeof(W)), may_alias));
};

// Columns of a [T, *] operand as the rows of a dense buffer.
template <typename T>
struct Operand {
  const T* data;
  int64_t stride;  // between tokens
  int64_t width;
  Order order;
  int64_t begin, end;  // the part of the order that the worklist uses
  Wide<T>* scratch;    // [end - begin, kTokens]
};

template <typename T>
void gather_columns(const Operand<T>& x, int64_t token0, int64_t tokens, int64_t padded) {
  torch::stable::parallel_for(x.begin, x.end, 64, [&](int64_t begin, int64_t end) {
    for (int64_t t0 = 0; t0 < padded; t0 += kLanes) {
      const int64_t count = std::min(kLanes, tokens - t0);
      const T* block = x.data + (token0 + t0) * x.stride;
      for (int64_t i = begin; i < end; ++i) {
        // Indices that no entry uses were not checked.
        const T* from = block + std::clamp<int64_t>(x.order[i], 0, x.width - 1);
        Wide<T>* to = x.scratch + (i - x.begin) * kTokens + t0;
        if (count == kLanes) {
          for (int64_t t = 0; t < kLanes; ++t) to[t] = static_cast<Wide<T>>(from[t * x.stride]);
        } else {
          for (int64_t t = 0; t < kLanes; ++t)
            to[t] = t < count ? static_cast<Wide<T>>(from[t * x.stride]) : Wide<T>(0);
        }
      }
    }
  });
}

template <typename W>
SPARSEFT_INLINE W sum_of_lanes(typename Lanes<W>::type sum) {
  W lane[kLanes];
  std::memcpy(lane, &sum, sizeof(lane));
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// dots[j] = sum_t rows[j][t] * cols[j][t]
template <typename W>
SPARSEFT_INLINE void dot(const W* const* rows, const W* const* cols, int64_t padded, W* dots) {
  using Vector = typename Lanes<W>::type;
  Vector sums[kTogether] = {};
  for (int64_t t = 0; t < padded; t += kLanes)
    for (int64_t j = 0; j < kTogether; ++j)
      sums[j] += *reinterpret_cast<const Vector*>(rows[j] + t) * *reinterpret_cast<const Vector*>(cols[j] + t);
  for (int64_t j = 0; j < kTogether; ++j) dots[j] = sum_of_lanes<W>(sums[j]);
}

// out[e] (+)= the dot product of entry e, for the entries of a run; rows and cols: the scratch rows of its tile.
template <typename W>
SPARSEFT_CLONES void dots_of_run(const Worklist& work, const Run& run, const W* rows, const W* cols, int64_t padded,
                                 bool add, W* out) {
  for (int64_t e = run.first; e < run.last; e += kTogether) {
    const W *row[kTogether], *col[kTogether];
    for (int64_t j = 0; j < kTogether; ++j) {  // past the end: the last entry again
      const uint32_t position = work.local[std::min(e + j, run.last - 1)];
      const uint32_t r = work.width.quotient(position);
      row[j] = rows + r * kTokens;
      col[j] = cols + (position - r * work.width.size) * kTokens;
    }
    W dots[kTogether];
    dot(row, col, padded, dots);
    const int64_t count = std::min(kTogether, run.last - e);
    for (int64_t j = 0; j < count; ++j) out[e + j] = add ? out[e + j] + dots[j] : dots[j];
  }
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

template <typename T>
Operand<T> operand(const Tensor& tensor, const Order& order, std::pair<int64_t, int64_t> range, Tensor& scratch) {
  const auto [begin, end] = range;
  scratch = torch::stable::new_empty(tensor, {end - begin, kTokens}, wide_type(tensor.scalar_type()));
  return {tensor.const_data_ptr<T>(),         tensor.stride(0), tensor.size(1), order, begin, end,
          scratch.mutable_data_ptr<Wide<T>>()};
}

template <typename T>
void compute(const Worklist& work, const Operand<T>& grad_out, const Operand<T>& input, int64_t tokens, bool accumulate,
             Wide<T>* out) {
  // An empty batch still takes one (empty) block: it sets the entries to zero.
  for (int64_t token0 = 0; token0 == 0 || token0 < tokens; token0 += kTokens) {
    const int64_t count = std::min(kTokens, tokens - token0);
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    gather_columns(grad_out, token0, count, padded);
    gather_columns(input, token0, count, padded);
    const bool add = accumulate || token0 > 0;
    for_each_run(work, std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(padded, 1)), [&](const Run& run) {
      dots_of_run(work, run, grad_out.scratch + (run.tile->row0 - grad_out.begin) * kTokens,
                  input.scratch + (run.tile->col0 - input.begin) * kTokens, padded, add, out);
    });
  }
}

void masked_grad(Tensor out, const Tensor& grad_out, const Tensor& input, std::optional<Tensor> rows,
                 std::optional<Tensor> cols, const Tensor& tiles, const Tensor& local, std::vector<int64_t> tile,
                 bool accumulate) {
  check_masked_grad(out, grad_out, input, rows, cols, tiles, local, tile);
  const Worklist work(Order(rows, grad_out.size(1)), Order(cols, input.size(1)), tiles, local, tile);
  work.check_bounds("masked_grad_", {{grad_out.size(1), input.size(1)}}, /*one_shape=*/true);
  const auto dense = [](const Tensor& x) { return x.stride(1) == 1 ? x : torch::stable::contiguous(x); };
  const Tensor left = dense(grad_out), right = dense(input);
  visit_float(grad_out.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    Tensor scratch[2];
    compute(work, operand<T>(left, work.rows, used(work, &Tile::row0, tile[0], work.rows), scratch[0]),
            operand<T>(right, work.cols, used(work, &Tile::col0, tile[1], work.cols), scratch[1]), grad_out.size(0),
            accumulate, out.mutable_data_ptr<Wide<T>>());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparseft_cpu, CPU, m) {
  m.impl("masked_grad_", TORCH_BOX(&masked_grad));
}

}  // namespace sparseft
