// The exact k largest scores of several tensors, as ascending positions: radix selection from the top digit down
// (one histogram pass per digit), then one pass that writes the kept positions in order, with decoupled look-back
// (Merrill & Garland, "Single-pass Parallel Prefix Scan with Decoupled Look-back", 2016).
//
// Counts are integers, so their order of addition does not matter: the result is the same on every run.
#include "common.cuh"

namespace sparseft {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 16;
constexpr int kChunk = kThreads * kPerThread;  // neighbouring elements of one tensor
constexpr int kChunksPerHistogram = 12;        // 49,152 elements: a 16-bit counter cannot overflow
constexpr int kMaxDigit = 15;
static_assert(kChunk * kChunksPerHistogram < 1 << 16, "counters have 16 bits");

// ---- keys: unsigned integers in the order of the scores ------------------------------------------------------------

template <typename To, typename From>
__device__ To bit_copy(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// The bits of |score|, which ascend with it. Halves ranked by |score| keep 15 bits: one digit.
template <typename T, bool kProduct>
struct Key {
  using S = std::conditional_t<kProduct, Wide<T>, T>;
  using Bits = std::conditional_t<sizeof(S) == 8, uint64_t, std::conditional_t<sizeof(S) == 4, uint32_t, uint16_t>>;
  static constexpr int bits = 8 * sizeof(S) - 1;

  __device__ static Bits of(T score, T other) {
    constexpr Bits mask = static_cast<Bits>(~Bits{0}) >> 1;
    if constexpr (kProduct) {
      return bit_copy<Bits>(static_cast<S>(score) * static_cast<S>(other)) & mask;
    } else {
      return bit_copy<Bits>(score) & mask;
    }
  }
};

template <typename T>
struct Segment {  // one score tensor
  const T* scores;
  const T* others;  // null for |score|
  int64_t size;
  int64_t first;  // position of its first element among all
  int64_t chunk;  // number of its first chunk among all
};

// What the passes so far have found: keys whose bits from `shift` on exceed `prefix` are kept, and of those that
// equal it the first `need`.
struct Selection {
  uint64_t prefix;
  int64_t need;
  int shift;
  int done;  // all keys that equal the prefix are needed: lower digits do not matter
};

template <typename T>
__device__ const Segment<T>& segment_of(const Table<Segment<T>>& segments, int64_t chunk) {
  int64_t low = 0, high = segments.count - 1;
  while (low < high) {  // the last one that begins at or before `chunk` (empty tensors have no chunk: skipped)
    const int64_t middle = (low + high + 1) / 2;
    if (segments[middle].chunk <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return segments[low];
}

template <typename T>
constexpr int kWidth = 16 / sizeof(T);

// The keys of up to kWidth<T> neighbours from `at` on; returns how many there are.
template <typename T, bool kProduct>
__device__ int read_keys(const Segment<T>& segment, int64_t at, bool aligned,
                         typename Key<T, kProduct>::Bits (&keys)[kWidth<T>]) {
  using Group = Vec<T, kWidth<T>>;
  const int64_t left = segment.size - at;
  const int count = left < 0 ? 0 : left < kWidth<T> ? static_cast<int>(left) : kWidth<T>;
  Group scores, others;
  if (aligned && count == kWidth<T>) {
    scores = load(reinterpret_cast<const Group*>(segment.scores + at));
    if constexpr (kProduct) others = load(reinterpret_cast<const Group*>(segment.others + at));
  } else {
    for (int i = 0; i < count; ++i) scores.at[i] = segment.scores[at + i];
    if constexpr (kProduct) {
      for (int i = 0; i < count; ++i) others.at[i] = segment.others[at + i];
    }
  }
  for (int i = 0; i < kWidth<T>; ++i) {
    if (i < count) keys[i] = Key<T, kProduct>::of(scores.at[i], kProduct ? others.at[i] : scores.at[i]);
  }
  return count;
}

// ---- threshold -------------------------------------------------------------------------------------------------------

// Counts, for the keys that equal the prefix so far, the digit [shift, shift + digit).
template <typename T, bool kProduct>
__global__ void __launch_bounds__(kThreads, 4)
    count_digit(Table<Segment<T>> segments, bool aligned, int64_t chunks, const Selection* selection, int shift,
                int digit, unsigned long long* bins) {
  if (selection->done) return;
  uint32_t* counters = &shared_memory<uint32_t>();  // two bins a word
  const int words = (1 << digit) / 2;
  for (int i = threadIdx.x; i < words; i += kThreads) counters[i] = 0;
  __syncthreads();

  const uint64_t prefix = selection->prefix;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kChunksPerHistogram;
  for (int64_t chunk = begin; chunk < min(begin + kChunksPerHistogram, chunks); ++chunk) {
    const Segment<T>& segment = segment_of(segments, chunk);
    const int64_t base = (chunk - segment.chunk) * kChunk;
    for (int i = threadIdx.x * kWidth<T>; i < kChunk; i += kThreads * kWidth<T>) {
      typename Key<T, kProduct>::Bits keys[kWidth<T>];
      const int count = read_keys<T, kProduct>(segment, base + i, aligned, keys);
      for (int j = 0; j < count; ++j) {
        const uint64_t upper = static_cast<uint64_t>(keys[j]) >> shift;
        if (upper >> digit != prefix) continue;
        const unsigned bin = static_cast<unsigned>(upper & ((1u << digit) - 1));
        atomicAdd(&counters[bin / 2], bin % 2 ? 1u << 16 : 1u);
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < words; i += kThreads) {
    const uint32_t pair = counters[i];
    if (pair & 0xffff) atomicAdd(&bins[2 * i], static_cast<unsigned long long>(pair & 0xffff));
    if (pair >> 16) atomicAdd(&bins[2 * i + 1], static_cast<unsigned long long>(pair >> 16));
  }
}

struct DigitMemory {
  unsigned long long above[kThreads];
};

// One block: finds the digit at which the count from the top reaches `need`, and clears the bins.
__global__ void __launch_bounds__(kThreads)
    choose_digit(Selection* selection, int shift, int digit, unsigned long long* bins) {
  if (selection->done) return;
  auto& shared = shared_memory<DigitMemory>();
  const int each = ((1 << digit) + kThreads - 1) / kThreads;
  const int high = (1 << digit) - static_cast<int>(threadIdx.x) * each;  // this thread's bins: [high - each, high)
  unsigned long long sum = 0;
  for (int bin = high - 1; bin >= max(high - each, 0); --bin) sum += bins[bin];
  shared.above[threadIdx.x] = sum;
  __syncthreads();
  unsigned long long above = 0;
  for (int i = 0; i < static_cast<int>(threadIdx.x); ++i) above += shared.above[i];
  const auto need = static_cast<unsigned long long>(selection->need);
  const uint64_t prefix = selection->prefix;
  __syncthreads();  // everybody has read the selection
  for (int bin = high - 1; bin >= max(high - each, 0); --bin) {
    const unsigned long long count = bins[bin];
    if (above < need && need <= above + count) {
      *selection = {prefix << digit | static_cast<unsigned>(bin), static_cast<int64_t>(need - above), shift,
                    need - above == count};
    }
    above += count;
    bins[bin] = 0;
  }
}

__global__ void begin_selection(Selection* selection, int64_t k) { *selection = {0, k, 0, 0}; }

// ---- compaction ------------------------------------------------------------------------------------------------------

// A chunk's published count: the top two bits say what the others are.
constexpr uint64_t kOwn = uint64_t{1} << 62;    // the chunk's own count
constexpr uint64_t kTotal = uint64_t{2} << 62;  // the count of all chunks up to and including it
constexpr uint64_t kValue = kOwn - 1;

// The count of all chunks before `chunk`, by one whole warp, 32 chunks a look.
__device__ int64_t look_back(const uint64_t* status, int64_t chunk) {
  const int lane = threadIdx.x % kWarp;
  int64_t sum = 0;
  for (int64_t end = chunk; end > 0; end -= kWarp) {
    const int64_t mine = end - 1 - lane;
    uint64_t word = mine >= 0 ? 0 : kTotal;  // before the first chunk: a total of nothing
    while (word == 0) word = poll(&status[mine]);
    const unsigned totals = __ballot_sync(kWholeWarp, word >= kTotal);
    const int last = totals == 0 ? kWarp - 1 : __ffs(totals) - 1;  // the nearest total ends the walk
    int64_t value = lane <= last ? static_cast<int64_t>(word & kValue) : 0;
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kWholeWarp, value, offset);
    sum += value;
    if (totals != 0) break;
  }
  return sum;
}

struct CompactMemory {
  int64_t chunk;
  unsigned warps[kThreads / kWarp];  // kept | ties << 16, of each warp
  int64_t before[2];
};

template <typename T, bool kProduct>
__global__ void __launch_bounds__(kThreads)
    compact(Table<Segment<T>> segments, bool aligned, const Selection* selection, unsigned long long* ticket,
            uint64_t* status, int64_t chunks, int64_t* out) {
  constexpr int kRounds = kPerThread / kWidth<T>;
  auto& shared = shared_memory<CompactMemory>();
  // Chunks are taken in the order in which blocks start: those before this one are done or running.
  if (threadIdx.x == 0) shared.chunk = static_cast<int64_t>(atomicAdd(ticket, 1ull));
  __syncthreads();
  const int64_t chunk = shared.chunk;
  const Segment<T>& segment = segment_of(segments, chunk);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t base = (chunk - segment.chunk) * kChunk + warp * kWarp * kPerThread;
  const uint64_t prefix = selection->prefix;
  const int shift = selection->shift;

  // Order inside a chunk: warp, round, lane, element.
  unsigned larger[kRounds], tied[kRounds], before[kRounds];  // a bit per element; counts ahead of this lane
  unsigned sum = 0;
  for (int round = 0; round < kRounds; ++round) {
    typename Key<T, kProduct>::Bits keys[kWidth<T>];
    const int count =
        read_keys<T, kProduct>(segment, base + (round * kWarp + lane) * kWidth<T>, aligned, keys);
    larger[round] = tied[round] = 0;
    for (int j = 0; j < count; ++j) {
      const uint64_t upper = static_cast<uint64_t>(keys[j]) >> shift;
      larger[round] |= static_cast<unsigned>(upper > prefix) << j;
      tied[round] |= static_cast<unsigned>(upper == prefix) << j;
    }
    const unsigned mine = __popc(larger[round]) | __popc(tied[round]) << 16;
    unsigned upto = mine;
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const unsigned ahead = __shfl_up_sync(kWholeWarp, upto, offset);
      if (lane >= offset) upto += ahead;
    }
    before[round] = sum + upto - mine;
    sum += __shfl_sync(kWholeWarp, upto, kWarp - 1);
  }
  if (lane == 0) shared.warps[warp] = sum;
  __syncthreads();

  unsigned ahead = 0, all = 0;
  for (int i = 0; i < kThreads / kWarp; ++i) {
    if (i < warp) ahead += shared.warps[i];
    all += shared.warps[i];
  }
  if (warp < 2) {  // one warp for each of the two counts
    const uint64_t own = warp == 0 ? all & 0xffff : all >> 16;
    uint64_t* mine = status + warp * chunks;
    if (lane == 0) publish(&mine[chunk], kOwn | own);
    const int64_t earlier = look_back(mine, chunk);
    if (lane == 0) {
      publish(&mine[chunk], kTotal | (static_cast<uint64_t>(earlier) + own));
      shared.before[warp] = earlier;
    }
  }
  __syncthreads();

  const int64_t need = selection->need;
  for (int round = 0; round < kRounds; ++round) {
    if ((larger[round] | tied[round]) == 0) continue;
    const unsigned counts = ahead + before[round];
    int64_t kept = shared.before[0] + (counts & 0xffff), ties = shared.before[1] + (counts >> 16);
    for (int j = 0; j < kWidth<T>; ++j) {
      const bool is_larger = larger[round] >> j & 1, is_tied = tied[round] >> j & 1;
      if (is_larger || (is_tied && ties < need)) {
        out[kept + min(ties, need)] = segment.first + base + (round * kWarp + lane) * kWidth<T> + j;
      }
      kept += is_larger;
      ties += is_tied;
    }
  }
}

// ---- host ------------------------------------------------------------------------------------------------------------

template <typename T, bool kProduct>
void run(Call& call, const std::vector<Tensor>& scores, const std::vector<Tensor>& others, int64_t k, int64_t* out) {
  std::vector<Segment<T>> segments;
  int64_t positions = 0, chunks = 0;
  bool aligned = true;
  for (size_t i = 0; i < scores.size(); ++i) {
    const int64_t size = scores[i].numel();
    if (size == 0) continue;
    segments.push_back({call.input<T>(scores[i]), kProduct ? call.input<T>(others[i]) : nullptr, size, positions, chunks});
    aligned = aligned && is_aligned(segments.back().scores) && is_aligned(segments.back().others);
    positions += size;
    chunks += (size + kChunk - 1) / kChunk;
  }
  const auto table = make_table(call, segments);

  constexpr int kPasses = (Key<T, kProduct>::bits + kMaxDigit - 1) / kMaxDigit;
  constexpr int kDigit = (Key<T, kProduct>::bits + kPasses - 1) / kPasses;
  auto* selection = call.workspace<Selection>(1);
  auto* bins = call.zeros<unsigned long long>(1 << kDigit);
  call.launch(begin_selection, 1, 1, 0, selection, k);
  const int64_t blocks = (chunks + kChunksPerHistogram - 1) / kChunksPerHistogram;
  for (int shift = Key<T, kProduct>::bits; shift > 0;) {
    const int digit = std::min(kDigit, shift);
    shift -= digit;
    call.launch(count_digit<T, kProduct>, blocks, kThreads, (size_t{1} << digit) * 2, table, aligned, chunks,
                selection, shift, digit, bins);
    call.launch(choose_digit, 1, kThreads, sizeof(DigitMemory), selection, shift, digit, bins);
  }
  auto* status = call.zeros<uint64_t>(2 * chunks);
  auto* ticket = call.zeros<unsigned long long>(1);
  call.launch(compact<T, kProduct>, chunks, kThreads, sizeof(CompactMemory), table, aligned, selection, ticket, status,
              chunks, out);
}

Tensor select_topk_cuda(std::vector<Tensor> scores, std::vector<Tensor> others, int64_t k, std::string score) {
  const bool product = check_select_topk(scores, others, k, score);
  Tensor out = torch::stable::new_empty(scores[0], {k}, ScalarType::Long);
  if (k == 0) return out;
  Call call(scores[0]);
  auto* positions = call.output<int64_t>(out, true);
  visit_float(scores[0].scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (product) return run<T, true>(call, scores, others, k, positions);
    run<T, false>(call, scores, others, k, positions);
  });
  return out;
}

}  // namespace

SPARSEFT_CUDA_OPS(m) { m.impl("select_topk", TORCH_BOX(&select_topk_cuda)); }

}  // namespace sparseft
