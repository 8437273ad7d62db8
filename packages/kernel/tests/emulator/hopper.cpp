#include "hopper.h"

#include <cudaTypedefs.h>

#include <array>
#include <deque>
#include <map>
#include <unordered_map>

namespace emulator {

alignas(1024) char async_memory[kSharedBytes];

namespace {

constexpr uint32_t kUnderWay = 0x7fcdabcd;  // a NaN, in accumulators between wgmma and its wait

struct Barrier {
  uint32_t arrivals, pending, phase;
  int64_t bytes;
};

struct NamedBarrier {
  int threads, arrived;
  uint64_t turn;
};

struct Load {
  uint64_t* barrier;
  uint32_t bytes;
  std::function<void()> perform;
};

struct Reduction {
  float* global;
  uint32_t offset, bytes;
  std::vector<float> values;
  bool read, added;

  void read_now() {
    if (read) return;
    values.resize(bytes / 4);
    std::memcpy(values.data(), async_memory + offset, bytes);
    read = true;
  }
  void add_now() {
    read_now();
    for (size_t i = 0; i < values.size() && !added; ++i) global[i] += values[i];
    added = true;
  }
};

struct WarpProduct {
  Product product;
  int lanes = 0;  // that have issued it
  bool done = false;
  float* d[kWarp];
  uint32_t a[kWarp][4];
};

struct Accumulator {  // that products under way write
  std::vector<float> values;
  uint64_t last;  // product
};

struct WarpProducts {
  std::deque<WarpProduct> queue;
  uint64_t first = 0;               // number of the queue's front
  std::vector<uint64_t> group_end;  // one behind the last product of each committed group
};

struct HopperThread {
  std::vector<Reduction> open;
  std::deque<std::vector<Reduction>> groups;
  std::map<float*, Accumulator> accumulators;
  uint64_t products = 0, product_groups = 0, committed = 0;
  bool fenced = false;
};

std::unordered_map<uint64_t*, Barrier> barriers;
NamedBarrier named_barriers[16];
std::vector<Load> loads;
double landing_chance;
std::vector<HopperThread> hopper_threads;
std::vector<WarpProducts> warp_products;

HopperThread& mine() { return hopper_threads[current]; }

void write_both(uint32_t offset, const void* data, size_t bytes) {
  std::memcpy(shared_memory + offset, data, bytes);
  std::memcpy(async_memory + offset, data, bytes);
}

// ---- barriers ----

Barrier& find(uint64_t* barrier) {
  const auto found = barriers.find(barrier);
  if (found == barriers.end()) fail("an mbarrier that was not initialised");
  return found->second;
}

void complete_if_due(Barrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  b.phase ^= 1;
  b.pending = b.arrivals;
}

std::string describe_mbarrier(uint64_t argument) {
  const auto barrier = reinterpret_cast<uint64_t*>(argument & ~uint64_t{1});
  const Barrier& b = barriers.find(barrier)->second;
  return "the mbarrier at byte " + std::to_string(reinterpret_cast<char*>(barrier) - shared_memory) +
         " of shared memory, parity " + std::to_string(argument & 1) + ": " + std::to_string(b.pending) + " of " +
         std::to_string(b.arrivals) + " arrivals and " + std::to_string(b.bytes) + " bytes are missing";
}

std::string describe_named(uint64_t id) {
  const NamedBarrier& b = named_barriers[id];
  return "named barrier " + std::to_string(id) + ": " + std::to_string(b.arrived) + " of " + std::to_string(b.threads);
}

// ---- copies ----

void poison(uint32_t offset, size_t bytes) {  // it may be written at any time from now on
  const std::vector<char> nan(bytes, static_cast<char>(0xff));
  write_both(offset, nan.data(), bytes);
}

void start_load(void* smem, uint32_t bytes, uint64_t* barrier, std::function<void()> perform) {
  find(barrier);
  const uint32_t offset = shared_address(smem);
  if (offset % 16 != 0 || bytes % 16 != 0 || offset + bytes > shared_bytes) fail("a bulk copy: bad shared address");
  poison(offset, bytes);
  loads.push_back({barrier, bytes, std::move(perform)});
}

void land(const Load& load) {
  load.perform();
  Barrier& b = barriers.find(load.barrier)->second;
  b.bytes -= load.bytes;
  complete_if_due(b);
}

// What the emulated encoder writes into a CUtensorMap.
struct Map {
  char* data;
  uint32_t extents[5], box[2];  // the other three of a box are 1
  uint32_t value_bytes, chunks;  // of a swizzled row of a box: 8 or 4 of 16 bytes
  uint64_t strides[4];          // bytes
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

CUresult encode(CUtensorMap* target, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* extents,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave interleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const bool wide = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const uint32_t chunks = swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 8 : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 4 : 0;
  bool known = rank == 5 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
               chunks != 0 && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE &&
               (wide || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16);
  Map map{static_cast<char*>(data), {}, {box[0], box[1]}, wide ? 4u : 2u, chunks, {}};
  known = known && box[0] * map.value_bytes == chunks * 16 && box[1] <= 256 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int i = 0; known && i < 5; ++i) {
    map.extents[i] = static_cast<uint32_t>(extents[i]);
    known = extents[i] > 0 && extents[i] <= UINT32_MAX && steps[i] == 1 && (i < 2 || box[i] == 1);
    if (i == 4) break;
    map.strides[i] = strides[i];
    known = known && strides[i] % 16 == 0 && strides[i] < uint64_t{1} << 40;
  }
  std::memset(target, 0, sizeof(*target));
  std::memcpy(target, &map, sizeof(map));
  return known ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// ---- products ----

// Where one of 16-bit values lies that a descriptor names, in rows of 128 or 64 bytes swizzled over as many. row: the one of M
// or N.
uint32_t operand_row_bytes(uint64_t descriptor) { return descriptor >> 62 == 2 ? 64 : 128; }

uint32_t operand_address(uint64_t descriptor, bool transposed, int row, int k) {
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t eight_rows = (descriptor >> 32 & 0x3fff) << 4, row_bytes = operand_row_bytes(descriptor);
  const int columns = row_bytes / 2;
  uint32_t address;
  if (transposed) {  // rows of values of M or N, one a k
    const int column = start % row_bytes / 2 + row;
    address = start / row_bytes * row_bytes + column / columns * leading + k / 8 * eight_rows + k % 8 * row_bytes +
              column % columns * 2;
  } else {
    address = start + row / 8 * eight_rows + row % 8 * row_bytes + k * 2;
  }
  return address ^ (address >> 7 & (row_bytes / 16 - 1)) << 4;
}

void check_descriptor(uint64_t descriptor, bool transposed, int rows) {
  const uint32_t start = (descriptor & 0x3fff) << 4, row_bytes = operand_row_bytes(descriptor);
  const bool known = descriptor >> 62 == 1 || descriptor >> 62 == 2;
  if (!known || (descriptor >> 49 & 7) != 0) fail("wgmma: a descriptor other than of a 128-byte or 64-byte swizzle");
  if (start % (8 * row_bytes) >= row_bytes) fail("wgmma: an operand that does not start at a row 0 of eight swizzled ones");
  const bool leaves_row = transposed ? start % row_bytes != 0 && start % row_bytes + rows * 2 > row_bytes
                                     : start % row_bytes + 32 > row_bytes;
  if (leaves_row) fail("wgmma: an operand that leaves its row");
  const uint32_t last = max(operand_address(descriptor, transposed, rows - 1, 15), start);
  if (last >= shared_bytes) fail("wgmma: an operand beyond shared memory");
}

double read_operand(const Product& product, uint64_t descriptor, bool transposed, int row, int k) {
  uint16_t word;
  std::memcpy(&word, async_memory + operand_address(descriptor, transposed, row, k), 2);
  return product.half ? element<true>(word) : element<false>(word);
}

// One warp's sixteen rows.
void execute(WarpProduct& p, unsigned warp) {
  const Product& product = p.product;
  static double a[16][16], b[16][256], sum[256];
  for (int k = 0; k < 16; ++k) {
    for (int column = 0; column < product.n; ++column) {
      b[k][column] = read_operand(product, product.b, product.transpose_b, column, k);
    }
    for (int row = 0; row < 16; ++row) {
      if (product.a != 0) {
        a[row][k] = read_operand(product, product.a, product.transpose_a, warp % 4 * 16 + row, k);
      } else {
        const uint32_t word = p.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2] >> k % 2 * 16;
        a[row][k] = product.half ? element<true>(word) : element<false>(word);
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    const auto value = [&](int column) -> float& {
      const int lane = row % 8 * 4 + column % 8 / 2;
      return hopper_threads[warp * kWarp + lane].accumulators[p.d[lane]].values[column / 8 * 4 + row / 8 * 2 + column % 2];
    };
    for (int column = 0; column < product.n; ++column) sum[column] = product.accumulate ? value(column) : 0.0;
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < product.n; ++column) sum[column] += a[row][k] * b[k][column];
    }
    for (int column = 0; column < product.n; ++column) value(column) = truncate(sum[column]);
  }
  p.done = true;
}

void execute_until(uint64_t end) {
  const unsigned warp = current / kWarp;
  WarpProducts& products = warp_products[warp];
  for (uint64_t i = products.first; i < end; ++i) {
    WarpProduct& p = products.queue[i - products.first];
    if (!p.done) execute(p, warp);
  }
  while (products.first < end && !products.queue.empty()) {
    products.queue.pop_front();
    ++products.first;
  }
}

// The registers whose last product is below `end` may be read again.
void publish(uint64_t end) {
  auto& accumulators = mine().accumulators;
  for (auto entry = accumulators.begin(); entry != accumulators.end();) {
    auto& [d, accumulator] = *entry;
    if (accumulator.last >= end) {
      ++entry;
      continue;
    }
    for (size_t i = 0; i < accumulator.values.size(); ++i) {
      if (bits<uint32_t>(d[i]) != kUnderWay) fail("accumulators were written between wgmma and its wait");
    }
    std::copy(accumulator.values.begin(), accumulator.values.end(), d);
    entry = accumulators.erase(entry);
  }
}

}  // namespace

void fence_async() { std::memcpy(async_memory, shared_memory, shared_bytes); }

void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  shared_address(barrier);
  barriers[barrier] = {arrivals, arrivals, 0, 0};
}

