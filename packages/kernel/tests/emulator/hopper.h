// What Hopper adds: barriers in shared memory and by number, copies by TMA, products by warpgroups; all of them asynchronous.
#pragma once

#include <cuda.h>

#include "emulator.h"

namespace emulator {

// Shared memory as asynchronous instructions see it: ordinary stores reach it at the next fence_async() only.
extern char async_memory[];
void fence_async();

void barrier_init(uint64_t* barrier, uint32_t arrivals);
void barrier_arrive(uint64_t* barrier, uint32_t expected_bytes);
bool barrier_passed(uint64_t* barrier, uint32_t parity);
void barrier_wait(uint64_t* barrier, uint32_t parity);

void named_barrier(int id, int threads, bool waits);

void load_box(void* smem, const CUtensorMap& map, const int32_t (&coordinates)[5], uint64_t* barrier);
void bulk_load(void* smem, const void* global, uint32_t bytes, uint64_t* barrier);
void bulk_reduce_add(float* global, const float* smem, uint32_t bytes);
void bulk_commit();
void bulk_wait(int pending, bool read_only);

struct Product {  // D (64 x n) += A (64 x 16) B (16 x n)
  int n;
  bool half;  // or bfloat16
  bool accumulate, transpose_a, transpose_b;
  uint64_t a, b;  // descriptors; a is 0 where A lies in registers
};
void wgmma_fence();
void wgmma(const Product& product, float* d, const uint32_t* a);  // a: four registers or nullptr
void wgmma_commit();
void wgmma_wait(int pending);

// For the scheduler.
void start_hopper(unsigned num_threads);
bool land_copies(bool must);  // lets some copies under way arrive, at least one if it must; whether one did
void finish_copies();
void check_nothing_under_way();  // of the thread that ends

}  // namespace emulator
