// Runs CUDA kernels on the CPU and checks them (see emulator.h). One source, three builds:
//
//   checked  The kernels are compiled with -fsanitize=thread, but the functions those hooks call are the ones below.
//            A shadow cell for every element of global and shared memory finds races, reads of memory that nobody
//            wrote, writes to inputs, and any access outside the tensors of the call or the block's shared memory.
//   thread   EMULATOR_TSAN: gcc's ThreadSanitizer itself, every fiber one of its threads.
//   address  EMULATOR_ASAN: gcc's AddressSanitizer.
//
// This file is compiled without instrumentation in all three.
#include "emulator.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <cinttypes>
#include <cstdio>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#ifdef EMULATOR_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void __tsan_read_range(void*, unsigned long);
void __tsan_write_range(void*, unsigned long);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#else
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif
#ifdef EMULATOR_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
void __asan_unpoison_memory_region(const void*, size_t);
}
#endif

namespace emulator {
namespace {

#if defined(EMULATOR_TSAN) || defined(EMULATOR_ASAN)
constexpr bool kChecked = false;
#else
constexpr bool kChecked = true;
#endif
constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;
constexpr size_t kSharedGranule = 4;  // bytes of a shadow cell of shared memory; of a tensor: its element
constexpr uintptr_t kSector = 32;     // bytes that global memory moves at once
constexpr uint8_t kPoison = 0xA5;

// While one lives, ThreadSanitizer does not look: the scheduler's own data are no business of the kernels.
struct Quiet {
#ifdef EMULATOR_TSAN
  Quiet() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Quiet() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Quiet() {}
  ~Quiet() {}
#endif
  Quiet(const Quiet&) = delete;
};

struct Options {
  uint64_t seed = 0;
  int resident = 3;      // blocks in flight
  bool sectors = false;  // log global accesses
  std::string removed;   // the place of a barrier or wait that does nothing
  std::string torn;      // the place of an atomic that is none
} options;

std::set<std::tuple<const char*, const char*, int>> places_seen;  // barriers, waits and atomics that ran

// ---- shadow memory -------------------------------------------------------------------------------------------------

struct Moment {         // who touched a cell, and when in that thread's terms
  uint32_t thread = 0;  // 1 + number among all threads of all launches of the call; 0: nobody
  uint32_t block_phase = 0;
  uint32_t warp_phase = 0;
};

struct Cell {
  Moment write, read, other_read;  // `other_read`: the last one by another warp than `read`'s
  uint32_t owner;                  // of shared memory: which block's; another block's cell counts as empty
  bool initialised, atomic, in_flight;
};

// Zero pages on demand: tensors of many GiB cost only what is touched.
class Shadow {
 public:
  Shadow(size_t bytes, size_t granule) : granule(granule), size_((bytes / granule + 2) * sizeof(Cell)) {
    void* at = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    cells_ = static_cast<Cell*>(at);
  }
  ~Shadow() { munmap(cells_, size_); }
  Shadow(const Shadow&) = delete;
  Cell& operator[](size_t offset) { return cells_[offset / granule]; }
  const size_t granule;

