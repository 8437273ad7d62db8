#include "emulator.h"

#include <signal.h>

#include <cstdio>
#include <map>
#include <utility>

#include "hopper.h"

namespace emulator {

alignas(1024) char shared_memory[kSharedBytes];
size_t shared_bytes;
int current = -1;
uint3 block;
dim3 grid, threads;
bool copies_are_late;
std::mt19937 random_source(0);

namespace {

constexpr size_t kStackBytes = 256 * 1024;

struct Warp {
  bool slow;  // runs only where no other can
  uint64_t arrived[2];
  uint32_t words[2][kWarp][kMaxWords];
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
ucontext_t scheduler;
uint64_t arrived_at_barriers;
unsigned num_threads;
const std::function<void()>* body;
bool failed;
cudaError_t last_error = cudaSuccess;

void report(const std::string& what) {
  failed = true;
  last_error = cudaErrorLaunchFailure;
  std::fprintf(stderr, "emulator: block (%u, %u, %u), %s\n", block.x, block.y, block.z, what.c_str());
}

void run_fiber() {
  (*body)();
  check_nothing_under_way();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

void start_fibers() {
  warps.assign((num_threads + kWarp - 1) / kWarp, Warp{});
  for (Warp& warp : warps) warp.slow = chance(0.25);
  arrived_at_barriers = 0;
  for (unsigned t = 0; t < num_threads; ++t) {
    Fiber& f = fibers[t];
    f.done = false;
    f.ready = nullptr;
    f.warp_operations = f.block_operations = 0;
    f.groups.clear();
    f.open.clear();
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, run_fiber, 0);
  }
}

// Runs the lanes of a warp that can go on, each until it waits or ends; whether there was one.
bool run_warp(unsigned warp, unsigned& left) {
  bool ran = false;
  for (unsigned t = warp * kWarp; t < std::min(num_threads, (warp + 1) * kWarp) && !failed; ++t) {
    Fiber& f = fibers[t];
    if (f.done || (f.ready && !f.ready())) continue;
    f.ready = nullptr;
    current = static_cast<int>(t);
    swapcontext(&scheduler, &f.context);
    current = -1;
    ran = true;
    left -= f.done;
  }
  return ran;
}

void report_deadlock() {
  std::map<std::string, std::vector<unsigned>> waiting;
  for (unsigned t = 0; t < num_threads; ++t) {
    if (!fibers[t].done) waiting[fibers[t].waits_for(fibers[t].waits_for_argument)].push_back(t);
  }
  std::string what = "deadlock:";
  for (const auto& [reason, waiters] : waiting) {
    what += "\n  " + std::to_string(waiters.size()) + " threads from " + std::to_string(waiters.front()) + " to " +
            std::to_string(waiters.back()) + " wait for " + reason;
  }
  report(what);
}

void run_block() {
  std::vector<unsigned> order(warps.size());
  for (unsigned w = 0; w < order.size(); ++w) order[w] = w;
  for (unsigned left = num_threads; left > 0 && !failed;) {
    std::shuffle(order.begin(), order.end(), random_source);
    bool ran = false;
    for (unsigned w : order) ran |= !warps[w].slow && run_warp(w, left);
    ran |= land_copies(false);
    for (unsigned w : order) ran = ran || (warps[w].slow && run_warp(w, left));
    if (!ran && !failed && !land_copies(true)) report_deadlock();
  }
}

void access_failed(int) { fail("a misaligned or wild access to memory"); }

// While kernels run: their bad accesses fail the launch instead of ending the process. On a stack of its own.
class AccessGuard {
 public:
  AccessGuard() : stack_(new char[kStackBytes]) {
    stack_t stack{};
    stack.ss_sp = stack_.get();
    stack.ss_size = kStackBytes;
    sigaltstack(&stack, &old_stack_);
    struct sigaction action{};
    action.sa_handler = access_failed;
    action.sa_flags = SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &action, &old_[i]);
  }
  ~AccessGuard() {
    for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static constexpr int kSignals[3] = {SIGSEGV, SIGBUS, SIGILL};  // the last from -fsanitize=alignment
  std::unique_ptr<char[]> stack_;
  stack_t old_stack_;
  struct sigaction old_[3];
};

std::string barrier_of_the_block(uint64_t) { return "__syncthreads"; }
std::string other_lanes(uint64_t) { return "the other lanes of the warp"; }

}  // namespace

Fiber& fiber() { return fibers[current]; }

void fail(const std::string& what) {
  report("thread " + std::to_string(current) + ": " + what);
  if (current < 0) std::abort();  // not in a kernel
  for (;;) swapcontext(&fibers[current].context, &scheduler);
}

void wait_until(const std::function<bool()>& ready, std::string (*describe)(uint64_t), uint64_t argument) {
  if (ready()) return;
  Fiber& f = fiber();
  f.ready = ready;
  f.waits_for = describe;
  f.waits_for_argument = argument;
  swapcontext(&f.context, &scheduler);
}

void synchronize_block() {
  const uint64_t turn = ++fiber().block_operations;
  ++arrived_at_barriers;
  wait_until([turn] { return arrived_at_barriers >= turn * num_threads; }, barrier_of_the_block);
}

Words* exchange(const uint32_t* mine, int count) {
  Warp& warp = warps[current / kWarp];
  const int parity = fiber().warp_operations & 1;  // two sets of words: a fast lane may be one exchange ahead
  const uint64_t turn = ++fiber().warp_operations;
  if (count > 0) std::memcpy(warp.words[parity][lane()], mine, 4 * count);
  ++warp.arrived[parity];
  wait_until([&warp, parity, turn] { return warp.arrived[parity] >= kWarp * ((turn + 1) / 2); }, other_lanes);
  return warp.words[parity];
}

void load_matrices(uint32_t (&words)[4], uint32_t address, bool transposed) {
  if (address % 16 != 0) fail("ldmatrix: a row that is not on a 16-byte boundary");
  const auto addresses = exchange(&address, 1);
  const int row = lane() / 4, pair = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    uint16_t values[2];
    for (int half = 0; half < 2; ++half) {
      const int r = transposed ? pair * 2 + half : row, c = transposed ? row : pair * 2 + half;
      std::memcpy(&values[half], shared_memory + addresses[8 * i + r][0] + 2 * c, 2);
    }
    words[i] = values[0] | static_cast<uint32_t>(values[1]) << 16;
  }
}

void store_matrices(uint32_t address, const uint32_t (&words)[4], bool transposed) {
  if (address % 16 != 0) fail("stmatrix: a row that is not on a 16-byte boundary");
  const auto addresses = exchange(&address, 1);
  const int row = lane() / 4, pair = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    for (int half = 0; half < 2; ++half) {
      const int r = transposed ? pair * 2 + half : row, c = transposed ? row : pair * 2 + half;
      const uint16_t value = words[i] >> half * 16;
      std::memcpy(shared_memory + addresses[8 * i + r][0] + 2 * c, &value, 2);
    }
  }
}