void barrier_arrive(uint64_t* barrier, uint32_t expected_bytes) {
  Barrier& b = find(barrier);
  if (b.pending == 0) fail("more arrivals than " + describe_mbarrier(reinterpret_cast<uint64_t>(barrier)) + " counts");
  b.bytes += expected_bytes;
  --b.pending;
  complete_if_due(b);
}

bool barrier_passed(uint64_t* barrier, uint32_t parity) { return find(barrier).phase != (parity & 1); }

void barrier_wait(uint64_t* barrier, uint32_t parity) {
  Barrier& b = find(barrier);
  parity &= 1;
  wait_until([&b, parity] { return b.phase != parity; }, describe_mbarrier, reinterpret_cast<uint64_t>(barrier) | parity);
}

void named_barrier(int id, int count, bool waits) {
  if (id < 1 || id > 15 || count % kWarp != 0 || count <= 0) fail("a named barrier: bad number or count");
  NamedBarrier& b = named_barriers[id];
  if (b.arrived > 0 && b.threads != count) fail("named barrier " + std::to_string(id) + ": two counts");
  b.threads = count;
  const uint64_t turn = b.turn;
  if (++b.arrived == count) {
    b.arrived = 0;
    ++b.turn;
  }
  if (waits) wait_until([&b, turn] { return b.turn != turn; }, describe_named, id);
}