 private:
  size_t size_;
  Cell* cells_;
};

struct Traffic {
  uint64_t requests = 0, bytes = 0, sectors = 0;    // per warp instruction, summed
  std::unordered_map<uintptr_t, uint32_t> touched;  // sector -> which of its bytes, over the whole call
};

struct Region {  // a tensor of the call
  uintptr_t begin, end;
  bool writable, initialised;
  std::unique_ptr<Shadow> shadow;
  Traffic reads, writes;
};

struct Range {
  uintptr_t begin = 0, end = 0;
  bool holds(uintptr_t at, size_t bytes) const { return at >= begin && at + bytes <= end; }
};

std::vector<std::unique_ptr<Region>> regions;
Range arguments;           // the kernel's arguments
std::vector<Range> image;  // this library's own segments: constants

// ---- threads -------------------------------------------------------------------------------------------------------

extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.type emulator_switch,@function
emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

struct Stack {
  char* low = nullptr;
  void* tsan = nullptr;
};

struct Block;

struct Copy {  // a cp.async under way
  char* to;
  const char* from;
  size_t bytes;  // of 16; the rest are zeros
  const void* site;
};

struct Thread {
  Block* block;
  unsigned index;
  uint32_t number;  // 1-based, unique in the call
  uint32_t warp_phase = 0;
  void* stack_pointer = nullptr;
  Stack stack;
  void* fake_stack = nullptr;
  const char* waits_in = nullptr;
  Place waits_at{};
  std::unordered_map<const void*, uint32_t> executed;  // how often it passed each instruction (sector log)
  std::vector<std::vector<Copy>> copies;               // committed groups, oldest first
  std::vector<Copy> open;                              // not yet committed
};

struct Slots {
  unsigned char lane[kWarp][96];
};

struct Warp {
  int arrived = 0;
  const char* what = nullptr;
  Place place{};
  Slots slots[2];  // alternating: nobody overwrites what a slower lane still reads
  int turn = 0;
  std::vector<Thread*> waiting;
  std::map<std::pair<const void*, uint32_t>, std::vector<std::pair<uintptr_t, size_t>>> log[2];  // [is write]
};

struct Block {
  unsigned index;
  uint32_t number;  // unique for ever
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int alive = 0;
  uint32_t phase = 0;
  std::vector<Thread*> waiting;
  Place place{};
  int holds = 0, held = 0;
  char* shared = nullptr;
  std::unique_ptr<Shadow> shadow;
  char barrier_token = 0;
};

struct Machine {
  Thread* current = nullptr;
  void* stack_pointer = nullptr;
  void* tsan = nullptr;
  void* fake_stack = nullptr;
  const void* stack_low = nullptr;
  size_t stack_size = 0;
  std::mt19937_64 random;
  std::vector<Thread*> runnable;
  std::vector<Stack> stacks;
  std::vector<std::unique_ptr<Shadow>> shadows;  // of shared memory, for the next blocks of this launch
  uint32_t started = 0;                          // blocks, ever
  void (*run)(const void*) = nullptr;
  size_t shared = 0;
  unsigned threads = 0;
  uint32_t launched = 0;  // threads of earlier launches of the call
  int64_t blocks = 0;
  std::string error;
  char begun = 0, ended = 0;  // order a launch after what the host did before, and before what it does next
} machine;

std::string name(Place place) {
  const char* slash = strrchr(place.file, '/');
  return std::string(slash ? slash + 1 : place.file) + ":" + std::to_string(place.line);
}

// "file:line" of an instruction, by the addr2line program; of a function inlined from emulator.h, where it was called.
std::string source_of(const void* site) {
  Dl_info info{};
  if (!dladdr(site, &info)) return "unknown source";
  char command[512], line[512] = "";
  const auto offset = reinterpret_cast<uintptr_t>(site) - reinterpret_cast<uintptr_t>(info.dli_fbase) - 1;
  snprintf(command, sizeof(command), "addr2line -s -i -e %s 0x%" PRIxPTR, info.dli_fname, offset);
  if (FILE* pipe = popen(command, "r")) {
    while (fgets(line, sizeof(line), pipe) && strncmp(line, "emulator.h", 10) == 0) continue;
    pclose(pipe);
  }
  line[strcspn(line, " \n")] = 0;
  return line;
}

void to_scheduler(bool finished = false) {
  Thread* self = machine.current;
#ifdef EMULATOR_ASAN
  __sanitizer_start_switch_fiber(finished ? nullptr : &self->fake_stack, machine.stack_low, machine.stack_size);
#endif
#ifdef EMULATOR_TSAN
  __tsan_switch_to_fiber(machine.tsan, 1);
#endif
  emulator_switch(&self->stack_pointer, machine.stack_pointer);
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
  (void)finished;
}

void yield() {
  Quiet quiet;
  machine.runnable.push_back(machine.current);
  to_scheduler();
}

void wait(const char* what, Place place) {
  machine.current->waits_in = what;
  machine.current->waits_at = place;
  to_scheduler();
}

// Ends the launch: the thread is never resumed.
[[noreturn]] void fail(const std::string& message) {
  if (machine.error.empty()) {
    const Thread* self = machine.current;
    machine.error =
        message + " (block " + std::to_string(self->block->index) + ", thread " + std::to_string(self->index) + ")";
  }
  for (;;) to_scheduler();
}

void finish() {
  Quiet quiet;
  Thread* self = machine.current;
  Block* block = self->block;
  self->copies.push_back(self->open);
  for (const auto& group : self->copies) {
    if (!group.empty()) fail("exit with copies still under way");
  }
  --block->alive;
  if (!block->waiting.empty()) fail("exit while others of the block wait at the barrier " + name(block->place));
}

void enter() {
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &machine.stack_low, &machine.stack_size);
#endif
  __tsan_acquire(&machine.begun);
  machine.run(reinterpret_cast<const void*>(arguments.begin));
  __tsan_release(&machine.ended);
  finish();
  for (;;) to_scheduler(true);
}
void resume(Thread* thread) {
  machine.current = thread;
  thread->waits_in = nullptr;
#ifdef EMULATOR_TSAN
  __tsan_switch_to_fiber(thread->stack.tsan, 1);
#endif
#ifdef EMULATOR_ASAN
  __sanitizer_start_switch_fiber(&machine.fake_stack, thread->stack.low, kStack);
#endif
  emulator_switch(&machine.stack_pointer, thread->stack_pointer);
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(machine.fake_stack, nullptr, nullptr);
#endif
  machine.current = nullptr;
}

Stack take_stack() {
  if (!machine.stacks.empty()) {
    const Stack stack = machine.stacks.back();
    machine.stacks.pop_back();
#ifdef EMULATOR_ASAN
    __asan_unpoison_memory_region(stack.low, kStack);
#endif
    return stack;
  }
  void* low = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (low == MAP_FAILED) throw std::bad_alloc();
  Stack stack{static_cast<char*>(low)};
#ifdef EMULATOR_TSAN
  stack.tsan = __tsan_create_fiber(0);
#endif
  return stack;
}

std::unique_ptr<Block> make_block(unsigned index) {
  auto block = std::make_unique<Block>();
  block->index = index;
  block->number = ++machine.started;
  block->threads.resize(machine.threads);
  block->warps.resize((machine.threads + kWarp - 1) / kWarp);
  block->alive = static_cast<int>(machine.threads);
  block->shared = new char[machine.shared];
  memset(block->shared, kPoison, machine.shared);
  if (kChecked && machine.shadows.empty()) {
    machine.shadows.push_back(std::make_unique<Shadow>(machine.shared, kSharedGranule));
  }
  if (kChecked) {
    block->shadow = std::move(machine.shadows.back());
    machine.shadows.pop_back();
  }
  for (unsigned i = 0; i < machine.threads; ++i) {
    Thread& thread = block->threads[i];
    thread.block = block.get();
    thread.index = i;
    thread.number = machine.launched + index * machine.threads + i + 1;
    thread.stack = take_stack();
    void** top = reinterpret_cast<void**>(thread.stack.low + kStack);
    *--top = nullptr;  // keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(enter);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    thread.stack_pointer = top;
    machine.runnable.push_back(&thread);
  }
  return block;
}

Region* region_at(uintptr_t at, size_t bytes) {
  static size_t last = 0;  // accesses come in runs
  if (last < regions.size() && at >= regions[last]->begin && at + bytes <= regions[last]->end)
    return regions[last].get();
  for (size_t i = 0; i < regions.size(); ++i) {
    if (at >= regions[i]->begin && at + bytes <= regions[i]->end) {
      last = i;
      return regions[i].get();
    }
  }
  return nullptr;
}

void flush_log(Block& block) {
  for (Warp& warp : block.warps) {
    for (int is_write : {0, 1}) {
      for (const auto& [instruction, accesses] : warp.log[is_write]) {
        std::unordered_map<uintptr_t, uint32_t> sectors;
        for (const auto& [at, bytes] : accesses) {
          for (uintptr_t byte = at; byte < at + bytes; ++byte) sectors[byte / kSector] |= 1u << byte % kSector;
        }
        Region* region = region_at(accesses[0].first, accesses[0].second);
        Traffic& traffic = is_write ? region->writes : region->reads;
        traffic.requests += 1;
        traffic.sectors += sectors.size();
        for (const auto& [sector, mask] : sectors) {
          traffic.bytes += __builtin_popcount(mask);
          traffic.touched[sector] |= mask;
        }
      }
      warp.log[is_write].clear();
    }
  }
}

void free_block(Block& block) {
  flush_log(block);
  for (Thread& thread : block.threads) machine.stacks.push_back(thread.stack);
  if (block.shadow) machine.shadows.push_back(std::move(block.shadow));
  delete[] block.shared;
}

std::string deadlock(const std::vector<std::unique_ptr<Block>>& live) {
  std::string message = "deadlock:";
  int named = 0;
  for (const auto& block : live) {
    for (const Thread& thread : block->threads) {
      if (thread.waits_in == nullptr || named++ >= 3) continue;
      message += " block " + std::to_string(block->index) + " thread " + std::to_string(thread.index) + " waits in " +
                 thread.waits_in + " " + name(thread.waits_at) + ";";
    }
  }
  return message;
}

// ---- checks --------------------------------------------------------------------------------------------------------

bool ordered(const Moment& past, const Thread& now) {
  if (past.thread == 0 || past.thread == now.number) return true;
  if (past.thread <= machine.launched) return true;  // an earlier launch
  const uint32_t first = machine.launched + now.block->index * machine.threads;
  if (past.thread <= first || past.thread > first + machine.threads) return false;  // another block
  if (past.block_phase < now.block->phase) return true;
  const bool same_warp = (past.thread - first - 1) / kWarp == now.index / kWarp;
  return same_warp && past.warp_phase < now.warp_phase;
}

enum class Kind { read, write, atomic };

std::string describe(Kind kind, size_t bytes, const void* site) {
  const char* verb = kind == Kind::read ? "read" : kind == Kind::write ? "write" : "atomic access";
  return std::string(verb) + " of " + std::to_string(bytes) + " bytes at " + source_of(site);
}

void check_cell(Cell& cell, Kind kind, size_t bytes, const void* site, const char* where) {
  const Thread& self = *machine.current;
  if (cell.in_flight)
    fail(std::string(where) + ": " + describe(kind, bytes, site) + " while a copy to it is under way");
  if (kind != Kind::write && !cell.initialised) {
    fail(std::string(where) + ": " + describe(kind, bytes, site) + " of memory that was never written");
  }
  const bool both_atomic = kind == Kind::atomic && cell.atomic;
  if (!both_atomic && !ordered(cell.write, self)) {
    fail(std::string(where) + ": race: " + describe(kind, bytes, site) + " after an unordered write by another thread");
  }
  if (kind != Kind::read && (!ordered(cell.read, self) || !ordered(cell.other_read, self))) {
    fail(std::string(where) + ": race: " + describe(kind, bytes, site) + " after an unordered read by another thread");
  }
  const Moment now{self.number, self.block->phase, self.warp_phase};
  if (kind == Kind::read) {
    if (cell.read.thread != 0 && (cell.read.thread - 1) / kWarp != (self.number - 1) / kWarp)
      cell.other_read = cell.read;
    cell.read = now;
  } else {
    cell.write = now;
    cell.atomic = kind == Kind::atomic;
    cell.initialised = true;
  }
}

Cell& shared_cell(Block& block, size_t offset) {
  Cell& cell = (*block.shadow)[offset];
  if (cell.owner != block.number) {
    cell = {};
    cell.owner = block.number;
  }
  return cell;
}

bool is_constant(uintptr_t at, size_t bytes) {
  if (arguments.holds(at, bytes)) return true;
  for (const Range& segment : image) {
    if (segment.holds(at, bytes)) return true;
  }
  return false;
}

bool on_own_stack(uintptr_t at) {
  return at - reinterpret_cast<uintptr_t>(machine.current->stack.low) < kStack;
}

void check_access(const void* pointer, size_t bytes, Kind kind, const void* site) {
  Thread* self = machine.current;
  const auto at = reinterpret_cast<uintptr_t>(pointer);
#ifdef EMULATOR_TSAN  // what the kernels do through functions of this file
  if (kind == Kind::read) __tsan_read_range(const_cast<void*>(pointer), bytes);
  if (kind == Kind::write) __tsan_write_range(const_cast<void*>(pointer), bytes);
#endif
  if (!kChecked || self == nullptr || on_own_stack(at)) return;
  Block& block = *self->block;
  const uintptr_t offset = at - reinterpret_cast<uintptr_t>(block.shared);
  if (offset < machine.shared && offset + bytes <= machine.shared) {
    const size_t first = offset / kSharedGranule * kSharedGranule;
    for (size_t i = first; i < offset + bytes; i += kSharedGranule) {
      check_cell(shared_cell(block, i), kind, bytes, site, "shared memory");
    }
    return;
  }
  Region* region = region_at(at, bytes);
  if (region == nullptr) {
    if (kind == Kind::read && is_constant(at, bytes)) return;
    fail("out of bounds: " + describe(kind, bytes, site));
  }
  if (kind != Kind::read && !region->writable) fail("input: " + describe(kind, bytes, site));
  for (size_t i = 0; i < bytes; i += region->shadow->granule) {
    Cell& cell = (*region->shadow)[at - region->begin + i];
    cell.initialised = cell.initialised || region->initialised;
    check_cell(cell, kind, bytes, site, "global memory");
  }
  if (options.sectors && kind != Kind::atomic) {
    for (size_t i = 0; i < bytes; i += 16) {  // a thread moves at most 16 bytes at once
      const uint32_t count = self->executed[site]++;
      block.warps[self->index / kWarp].log[kind == Kind::write][{site, count}].push_back(
          {at + i, std::min<size_t>(bytes - i, 16)});
    }
  }
}

void mark_in_flight(const void* pointer, bool in_flight) {
  Block& block = *machine.current->block;
  if (!block.shadow) return;
  const size_t offset = static_cast<size_t>(static_cast<const char*>(pointer) - block.shared);
  if (offset >= machine.shared) fail("copy to memory that is not shared");
  for (size_t i = 0; i < 16; i += kSharedGranule) shared_cell(block, offset + i).in_flight = in_flight;
}

// All lanes of a warp meet here, each with a deposit; returns everybody's.
const Slots& meet(unsigned mask, const void* deposit, size_t bytes, const char* what, Place place) {
  Quiet quiet;
  Thread* self = machine.current;
  Warp& warp = self->block->warps[self->index / kWarp];
  const int lanes =
      std::min<int>(kWarp, static_cast<int>(machine.threads) - static_cast<int>(self->index / kWarp * kWarp));
  if (mask != ~0u || lanes != kWarp) fail(std::string(what) + " at " + name(place) + " needs whole warps here");
  if (warp.arrived == 0) {
    warp.what = what;
    warp.place = place;
  } else if (warp.what != what || !(warp.place == place)) {
    fail("lanes of one warp meet in " + std::string(what) + " at " + name(place) + " and in " + warp.what + " at " +
         name(warp.place));
  }
  Slots& slots = warp.slots[warp.turn];
  memcpy(slots.lane[self->index % kWarp], deposit, bytes);
  __tsan_release(&warp);
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    warp.turn ^= 1;
    machine.runnable.insert(machine.runnable.end(), warp.waiting.begin(), warp.waiting.end());
    warp.waiting.clear();
    yield();
  } else {
    warp.waiting.push_back(self);
    wait(what, place);
  }
  __tsan_acquire(&warp);
  return slots;
}

