// attention_backward: the gradients of scaled dot-product attention at queries, keys and values, computed in fp32 from
// what torch's forward pass keeps. The meaning: sparseft/attention.py.
//
// The algorithm is FlashAttention-2's (Dao, 2023, algorithm 2): probabilities are computed again from the rows' sums of
// exponentials, a block of queries and keys at a time. The queries' blocks stay in a thread's caches while the keys
// pass.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "exponential.h"
#include "narrow.h"
#include "phases.h"

namespace sparseft {
namespace {

constexpr int64_t kBlock = 32;      // queries, and keys, of a block; heads are padded to a multiple of it
constexpr int64_t kLargest = 1024;  // of a head's size

// [batch, heads, tokens, size] anywhere in memory, the last dimension contiguous.
template <typename T>
struct Heads {
  explicit Heads(const Tensor& t)
      : data(t.const_data_ptr<T>()),
        batch(t.stride(0)),
        head(t.stride(1)),
        token(t.stride(2)) {}
  SPARSEFT_INLINE const T* at(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * token; }
  const T* data;
  int64_t batch, head, token;  // strides
};

template <typename T>
struct Operands {
  Heads<T> grad, query, key, value, out;
  const float* logsumexp;  // [batch, heads, queries], of these strides
  int64_t sums[3];
  const bool* mask;  // as logsumexp, and keys; nullptr: no mask
  int64_t allowed[4];
  int64_t batch, heads, key_heads, queries, keys, size;
  bool causal;
  float scale;
};

constexpr int64_t padded(int64_t count) {
  return (count + kBlock - 1) / kBlock * kBlock;
}

// The part of a product that is kept in registers: `rows` times `vectors` of `lanes` numbers.
template <int64_t kLanes, int64_t kVectors, int64_t kRows>
struct Registers {
  static constexpr int64_t lanes = kLanes, vectors = kVectors, rows = kRows;
};

// c [kBlock][cols] += a b, a [kBlock][depth] with any strides, b [depth][cols]; rows of c and b are `ldc`, `ldb` apart.
struct Left {
  const float* data;
  int64_t row, depth;  // strides
};

template <typename Registers>
SPARSEFT_INLINE void multiply_add(float* c, int64_t ldc, Left a, const float* b, int64_t ldb, int64_t cols,
                                  int64_t depth) {
  constexpr int64_t lanes = Registers::lanes, vectors = Registers::vectors, kRows = Registers::rows;
  typedef float Vector __attribute__((vector_size(lanes * sizeof(float)), aligned(sizeof(float)), may_alias));
  for (int64_t n = 0; n < cols; n += lanes * vectors)
    for (int64_t m = 0; m < kBlock; m += kRows) {
      Vector sum[kRows][vectors];
      for (int64_t r = 0; r < kRows; ++r)
        for (int64_t v = 0; v < vectors; ++v)
          sum[r][v] = *reinterpret_cast<const Vector*>(c + (m + r) * ldc + n + v * lanes);
      const float* left = a.data + m * a.row;
      for (int64_t k = 0; k < depth; ++k) {
        const float* right = b + k * ldb + n;
        for (int64_t r = 0; r < kRows; ++r)
          for (int64_t v = 0; v < vectors; ++v)
            sum[r][v] += left[r * a.row + k * a.depth] * *reinterpret_cast<const Vector*>(right + v * lanes);
      }
      for (int64_t r = 0; r < kRows; ++r)
        for (int64_t v = 0; v < vectors; ++v) *reinterpret_cast<Vector*>(c + (m + r) * ldc + n + v * lanes) = sum[r][v];
    }
}

// What a thread needs for a head, in fp32, with zeros beyond its ends (where nothing is ever written but zeros).
struct Scratch {
  Scratch(int64_t queries, int64_t size) {
    const int64_t whole = padded(queries) * size, block = kBlock * size;
    memory.resize(static_cast<size_t>(3 * whole + 5 * block + 2 * kBlock * kBlock + 2 * padded(queries)));
    float* next = memory.data();
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    query = take(whole);
    grad = take(whole);
    grad_query = take(whole);
    key = take(block);
    key_t = take(block);
    value_t = take(block);
    grad_key = take(block);
    grad_value = take(block);
    p = take(kBlock * kBlock);
    ds = take(kBlock * kBlock);
    logsumexp = take(padded(queries));
    along = take(padded(queries));
  }
  std::vector<float> memory;
  float *query, *grad, *grad_query;    // [queries][size]
  float *key, *grad_key, *grad_value;  // [kBlock][size], of the present keys
  float *key_t, *value_t;              // [size][kBlock]
  float *p, *ds;                       // [queries of a block][keys of a block]: probabilities, scores' gradients
  float *logsumexp, *along;            // [queries]; along: gradient and output of a row, multiplied
};

template <typename T>
SPARSEFT_INLINE void widen_row(const T* __restrict from, int64_t count, float* __restrict to) {
  for (int64_t d = 0; d < count; ++d) to[d] = widen(from[d]);
}

template <typename T>
SPARSEFT_INLINE float dot(const float* __restrict a, const T* __restrict b, int64_t count) {
  constexpr int64_t kLanes = 16;
  const int64_t whole = count / kLanes * kLanes;
  float sums[kLanes] = {}, total = 0;
  for (int64_t d = 0; d < whole; d += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) sums[j] += a[d + j] * widen(b[d + j]);
  for (int64_t d = whole; d < count; ++d) total += a[d] * widen(b[d]);
  for (const float sum : sums) total += sum;
  return total;
}

SPARSEFT_INLINE void transpose(const float* __restrict from, int64_t size, float* __restrict to) {
  for (int64_t d = 0; d < size; ++d)
    for (int64_t n = 0; n < kBlock; ++n) to[d * kBlock + n] = from[n * size + d];
}

// A row of scores and of probabilities' gradients becomes one of probabilities and of scores' gradients; of the keys
// only the first `seen` ones are.
SPARSEFT_INLINE void scores_backward(float* __restrict p, float* __restrict ds, float scale, float logsumexp,
                                     float along, int64_t seen) {
  for (int64_t n = 0; n < kBlock; ++n) {
    const float probability = exponential(p[n] * scale - logsumexp);
    ds[n] = probability * (ds[n] - along) * scale;
    p[n] = probability;
  }
  for (int64_t n = seen; n < kBlock; ++n) p[n] = ds[n] = 0.0f;
}

// One head: its gradients at keys and values go to [keys, size], its gradient at queries stays in the scratch.
template <typename R, typename T>
SPARSEFT_INLINE void head_backward(const Operands<T>& o, int64_t b, int64_t h, Scratch& s, float* grad_key,
                                   float* grad_value) {
  const int64_t size = padded(o.size), shared = h / (o.heads / o.key_heads);
  std::fill_n(s.grad_query, o.queries * size, 0.0f);
  for (int64_t i = 0; i < o.queries; ++i) {
    widen_row(o.query.at(b, h, i), o.size, s.query + i * size);
    widen_row(o.grad.at(b, h, i), o.size, s.grad + i * size);
    s.along[i] = dot(s.grad + i * size, o.out.at(b, h, i), o.size);
    s.logsumexp[i] = o.logsumexp[b * o.sums[0] + h * o.sums[1] + i * o.sums[2]];
  }
  for (int64_t j = 0; j < o.keys; j += kBlock) {
    const int64_t keys = std::min(kBlock, o.keys - j);
    float* const value = s.grad_value;  // in its place for a moment
    std::fill(s.key + keys * size, s.key + kBlock * size, 0.0f);
    std::fill(value, value + kBlock * size, 0.0f);
    for (int64_t n = 0; n < keys; ++n) {
      widen_row(o.key.at(b, shared, j + n), o.size, s.key + n * size);
      widen_row(o.value.at(b, shared, j + n), o.size, value + n * size);
    }
    transpose(s.key, size, s.key_t);
    transpose(value, size, s.value_t);
    std::fill_n(s.grad_key, kBlock * size, 0.0f);
    std::fill_n(s.grad_value, kBlock * size, 0.0f);
    for (int64_t i = o.causal ? j : 0; i < o.queries; i += kBlock) {
      const float *query = s.query + i * size, *grad = s.grad + i * size;
      std::fill_n(s.p, kBlock * kBlock, 0.0f);
      std::fill_n(s.ds, kBlock * kBlock, 0.0f);
      multiply_add<R>(s.p, kBlock, {query, size, 1}, s.key_t, kBlock, kBlock, size);
      multiply_add<R>(s.ds, kBlock, {grad, size, 1}, s.value_t, kBlock, kBlock, size);
      for (int64_t m = 0; m < kBlock; ++m) {
        int64_t seen = i + m < o.queries ? keys : 0;
        if (o.causal) seen = std::min(seen, i + m - j + 1);
        float *p = s.p + m * kBlock, *ds = s.ds + m * kBlock;
        scores_backward(p, ds, o.scale, s.logsumexp[i + m], s.along[i + m], seen);
        if (!o.mask) continue;
        const bool* mask = o.mask + b * o.allowed[0] + h * o.allowed[1] + (i + m) * o.allowed[2] + j * o.allowed[3];
        for (int64_t n = 0; n < seen; ++n)
          if (!mask[n * o.allowed[3]]) p[n] = ds[n] = 0.0f;
      }
      multiply_add<R>(s.grad_value, size, {s.p, 1, kBlock}, grad, size, size, kBlock);
      multiply_add<R>(s.grad_key, size, {s.ds, 1, kBlock}, query, size, size, kBlock);
      multiply_add<R>(s.grad_query + i * size, size, {s.ds, kBlock, 1}, s.key, size, size, kBlock);
    }
    for (int64_t n = 0; n < keys; ++n) {
      std::copy_n(s.grad_key + n * size, o.size, grad_key + (j + n) * o.size);
      std::copy_n(s.grad_value + n * size, o.size, grad_value + (j + n) * o.size);
    }
  }
}

// Half of the processor's registers hold sums.
template <typename T>
void head_backward_of(const Operands<T>& o, int64_t b, int64_t h, Scratch& s, float* grad_key, float* grad_value) {
  head_backward<Registers<4, 2, 4>>(o, b, h, s, grad_key, grad_value);
}
#ifdef SPARSEFT_X86
template <typename T>
SPARSEFT_AVX512 void head_backward_avx512(const Operands<T>& o, int64_t b, int64_t h, Scratch& s, float* grad_key,
                                          float* grad_value) {
  head_backward<Registers<16, 2, 8>>(o, b, h, s, grad_key, grad_value);
}
template <typename T>
SPARSEFT_AVX2 void head_backward_avx2(const Operands<T>& o, int64_t b, int64_t h, Scratch& s, float* grad_key,
                                      float* grad_value) {
  head_backward<Registers<8, 2, 4>>(o, b, h, s, grad_key, grad_value);
}
#endif

// Rows [count, size] in fp32 -> rows that are `stride` apart.
template <typename T>
SPARSEFT_CLONES void narrow_rows(const float* __restrict from, int64_t count, int64_t size, int64_t width, T* to,
                                 int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    const float* __restrict row = from + i * width;
    T* __restrict narrowed = to + i * stride;
    for (int64_t d = 0; d < size; ++d) narrow(row[d], narrowed[d]);
  }
}

SPARSEFT_CLONES void add(float* __restrict to, const float* __restrict from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

template <typename T>
void backward(const Operands<T>& o, T* grad_query, T* grad_key, T* grad_value) {
  auto* one_head = head_backward_of<T>;
#ifdef SPARSEFT_X86
  if (has_avx512())
    one_head = head_backward_avx512<T>;
  else if (has_avx2())
    one_head = head_backward_avx2<T>;
#endif
  const int64_t count = o.batch * o.heads, group = o.heads / o.key_heads, of_head = o.keys * o.size;
  const std::unique_ptr<float[]> of_keys(new float[count * of_head]), of_values(new float[count * of_head]);
  const auto head = [&](int64_t item, Scratch& scratch) {
    const int64_t b = item / o.heads, h = item % o.heads;
    one_head(o, b, h, scratch, of_keys.get() + item * of_head, of_values.get() + item * of_head);
    narrow_rows(scratch.grad_query, o.queries, o.size, padded(o.size),
                grad_query + (b * o.queries * o.heads + h) * o.size, o.heads * o.size);
  };
  // The gradient at keys (values) that several heads share is the sum of theirs.
  const auto shared = [&](int64_t item, float* sums, T* grads) {
    const int64_t b = item / o.key_heads, h = item % o.key_heads;
    float* first = sums + item * group * of_head;
    for (int64_t g = 1; g < group; ++g) add(first, first + g * of_head, of_head);
    narrow_rows(first, o.keys, o.size, o.size, grads + (b * o.keys * o.key_heads + h) * o.size, o.key_heads * o.size);
  };
  Phases phases({{count, 1}, {o.batch * o.key_heads, 1}});
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    Scratch scratch(o.queries, padded(o.size));
    phases.join([&](int64_t phase, int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        if (phase == 0) {
          head(item, scratch);
        } else {
          shared(item, of_keys.get(), grad_key);
          shared(item, of_values.get(), grad_value);
        }
      }
    });
  });
}

