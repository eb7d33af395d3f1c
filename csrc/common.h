// What the operations share on every device: the worklist's layout, dtype visitors, and the checks of shapes, dtypes
// and devices. Nothing here reads tensor memory. The meaning of all arguments: sparseft/reference.py.
//
// Stable ABI: only torch/csrc/stable and torch/headeronly may be included under csrc/ (TORCH_TARGET_VERSION turns
// anything else into an error), so that one library serves every torch >= 2.10.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace sparseft {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- the worklist ------------------------------------------------------------------------------------------------

// One row of `tiles` (int64 [n, 5]).
struct Tile {
  int64_t layer;
  int64_t row0;    // offset into rows
  int64_t col0;    // offset into cols
  int64_t entry0;  // its entries are [entry0, entry1)
  int64_t entry1;
};
static_assert(sizeof(Tile) == 5 * sizeof(int64_t), "Tile mirrors a row of the tensor");

constexpr int64_t kMaxTile = 1 << 16;  // a local position has 16 bits

inline const Tile* tile_data(const Tensor& tiles) {
  return static_cast<const Tile*>(tiles.const_data_ptr());
}

// Local positions are stored as int16, and are to be read as unsigned.
inline const uint16_t* local_data(const Tensor& local) {
  return static_cast<const uint16_t*>(local.const_data_ptr());
}

// How a weight of any rank is seen: 1-D as one row, more dimensions as [-1, last dimension].
struct Shape {
  int64_t rows;
  int64_t cols;
};

inline Shape matrix_shape(const Tensor& weight) {
  Shape shape{1, 1};
  const int64_t last = weight.dim() - 1;
  for (int64_t d = 0; d < last; ++d) shape.rows *= weight.size(d);
  if (last >= 0) shape.cols = weight.size(last);
  return shape;
}

// ---- dtypes ------------------------------------------------------------------------------------------------------

// What sums and optimizer state of a T are kept in.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType wide_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool is_supported(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

template <typename T>
struct Tag {
  using type = T;
};

// visit_float(dtype, [&](auto tag) { using scalar_t = typename decltype(tag)::type; ... });
// A function, not a macro: the commas of a kernel launch cannot break it.
template <typename F>
void visit_float(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(Tag<float>{});
    case ScalarType::Double:
      return f(Tag<double>{});
    case ScalarType::Half:
      return f(Tag<Half>{});
    case ScalarType::BFloat16:
      return f(Tag<BFloat16>{});
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, float16 or bfloat16, got ", dtype);
  }
}

enum class WriteMode { add, copy, swap };

inline WriteMode parse_write_mode(const std::string& name) {
  if (name == "add") return WriteMode::add;
  if (name == "copy") return WriteMode::copy;
  STD_TORCH_CHECK(name == "swap", "scatter_delta_: mode must be add, copy or swap, got ", name);
  return WriteMode::swap;
}

// ---- checks ------------------------------------------------------------------------------------------------------

inline void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(tensor.device() == like.device(), op, ": ", name, " must be on the device of the other tensors");
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " must be ", dtype, ", got ", tensor.scalar_type());
}

// A contiguous vector of `length` elements on the device of `like`.
inline void check_vector(const char* op, const char* name, const Tensor& tensor, ScalarType dtype, int64_t length,
                         const Tensor& like) {
  check_dtype(op, name, tensor, dtype);
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.numel() == length, op, ": ", name, " must be [", length, "], got ",
                  tensor.dim(), "-D with ", tensor.numel(), " elements");
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
  check_device(op, name, tensor, like);
}