bool is_removed(const char* what, Place place) {
  Quiet quiet;
  places_seen.insert({what, place.file, place.line});
  return !options.removed.empty() && name(place) == options.removed;
}

bool is_torn(Place place) {
  Quiet quiet;
  places_seen.insert({"atomic", place.file, place.line});
  return !options.torn.empty() && name(place) == options.torn;
}

template <typename T, typename F>
T atomically(T* at, Place place, const void* site, const F& change) {
  const bool torn = is_torn(place);
  check_access(at, sizeof(T), torn ? Kind::read : Kind::atomic, site);
  if (torn) {
    const T before = *at;
    yield();
    check_access(at, sizeof(T), Kind::write, site);
    *at = change(before);
    return before;
  }
  __tsan_acquire(at);
  const T before = *at;
  *at = change(before);
  __tsan_release(at);
  if (machine.random() % 4 == 0) yield();
  return before;
}

int note_segment(dl_phdr_info* info, size_t, void* self) {
  bool mine = false;
  std::vector<Range> found;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
    found.push_back({begin, begin + header.p_memsz});
    mine = mine || found.back().holds(reinterpret_cast<uintptr_t>(self), 1);
  }
  if (mine) image = found;
  return mine;
}

}  // namespace

// ---- emulator.h
// ------------------------------------------------------------------------------------------------------