void check_heads(const char* op, const char* name, const Tensor& tensor, const Tensor& like, int64_t heads,
                 int64_t tokens) {
  check_dtype(op, name, tensor, like.scalar_type());
  check_device(op, name, tensor, like);
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.size(0) == like.size(0) && tensor.size(1) == heads &&
                      tensor.size(2) == tokens && tensor.size(3) == like.size(3),
                  op, ": ", name, " must be [", like.size(0), ", ", heads, ", ", tokens, ", ", like.size(3), "]");
  STD_TORCH_CHECK(tensor.stride(3) == 1, op, ": the last dimension of ", name, " must be contiguous");
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_out, const Tensor& query, const Tensor& key,
                                                      const Tensor& value, const Tensor& out, const Tensor& logsumexp,
                                                      const std::optional<Tensor>& mask, bool causal, double scale) {
  const char* op = "attention_backward";
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4, op, ": query and key must be [batch, heads, tokens, size]");
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2), size = query.size(3);
  const int64_t key_heads = key.size(1), keys = key.size(2);
  STD_TORCH_CHECK(heads >= 1 && key_heads >= 1 && heads % key_heads == 0, op, ": ", heads, " heads cannot share ",
                  key_heads, " heads of keys");
  STD_TORCH_CHECK(1 <= size && size <= kLargest, op, ": heads must have 1 to ", kLargest, " numbers, got ", size);
  STD_TORCH_CHECK(!causal || queries == keys, op, ": causal attention must have as many keys as queries, got ", keys,
                  " and ", queries);
  check_heads(op, "query", query, query, heads, queries);
  check_heads(op, "grad_out", grad_out, query, heads, queries);
  check_heads(op, "out", out, query, heads, queries);
  check_heads(op, "key", key, query, key_heads, keys);
  check_heads(op, "value", value, query, key_heads, keys);
  check_dtype(op, "logsumexp", logsumexp, ScalarType::Float);
  check_device(op, "logsumexp", logsumexp, query);
  STD_TORCH_CHECK(
      logsumexp.dim() == 3 && logsumexp.size(0) == batch && logsumexp.size(1) == heads && logsumexp.size(2) == queries,
      op, ": logsumexp must be [", batch, ", ", heads, ", ", queries, "]");
  if (mask) {
    check_dtype(op, "mask", *mask, ScalarType::Bool);
    check_device(op, "mask", *mask, query);
    STD_TORCH_CHECK(mask->dim() == 4 && mask->size(0) == batch && mask->size(1) == heads && mask->size(2) == queries &&
                        mask->size(3) == keys,
                    op, ": mask must be [", batch, ", ", heads, ", ", queries, ", ", keys, "]");
  }
  Tensor grad_query = torch::stable::new_empty(query, {batch, queries, heads, size});
  Tensor grad_key = torch::stable::new_empty(query, {batch, keys, key_heads, size});
  Tensor grad_value = torch::stable::new_empty(query, {batch, keys, key_heads, size});
  visit_narrow(query.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Operands<T> o{Heads<T>(grad_out),
                  Heads<T>(query),
                  Heads<T>(key),
                  Heads<T>(value),
                  Heads<T>(out),
                  logsumexp.const_data_ptr<float>(),
                  {logsumexp.stride(0), logsumexp.stride(1), logsumexp.stride(2)},
                  mask ? mask->const_data_ptr<bool>() : nullptr,
                  {},
                  batch,
                  heads,
                  key_heads,
                  queries,
                  keys,
                  size,
                  causal,
                  static_cast<float>(scale)};
    if (mask)
      for (int64_t i = 0; i < 4; ++i) o.allowed[i] = mask->stride(i);
    backward(o, grad_query.mutable_data_ptr<T>(), grad_key.mutable_data_ptr<T>(), grad_value.mutable_data_ptr<T>());
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparseft_cpu, m) {
  m.def(
      "attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, "
      "Tensor? mask, bool causal, float scale) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(sparseft_cpu, CPU, m) {
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace sparseft