inline void check_entries(const char* op, const std::optional<Tensor>& rows, const std::optional<Tensor>& cols,
                          const Tensor& tiles, const Tensor& local, const std::vector<int64_t>& tile,
                          const Tensor& like) {
  if (rows) check_vector(op, "rows", *rows, ScalarType::Int, rows->numel(), like);
  if (cols) check_vector(op, "cols", *cols, ScalarType::Int, cols->numel(), like);
  check_vector(op, "local", local, ScalarType::Short, local.numel(), like);
  check_dtype(op, "tiles", tiles, ScalarType::Long);
  STD_TORCH_CHECK(tiles.dim() == 2 && tiles.size(1) == 5, op, ": tiles must be [n, 5]");
  STD_TORCH_CHECK(tiles.is_contiguous(), op, ": tiles must be contiguous");
  check_device(op, "tiles", tiles, like);
  STD_TORCH_CHECK(tile.size() == 2, op, ": tile must be two sizes, got ", tile.size());
  STD_TORCH_CHECK(
      tile[0] >= 1 && tile[1] >= 1 && tile[0] <= kMaxTile && tile[1] <= kMaxTile && tile[0] * tile[1] <= kMaxTile, op,
      ": tile must be two positive sizes with at most ", kMaxTile, " positions, got ", tile[0], " x ", tile[1]);
}

// Contiguous weights of one dtype on one device; all of them are checked before anything is written.
inline void check_weights(const char* op, const std::vector<Tensor>& weights) {
  STD_TORCH_CHECK(!weights.empty(), op, ": weights must hold at least one tensor");
  const ScalarType dtype = weights[0].scalar_type();
  STD_TORCH_CHECK(is_supported(dtype), op, ": weights must be float32, float64, float16 or bfloat16, got ", dtype);
  for (const Tensor& weight : weights) {
    check_dtype(op, "weights", weight, dtype);
    STD_TORCH_CHECK(weight.is_contiguous(), op, ": weights must be contiguous");
    check_device(op, "weights", weight, weights[0]);
  }
}

inline void check_masked_grad_operands(const Tensor& grad_out, const Tensor& input, const std::optional<Tensor>& rows,
                                       const std::optional<Tensor>& cols, const Tensor& tiles, const Tensor& local,
                                       const std::vector<int64_t>& tile) {
  const char* op = "masked_grad_";
  STD_TORCH_CHECK(grad_out.dim() == 2 && input.dim() == 2, op, ": grad_out and input must be [T, N] and [T, K]");
  STD_TORCH_CHECK(grad_out.size(0) == input.size(0), op, ": grad_out and input must share their first dimension, got ",
                  grad_out.size(0), " and ", input.size(0));
  STD_TORCH_CHECK(is_supported(grad_out.scalar_type()), op,
                  ": grad_out must be float32, float64, float16 or bfloat16, got ", grad_out.scalar_type());
  check_dtype(op, "input", input, grad_out.scalar_type());
  check_device(op, "input", input, grad_out);
  check_entries(op, rows, cols, tiles, local, tile, grad_out);
}

inline void check_masked_grad(const Tensor& out, const Tensor& grad_out, const Tensor& input,
                              const std::optional<Tensor>& rows, const std::optional<Tensor>& cols, const Tensor& tiles,
                              const Tensor& local, const std::vector<int64_t>& tile) {
  check_masked_grad_operands(grad_out, input, rows, cols, tiles, local, tile);
  check_vector("masked_grad_", "out", out, wide_type(grad_out.scalar_type()), local.numel(), grad_out);
}

inline void check_scatter_delta(const std::vector<Tensor>& weights, const Tensor& values, const Tensor& rows,
                                const Tensor& cols, const Tensor& tiles, const Tensor& local,
                                const std::vector<int64_t>& tile, WriteMode mode) {
  const char* op = "scatter_delta_";
  check_weights(op, weights);
  check_entries(op, rows, cols, tiles, local, tile, weights[0]);
  const bool wide = values.scalar_type() == ScalarType::Float && mode != WriteMode::swap;
  check_vector(op, "values", values, wide ? ScalarType::Float : weights[0].scalar_type(), local.numel(), weights[0]);
}