Index thread_index() {
  return {machine.current->index};
}
Index block_index() {
  return {machine.current->block->index};
}
Index block_size() {
  return {machine.threads, 1, 1};
}

void begin_call() {
  Quiet quiet;
  regions.clear();
  machine.launched = 0;
}

void allow_memory(const void* begin, size_t bytes, size_t element, bool writable, bool initialised) {
  Quiet quiet;
  if (bytes == 0) return;
  const auto at = reinterpret_cast<uintptr_t>(begin);
  for (auto& region : regions) {
    if (region->begin == at && region->end == at + bytes) {  // one tensor in two roles
      region->writable = region->writable || writable;
      return;
    }
  }
  regions.push_back(std::make_unique<Region>(Region{at, at + bytes, writable, initialised}));
  regions.back()->shadow = std::make_unique<Shadow>(bytes, element);
}

void launch_kernel(int64_t blocks, int threads, size_t shared, void (*run)(const void*), const void* argument,
                   size_t argument_bytes) {
  Quiet quiet;
  if (image.empty()) dl_iterate_phdr(note_segment, reinterpret_cast<void*>(&note_segment));
  const auto at = reinterpret_cast<uintptr_t>(argument);
  arguments = {at, at + argument_bytes};
  machine.run = run;
  machine.threads = static_cast<unsigned>(threads);
  machine.shared = shared;
  machine.random.seed(options.seed);
  machine.runnable.clear();
  machine.error.clear();
#ifdef EMULATOR_TSAN
  machine.tsan = __tsan_get_current_fiber();
#endif
  __tsan_release(&machine.begun);
  std::vector<unsigned> order(static_cast<size_t>(blocks));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<unsigned>(i);
  std::shuffle(order.begin(), order.end(), machine.random);

  std::vector<std::unique_ptr<Block>> live;
  while (machine.error.empty() && (!order.empty() || !live.empty())) {
    while (!order.empty() && static_cast<int>(live.size()) < options.resident) {
      live.push_back(make_block(order.back()));
      order.pop_back();
    }
    bool finished = false;
    while (!machine.runnable.empty() && machine.error.empty() && !finished) {
      auto& picked = machine.runnable[machine.random() % machine.runnable.size()];
      Thread* thread = picked;
      picked = machine.runnable.back();
      machine.runnable.pop_back();
      resume(thread);
      finished = thread->block->alive == 0;
    }
    for (size_t i = 0; i < live.size();) {
      if (live[i]->alive > 0) {
        ++i;
        continue;
      }
      free_block(*live[i]);
      live.erase(live.begin() + static_cast<long>(i));
      finished = true;
    }
    if (!finished && machine.error.empty()) machine.error = deadlock(live);
  }
  for (auto& block : live) free_block(*block);
  __tsan_acquire(&machine.ended);
  machine.shadows.clear();
  machine.launched += static_cast<uint32_t>(blocks) * machine.threads;
  if (!machine.error.empty()) throw std::runtime_error("emulator: " + machine.error);
}