void launch(dim3 blocks, dim3 block_threads, size_t bytes, const std::function<void()>& kernel) {
  if (last_error != cudaSuccess) return;
  if (bytes > kSharedBytes) std::abort();
  body = &kernel;
  shared_bytes = bytes;
  threads = block_threads;
  num_threads = threads.x;
  grid = blocks;
  if (fibers.size() < num_threads) fibers.resize(num_threads);
  for (Fiber& f : fibers) {
    if (!f.stack) f.stack.reset(new char[kStackBytes]);
  }
  failed = false;
  const AccessGuard guard;
  for (unsigned b = 0; b < grid.x * grid.y * grid.z && !failed; ++b) {
    block = uint3{b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
    copies_are_late = chance(0.5);
    std::memset(shared_memory, 0xff, bytes);  // NaN
    start_fibers();
    start_hopper(num_threads);
    run_block();
    finish_copies();
  }
}

cudaError_t take_error() { return std::exchange(last_error, cudaSuccess); }

}  // namespace emulator

extern "C" {

static int shared_memory_limit = emulator::kSharedBytes;
static int current_device = 0;  // 0: an Ampere, 1: a Hopper

void emulate_shared_memory_limit(int bytes) { shared_memory_limit = bytes; }
void emulate_hopper(bool is_hopper) { current_device = is_hopper ? 1 : 0; }
void emulate_seed(int seed) { emulator::random_source.seed(seed); }

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : shared_memory_limit;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->binaryVersion = attributes->ptxVersion = current_device == 1 ? 90 : 80;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  std::memset(target, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return emulator::take_error(); }
}
