#include "emulator.h"

#include <random>

namespace fcsa::sm80 {
alignas(1024) char shared_memory[emulator::kSharedBytes];
}

namespace emulator {

int current;
uint3 block;
dim3 grid;
bool copies_are_late;

namespace {

constexpr size_t kStackBytes = 256 * 1024;

struct Warp {
  uint64_t arrived[2];
  uint32_t words[2][kWarp][kMaxWords];
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
ucontext_t scheduler;
uint64_t arrived_at_barriers;
unsigned num_threads;
const std::function<void()>* body;
std::mt19937 random_source(0);

void give_way() { swapcontext(&fibers[current].context, &scheduler); }

void run_fiber() {
  (*body)();
  fibers[current].done = true;
  give_way();
}

void start_fibers() {
  warps.assign((num_threads + kWarp - 1) / kWarp, Warp{});
  arrived_at_barriers = 0;
  for (unsigned t = 0; t < num_threads; ++t) {
    Fiber& f = fibers[t];
    f.done = false;
    f.warp_operations = f.block_operations = 0;
    f.groups.clear();
    f.open.clear();
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = nullptr;
    makecontext(&f.context, run_fiber, 0);
  }
}

void run_block() {
  std::vector<unsigned> order(warps.size());
  for (unsigned w = 0; w < order.size(); ++w) order[w] = w;
  for (unsigned left = num_threads; left > 0;) {
    std::shuffle(order.begin(), order.end(), random_source);
    for (unsigned w : order) {
      for (unsigned t = w * kWarp; t < std::min(num_threads, (w + 1) * kWarp); ++t) {
        if (fibers[t].done) continue;
        current = static_cast<int>(t);
        swapcontext(&scheduler, &fibers[t].context);
        if (fibers[t].done) --left;
      }
    }
  }
}

}  // namespace

Fiber& fiber() { return fibers[current]; }

void synchronize_block() {
  const uint64_t turn = ++fiber().block_operations;
  ++arrived_at_barriers;
  while (arrived_at_barriers < turn * num_threads) give_way();
}

Words* exchange(const uint32_t* mine, int count) {
  Warp& warp = warps[current / kWarp];
  const int parity = fiber().warp_operations & 1;  // two sets of words: a fast lane may be one exchange ahead
  const uint64_t turn = ++fiber().warp_operations;
  if (count > 0) std::memcpy(warp.words[parity][lane()], mine, 4 * count);
  ++warp.arrived[parity];
  while (warp.arrived[parity] < kWarp * ((turn + 1) / 2)) give_way();
  return warp.words[parity];
}

void launch(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (shared_bytes > kSharedBytes) std::abort();
  body = &kernel;
  num_threads = threads;
  grid = dim3(blocks);
  if (fibers.size() < threads) fibers.resize(threads);
  for (Fiber& f : fibers) f.stack.resize(kStackBytes);
  for (unsigned b = 0; b < blocks; ++b) {
    block = uint3{b, 0, 0};
    copies_are_late = random_source() & 1;
    std::memset(fcsa::sm80::shared_memory, 0xff, kSharedBytes);  // NaN
    start_fibers();
    run_block();
  }
}

}  // namespace emulator

extern "C" {

static int shared_memory_limit = emulator::kSharedBytes;

void emulate_shared_memory_limit(int bytes) { shared_memory_limit = bytes; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = shared_memory_limit;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  std::memset(target, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
}