void* shared_bytes(size_t bytes) {
  if (bytes > machine.shared) fail("the kernel uses more shared memory than its launch gave");
  return machine.current->block->shared;
}

void read(void* to, const void* from, size_t bytes, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(from) % alignment != 0)
    fail("misaligned vector load at " + source_of(__builtin_return_address(0)));
  check_access(from, bytes, Kind::read, __builtin_return_address(0));
  Quiet quiet;
  memcpy(to, from, bytes);
}

void write(void* to, const void* from, size_t bytes, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(to) % alignment != 0)
    fail("misaligned vector store at " + source_of(__builtin_return_address(0)));
  check_access(to, bytes, Kind::write, __builtin_return_address(0));
  Quiet quiet;
  memcpy(to, from, bytes);
}

int barrier(bool predicate, Place place) {
  Quiet quiet;
  Thread* self = machine.current;
  Block& block = *self->block;
  if (is_removed("barrier", place)) return predicate;
  if (block.alive != static_cast<int>(block.threads.size()))
    fail("barrier " + name(place) + " after a thread has exited");
  if (block.waiting.empty()) {
    block.place = place;
    block.holds = 0;
  } else if (!(block.place == place)) {
    fail("threads wait at different barriers: " + name(block.place) + " and " + name(place));
  }
  block.holds += predicate;
  block.waiting.push_back(self);
  __tsan_release(&block.barrier_token);
  if (static_cast<int>(block.waiting.size()) == block.alive) {
    ++block.phase;
    block.held = block.holds;
    for (Thread* thread : block.waiting) {
      if (thread != self) machine.runnable.push_back(thread);
    }
    block.waiting.clear();
    yield();
  } else {
    wait("__syncthreads", place);
  }
  __tsan_acquire(&block.barrier_token);
  return block.held;
}