void load_box(void* smem, const CUtensorMap& tensor_map, const int32_t (&coordinates)[5], uint64_t* barrier) {
  Map map;
  std::memcpy(&map, &tensor_map, sizeof(map));
  const uint32_t offset = shared_address(smem), bytes = map.value_bytes, row_bytes = map.box[0] * bytes;
  if (offset % 128 != 0) fail("a tensor copy to an address that is no multiple of 128");
  const std::array<int64_t, 5> at{coordinates[0], coordinates[1], coordinates[2], coordinates[3], coordinates[4]};
  start_load(smem, map.box[1] * row_bytes, barrier, [=] {
    for (uint32_t row = 0; row < map.box[1]; ++row) {
      for (uint32_t column = 0; column < map.box[0]; ++column) {
        const std::array<int64_t, 5> index{at[0] + column, at[1] + row, at[2], at[3], at[4]};
        const char* source = map.data + index[0] * bytes;
        bool inside = true;
        for (int i = 0; i < 5; ++i) {
          inside = inside && index[i] >= 0 && index[i] < map.extents[i];
          if (i > 0) source += index[i] * static_cast<int64_t>(map.strides[i - 1]);
        }
        uint32_t value = 0;
        if (inside) std::memcpy(&value, source, bytes);
        const uint32_t address = offset + row * row_bytes + column * bytes;
        write_both(address ^ (address >> 7 & (map.chunks - 1)) << 4, &value, bytes);
      }
    }
  });
}

void bulk_load(void* smem, const void* global, uint32_t bytes, uint64_t* barrier) {
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) fail("a bulk copy: bad global address");
  const uint32_t offset = shared_address(smem);
  start_load(smem, bytes, barrier, [=] { write_both(offset, global, bytes); });
}