// `lr` may be on the CPU whatever the weights' device.
inline void check_sparse_adamw(const std::vector<Tensor>& weights, const Tensor& values, const Tensor& grad,
                               const Tensor& exp_avg, const Tensor& exp_avg_sq, const std::optional<Tensor>& base,
                               const Tensor& step, const std::optional<Tensor>& born, const Tensor& rows,
                               const Tensor& cols, const Tensor& tiles, const Tensor& local,
                               const std::vector<int64_t>& tile, const Tensor& lr,
                               const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                               std::optional<int64_t> seed) {
  const char* op = "sparse_adamw_";
  check_weights(op, weights);
  const Tensor& like = weights[0];
  check_entries(op, rows, cols, tiles, local, tile, like);
  const ScalarType state = wide_type(like.scalar_type());
  const int64_t k = local.numel();
  STD_TORCH_CHECK(!seed || like.element_size() == 2, op, ": with a seed weights must be float16 or bfloat16, got ",
                  like.scalar_type());
  check_vector(op, "values", values, seed ? like.scalar_type() : state, k, like);
  const std::initializer_list<std::pair<const char*, const Tensor*>> states = {
      {"grad", &grad}, {"exp_avg", &exp_avg}, {"exp_avg_sq", &exp_avg_sq}};
  for (const auto& [name, tensor] : states) check_vector(op, name, *tensor, state, k, like);
  if (base) check_vector(op, "base", *base, like.scalar_type(), k, like);
  if (born) check_vector(op, "born", *born, ScalarType::Int, k, like);
  check_vector(op, "step", step, ScalarType::Long, static_cast<int64_t>(weights.size()), like);
  STD_TORCH_CHECK(lr.numel() == 1 && (lr.is_cpu() || lr.device() == like.device()), op,
                  ": lr must be one number, on the CPU or on the weights' device");
  STD_TORCH_CHECK(lr.scalar_type() == ScalarType::Float || lr.scalar_type() == ScalarType::Double, op,
                  ": lr must be float32 or float64, got ", lr.scalar_type());
  const std::initializer_list<std::pair<const char*, const std::optional<Tensor>*>> scalars = {
      {"grad_scale", &grad_scale}, {"found_inf", &found_inf}};
  for (const auto& [name, tensor] : scalars) {
    if (!*tensor) continue;
    check_dtype(op, name, **tensor, ScalarType::Float);
    STD_TORCH_CHECK((*tensor)->numel() == 1, op, ": ", name, " must be one number");
    check_device(op, name, **tensor, like);
  }
}

// Returns whether the score is |scores * others| (and not |scores|).
inline bool check_select_topk(const std::vector<Tensor>& scores, const std::vector<Tensor>& others, int64_t k,
                              const std::string& score) {
  const char* op = "select_topk";
  STD_TORCH_CHECK(score == "abs" || score == "product", op, ": score must be abs or product, got ", score);
  const bool product = score == "product";
  STD_TORCH_CHECK(!scores.empty(), op, ": scores must hold at least one tensor");
  STD_TORCH_CHECK(others.size() == (product ? scores.size() : 0), op, ": expected ", product ? scores.size() : 0,
                  " others, got ", others.size());
  STD_TORCH_CHECK(is_supported(scores[0].scalar_type()), op,
                  ": scores must be float32, float64, float16 or bfloat16, got ", scores[0].scalar_type());
  int64_t n = 0;
  for (size_t i = 0; i < scores.size(); ++i) {
    n += scores[i].numel();
    for (const Tensor* tensor : {&scores[i], product ? &others[i] : &scores[i]}) {
      check_dtype(op, "scores and others", *tensor, scores[0].scalar_type());
      STD_TORCH_CHECK(tensor->is_contiguous(), op, ": scores and others must be contiguous");
      STD_TORCH_CHECK(tensor->numel() == scores[i].numel(), op, ": others must have the sizes of scores");
      check_device(op, "scores and others", *tensor, scores[0]);
    }
  }
  STD_TORCH_CHECK(k >= 0 && k <= n, op, ": k must lie in [0, ", n, "], got ", k);
  return product;
}

}  // namespace sparseft