void warp_barrier(unsigned mask, Place place) {
  if (is_removed("warp barrier", place)) return;
  meet(mask, "", 1, "__syncwarp", place);
  ++machine.current->warp_phase;
}

unsigned ballot(unsigned mask, bool predicate, Place place) {
  const Slots& slots = meet(mask, &predicate, sizeof(predicate), "a vote", place);
  unsigned votes = 0;
  for (int lane = 0; lane < kWarp; ++lane) votes |= static_cast<unsigned>(slots.lane[lane][0] != 0) << lane;
  return votes;
}

void shuffle(unsigned mask, const void* mine, void* other, size_t bytes, int source, Place place) {
  const Slots& slots = meet(mask, mine, bytes, "a shuffle", place);
  Quiet quiet;
  memcpy(other, slots.lane[source], bytes);
}

uint32_t atomic_add(uint32_t* to, uint32_t value, Place place) {
  return atomically(to, place, __builtin_return_address(0), [=](uint32_t now) { return now + value; });
}
unsigned long long atomic_add(unsigned long long* to, unsigned long long value, Place place) {
  return atomically(to, place, __builtin_return_address(0), [=](unsigned long long now) { return now + value; });
}
uint32_t atomic_or(uint32_t* to, uint32_t value, Place place) {
  return atomically(to, place, __builtin_return_address(0), [=](uint32_t now) { return now | value; });
}
uint64_t atomic_load(const uint64_t* from, Place place) {
  (void)place;
  check_access(from, sizeof(*from), Kind::atomic, __builtin_return_address(0));
  yield();  // a waiting thread lets the others go on
  return *from;
}
void atomic_store(uint64_t* to, uint64_t value, Place place) {
  (void)place;
  check_access(to, sizeof(*to), Kind::atomic, __builtin_return_address(0));
  *to = value;
  yield();
}