void bulk_reduce_add(float* global, const float* smem, uint32_t bytes) {
  const uint32_t offset = shared_address(smem);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0 || offset % 16 != 0 || bytes % 16 != 0) {
    fail("a bulk reduction: bad address or size");
  }
  mine().open.push_back({global, offset, bytes, {}, false, false});
}

void bulk_commit() {
  for (Reduction& reduction : mine().open) {
    if (chance(0.5)) reduction.read_now();
    if (chance(0.3)) reduction.add_now();
  }
  mine().groups.push_back(std::move(mine().open));
  mine().open.clear();
}

void bulk_wait(int pending, bool read_only) {
  auto& groups = mine().groups;
  for (size_t i = 0; i + pending < groups.size(); ++i) {
    for (Reduction& reduction : groups[i]) read_only ? reduction.read_now() : reduction.add_now();
  }
}

void wgmma_fence() { mine().fenced = true; }

void wgmma(const Product& product, float* d, const uint32_t* a) {
  HopperThread& thread = mine();
  WarpProducts& products = warp_products[current / kWarp];
  if (!thread.fenced) fail("wgmma without a fence since the last commit");
  if (a == nullptr) check_descriptor(product.a, product.transpose_a, 64);
  check_descriptor(product.b, product.transpose_b, product.n);
  const uint64_t number = thread.products++;
  if (number == products.first + products.queue.size()) products.queue.push_back({product});
  WarpProduct& entry = products.queue[number - products.first];
  if (std::memcmp(&entry.product.a, &product.a, 16) != 0 || entry.product.n != product.n) {
    fail("wgmma: the lanes of a warp disagree");
  }
  entry.d[lane()] = d;
  if (a != nullptr) std::copy(a, a + 4, entry.a[lane()]);
  ++entry.lanes;
  auto [found, added] = thread.accumulators.try_emplace(d);
  if (added) {
    found->second.values.assign(d, d + product.n / 2);
    std::fill(d, d + product.n / 2, bits<float>(kUnderWay));
  }
  found->second.last = number;
}

void wgmma_commit() {
  HopperThread& thread = mine();
  thread.fenced = false;
  thread.committed = thread.products;
  exchange(nullptr, 0);
  auto& ends = warp_products[current / kWarp].group_end;
  if (ends.size() == thread.product_groups) {  // the first lane of the warp
    ends.push_back(thread.committed);
    if (chance(0.5)) execute_until(thread.committed);
  }
  ++thread.product_groups;
}

void wgmma_wait(int pending) {
  HopperThread& thread = mine();
  exchange(nullptr, 0);
  if (thread.product_groups <= static_cast<uint64_t>(pending)) return;
  const uint64_t end = warp_products[current / kWarp].group_end[thread.product_groups - pending - 1];
  execute_until(end);
  publish(end);
}

void start_hopper(unsigned num_threads) {
  std::memset(async_memory, 0xff, shared_bytes);
  barriers.clear();
  loads.clear();
  std::fill(named_barriers, named_barriers + 16, NamedBarrier{});
  hopper_threads.assign(num_threads, HopperThread{});
  warp_products.assign((num_threads + kWarp - 1) / kWarp, WarpProducts{});
  landing_chance = std::array{1.0, 0.3, 0.0}[random_source() % 3];
}

bool land_copies(bool must) {
  bool any = false;
  for (size_t i = 0; i < loads.size();) {
    if (chance(landing_chance) || (must && !any && i + 1 == loads.size())) {
      const Load load = std::move(loads[i]);
      loads.erase(loads.begin() + i);
      land(load);
      any = true;
    } else {
      ++i;
    }
  }
  return any;
}

void finish_copies() {
  for (HopperThread& thread : hopper_threads) {
    for (auto& group : thread.groups) {
      for (Reduction& reduction : group) reduction.add_now();
    }
  }
}

void check_nothing_under_way() {
  HopperThread& thread = mine();
  if (!thread.accumulators.empty()) fail("the thread ends before its wgmma");
  if (!thread.open.empty()) fail("the thread ends with a bulk group that was not committed");
  for (const auto& group : thread.groups) {
    for (const Reduction& reduction : group) {
      if (!reduction.read) fail("the thread ends while a bulk copy reads its shared memory");
    }
  }
}

}  // namespace emulator

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** entry, unsigned, unsigned long long,
                                                        cudaDriverEntryPointQueryResult* found) {
  *entry = reinterpret_cast<void*>(emulator::encode);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