// ---- copies in the background --------------------------------------------------------------------------------------

// The bytes arrive when the thread waits for them. Until then the target counts as in flight: whoever touches it fails,
// which stands for all the moments at which they could have arrived.
void copy_async(void* to, const void* from, int bytes) {
  const void* site = __builtin_return_address(0);
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || (bytes > 0 && reinterpret_cast<uintptr_t>(from) % 16 != 0)) {
    fail("misaligned copy at " + source_of(site));
  }
  if (bytes < 0 || bytes > 16) fail("copy of " + std::to_string(bytes) + " bytes at " + source_of(site));
  if (bytes > 0) check_access(from, static_cast<size_t>(bytes), Kind::read, site);
  check_access(to, 16, Kind::write, site);
  Quiet quiet;
  mark_in_flight(to, true);
  machine.current->open.push_back(
      {static_cast<char*>(to), static_cast<const char*>(from), static_cast<size_t>(bytes), site});
}

void commit_copies() {
  Quiet quiet;
  Thread* self = machine.current;
  self->copies.push_back(std::move(self->open));
  self->open.clear();
}

void wait_for_copies(int newest, Place place) {
  if (is_removed("wait", place)) return;
  auto& groups = machine.current->copies;
  while (groups.size() > static_cast<size_t>(newest)) {
    for (const Copy& copy : groups.front()) {
      mark_in_flight(copy.to, false);
      check_access(copy.to, 16, Kind::write, copy.site);
      Quiet quiet;
      memset(copy.to, 0, 16);
      memcpy(copy.to, copy.from, copy.bytes);
    }
    Quiet quiet;
    groups.erase(groups.begin());
  }
}

// ---- tensor cores, after the definitions in the PTX manual --------------------------------------------------------

void load_matrices(uint32_t (&to)[4], const void* row, bool transposed, Place place) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("misaligned matrix row at " + name(place));
  check_access(row, 16, Kind::read, __builtin_return_address(0));
  const Slots& slots = meet(~0u, row, 16, "ldmatrix", place);
  Quiet quiet;
  const unsigned lane = machine.current->index % kWarp;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    for (unsigned half = 0; half < 2; ++half) {
      const unsigned along = lane % 4 * 2 + half, across = lane / 4;
      const unsigned line = transposed ? along : across, element = transposed ? across : along;
      memcpy(reinterpret_cast<char*>(&to[matrix]) + 2 * half, slots.lane[matrix * 8 + line] + 2 * element, 2);
    }
  }
}

void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float (*value)(uint16_t),
                  Place place) {
  float mine[12];  // the elements in this lane's registers
  for (unsigned i = 0; i < 12; ++i)
    mine[i] = value(static_cast<uint16_t>((i < 8 ? a[i / 2] : b[i / 2 - 4]) >> i % 2 * 16));
  const Slots& slots = meet(~0u, mine, sizeof(mine), "mma", place);
  Quiet quiet;
  const unsigned lane = machine.current->index % kWarp;
  const auto element = [&](unsigned holder, unsigned index) {
    float there;
    memcpy(&there, slots.lane[holder] + sizeof(float) * index, sizeof(float));
    return static_cast<double>(there);
  };
  for (unsigned j = 0; j < 4; ++j) {
    const unsigned row = lane / 4 + j / 2 * 8, col = lane % 4 * 2 + j % 2;
    double sum = c[j];
    for (unsigned k = 0; k < 16; ++k) {
      const double left = element(row % 8 * 4 + k % 8 / 2, row / 8 * 2 + k / 8 * 4 + k % 2);
      const double right = element(col * 4 + k % 8 / 2, 8 + k / 8 * 2 + k % 2);
      sum += left * right;
    }
    c[j] = static_cast<float>(sum);
  }
}

// ---- for the tests, through ctypes -------------------------------------------------------------------------------

extern "C" {

#define EXPORT __attribute__((visibility("default")))

EXPORT void emulator_configure(uint64_t seed, int resident, bool sectors, const char* removed, const char* torn) {
  options = {seed, resident, sectors, removed, torn};
}

// Barriers, waits and atomics that have run so far, one a line.
EXPORT const char* emulator_places() {
  static std::string text;
  text.clear();
  for (const auto& [what, file, line] : places_seen) text += std::string(what) + " " + name({file, line}) + "\n";
  return text.c_str();
}

// Of the last call, a line a tensor: address, then for reads and for writes: warp instructions, bytes they asked for,
// sectors they moved, and over the whole call distinct bytes and distinct sectors.
EXPORT const char* emulator_traffic() {
  static std::string text;
  text.clear();
  for (const auto& region : regions) {
    text += std::to_string(region->begin);
    for (const Traffic* traffic : {&region->reads, &region->writes}) {
      uint64_t distinct = 0;
      for (const auto& [sector, mask] : traffic->touched) distinct += static_cast<unsigned>(__builtin_popcount(mask));
      for (uint64_t figure : {traffic->requests, traffic->bytes, traffic->sectors, distinct,
                              static_cast<uint64_t>(traffic->touched.size())}) {
        text += " " + std::to_string(figure);
      }
    }
    text += "\n";
  }
  return text.c_str();
}

// ---- the hooks that -fsanitize=thread calls ------------------------------------------------------------------------

#if !defined(EMULATOR_TSAN) && !defined(EMULATOR_ASAN)
#define HOOK __attribute__((visibility("hidden")))
#define HOOKS(bytes)                                                   \
  HOOK void __tsan_read##bytes(void* at) {                             \
    check_access(at, bytes, Kind::read, __builtin_return_address(0));  \
  }                                                                    \
  HOOK void __tsan_write##bytes(void* at) {                            \
    check_access(at, bytes, Kind::write, __builtin_return_address(0)); \
  }                                                                    \
  HOOK void __tsan_unaligned_read##bytes(void* at) {                   \
    check_access(at, bytes, Kind::read, __builtin_return_address(0));  \
  }                                                                    \
  HOOK void __tsan_unaligned_write##bytes(void* at) {                  \
    check_access(at, bytes, Kind::write, __builtin_return_address(0)); \
  }
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16) HOOK void __tsan_read_range(void* at, unsigned long bytes) {
  check_access(at, bytes, Kind::read, __builtin_return_address(0));
}
HOOK void __tsan_write_range(void* at, unsigned long bytes) {
  check_access(at, bytes, Kind::write, __builtin_return_address(0));
}
HOOK void __tsan_func_entry(void*) {}
HOOK void __tsan_func_exit(void*) {}
HOOK void __tsan_vptr_update(void**, void*) {}
HOOK void __tsan_vptr_read(void**) {}
HOOK void __tsan_init() {}
// Atomics of the host code around the kernels (reference counts): kernels use those of emulator.h.
HOOK int __tsan_atomic32_fetch_add(volatile int* at, int value, int) {
  return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);
}
HOOK int __tsan_atomic32_fetch_sub(volatile int* at, int value, int) {
  return __atomic_fetch_sub(at, value, __ATOMIC_SEQ_CST);
}
HOOK int __tsan_atomic32_load(const volatile int* at, int) {
  return __atomic_load_n(at, __ATOMIC_SEQ_CST);
}
HOOK long __tsan_atomic64_load(const volatile long* at, int) {
  return __atomic_load_n(at, __ATOMIC_SEQ_CST);
}
HOOK unsigned char __tsan_atomic8_load(const volatile unsigned char* at, int) {
  return __atomic_load_n(at, __ATOMIC_SEQ_CST);
}
#endif
}

}  // namespace emulator
