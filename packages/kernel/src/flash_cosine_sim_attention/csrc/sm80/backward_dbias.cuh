// The gradient of the bias: a block of threads owns a tile of it and walks over what shares the tile (batch dims, heads,
// and blocks of queries or keys along which the bias is broadcast). dS is recomputed, summed in registers in a fixed
// order and stored once: no atomics, bit-equal results. Where there are fewer tiles than a device runs blocks, the
// sharers are dealt out in parts; each part's sum goes to a workspace, and a second kernel adds the parts up.
//
//   S  (queries x keys) = Q K^T      P  = exp2(S factors + bias + shift)
//   dP - delta          = dO V^T, starting from -delta           dbias += P (dP - delta)
#pragma once

#include "backward_dbias_walk.cuh"
#include "../common/launch.cuh"
#include "backward_tiles.cuh"

namespace fcsa::sm80 {

template <class Config>
struct DbiasStorage {
  using Operand = typename Config::Operand;
  using QueryTile = SmemTile<Operand, Config::kPlanes * Config::kQueries, Config::kHeadDim>;
  using KeyTile = SmemTile<Operand, Config::kPlanes * Config::kKeys, Config::kHeadDim>;
  struct alignas(Config::kStageAlignment) Stage {
    QueryTile q, dout;
    KeyTile k, v;
    float4 query_rows[Config::kQueries];
    alignas(128) float key_factor[Config::kKeys];  // k_rnorm where the norm is folded, else 1
    uint32_t visible[Config::kKeys / 32];          // a bit a key
  };
  static constexpr int kStride = Config::kKeys + 2;
  union {
    Stage stage[Config::kStages];
    float tile[Config::kQueries * kStride];
  };
};

// Where a thread's share of a step's operands lies: these addresses are carried from sharer to sharer, since to compute
// them anew would take as many instructions as the step itself.
template <class Config>
struct DbiasSources {
  using Operand = typename Config::Operand;
  using Tile = typename DbiasStorage<Config>::QueryTile;
  static constexpr int kChunks = Tile::kChunksPerPanelRow, kRowStep = Config::kThreads / kChunks;
  Rows<Operand> q, dout, k, v;
  const float4* query_row;
  const float* k_rnorm;
  const uint8_t* mask;  // of the block's first key

  __device__ __forceinline__ DbiasSources(const BackwardParams& p, const DbiasStep& step) {
    const int query0 = step.head.tile * Config::kQueries, key0 = step.key_block * Config::kKeys;
    const int own_row = threadIdx.x / kChunks, own_column = threadIdx.x % kChunks * 8;
    const TileIndex kv_head = kv_head_of(p, step.head);
    q = query_operand<Config>(p, step.head).from(query0 + own_row), q.base += own_column;
    dout = dout_operand<Config>(p, step.head).from(query0 + own_row), dout.base += own_column;
    k = key_operand<Config>(p, kv_head).from(key0 + own_row), k.base += own_column;
    v = value_operand<Config>(p, kv_head).from(key0 + own_row), v.base += own_column;
    query_row = p.query_rows + step.head.first_row(p.b1, p.heads, padded_queries(p.num_queries)) + query0 + threadIdx.x;
    k_rnorm = p.k_rnorm + kv_head.first_row(p.b1, p.kv_heads, p.num_keys) + key0 + threadIdx.x;
    mask = mask_row(p, kv_head);
    if (mask != nullptr) mask += key0 * p.mask_key;
  }

  __device__ __forceinline__ void advance(const DbiasRowStep& step) {
    q.base += step.q, k.base += step.k, v.base += step.v, dout.base += step.dout;
    query_row += step.query_row, k_rnorm += step.k_rnorm, mask += step.mask;
  }
};

// kRows rows of each plane, from a thread's own first row and column on; those from num_rows on become zero.
template <class Config, int kRows, class Tile>
__device__ __forceinline__ void copy_own_rows_async(const Tile& tile, const Rows<typename Tile::Element>& from,
                                                    int num_rows, int num_cols, const uint8_t* mask = nullptr,
                                                    int64_t mask_step = 0) {
  using Sources = DbiasSources<Config>;
  static_assert(Sources::kRowStep % 8 == 0, "the swizzle of a thread's rows is one constant");
  const int own_row = threadIdx.x / Sources::kChunks, own_column = threadIdx.x % Sources::kChunks * 8;
  const uint32_t target = tile.chunk_address(own_row, own_column / 8);
  const typename Tile::Element* source = from.base;
#pragma unroll
  for (int row = 0; row < kRows; row += Sources::kRowStep) {
    if (kRows % Sources::kRowStep != 0 && own_row + row >= kRows) break;
    bool valid = own_row + row < num_rows;
    if (valid && mask != nullptr) valid = mask[(own_row + row) * mask_step] != 0;
#pragma unroll
    for (int panel = 0; panel < Tile::kCols / Tile::kPanelCols; ++panel) {
#pragma unroll
      for (int plane = 0; plane < Config::kPlanes; ++plane) {
        const int offset = (panel * Tile::kRows + plane * kRows + row) * Tile::kPanelCols * 2;
        ptx::cp_async_16(target + offset, source + plane * from.plane + panel * Tile::kPanelCols,
                         valid && panel * Tile::kPanelCols + own_column < num_cols);
      }
    }
    source += Sources::kRowStep * from.stride;
  }
}

// The operands of one step, with cp.async (not committed).
template <class Config>
__device__ __forceinline__ void load_step(typename DbiasStorage<Config>::Stage& smem, const BackwardParams& p,
                                          const DbiasSources<Config>& from, const DbiasStep& step) {
  constexpr int kKeys = Config::kKeys;
  const int num_queries = p.num_queries - step.head.tile * Config::kQueries;
  const int num_keys = p.num_keys - step.key_block * kKeys;
  copy_own_rows_async<Config, Config::kQueries>(smem.q, from.q, num_queries, p.head_dim);
  copy_own_rows_async<Config, Config::kQueries>(smem.dout, from.dout, num_queries, p.head_dim);
  if (threadIdx.x < Config::kQueries) ptx::cp_async_16(ptx::smem_address(&smem.query_rows[threadIdx.x]), from.query_row, true);
  const uint8_t* mask = p.mask == nullptr ? nullptr : from.mask;
  copy_own_rows_async<Config, kKeys>(smem.k, from.k, num_keys, p.head_dim, mask, p.mask_key);
  copy_own_rows_async<Config, kKeys>(smem.v, from.v, num_keys, p.head_dim, mask, p.mask_key);
  if (threadIdx.x >= kKeys) return;  // whole warps
  const int key = threadIdx.x;
  const bool visible = key < num_keys && (mask == nullptr || mask[key * p.mask_key] != 0);
  const uint32_t bits = __ballot_sync(0xffffffffu, visible);
  if (key % 32 == 0) smem.visible[key / 32] = bits;
  const bool folded = Config::kFoldsNorm && norm_is_folded<Config>(p);
  if (folded && (!Config::kExactCopies || p.q_unit == nullptr)) {
    ptx::cp_async_4(ptx::smem_address(&smem.key_factor[key]), visible ? from.k_rnorm : p.k_rnorm, visible);
  } else {
    smem.key_factor[key] = !visible ? 0.0f : folded ? folded_factor<Config>(*from.k_rnorm) : 1.0f;
  }
}

// The share of one warp: 16 kM queries x 8 kN keys, in accumulator layout. Value: the type of the bias and of its gradient.
template <class Config, class Value = float>
class DbiasWarp {
 protected:
  using Pair = std::conditional_t<sizeof(Value) == 4, float2, uint32_t>;
  using Operand = typename Config::Operand;
  using Storage = DbiasStorage<Config>;
  using Stage = typename Storage::Stage;
  static constexpr int kM = Config::kM, kN = Config::kN, kPlanes = Config::kPlanes, kChunk = Config::kChunkN;
  static constexpr int kSteps = Config::kHeadDim / 16;
  using QueryReader = RowsReader<typename Storage::QueryTile>;
  using KeyReader = ChunksReader<typename Storage::KeyTile>;

  const int lane_ = threadIdx.x % 32;
  const int row0_ = Config::first_row(threadIdx.x / 32), column0_ = Config::first_column(threadIdx.x / 32);
  float sum_[kM][kN][4];
  Pair bias_[kM][kN][2];  // as they lie in memory: what takes half the registers leaves room for the rest

 public:
  __device__ __forceinline__ int row_of(int m, int half) const { return row0_ + 16 * m + 8 * half + lane_ / 4; }
  __device__ __forceinline__ int column_of(int n, int c) const { return column0_ + 8 * n + lane_ % 4 * 2 + c; }

  // The bias is the same for all that share the tile.
  __device__ __forceinline__ void start(const BackwardParams& p, const DbiasStep& owner) {
    set_zero(sum_);
    load_bias(p, owner);
  }

  __device__ __forceinline__ void add(const Stage& smem, const BackwardParams& p, const DbiasStep& step) {
    const int query0 = step.head.tile * Config::kQueries, key0 = step.key_block * Config::kKeys;
    bool is_hidden = p.causal && key0 + column0_ + 8 * kN - 1 > query0 + row0_ + p.num_keys - p.num_queries;
#pragma unroll
    for (int word = 0; word < kN / 4; ++word) is_hidden |= smem.visible[column0_ / 32 + word] != 0xffffffffu;
    if (is_hidden) {
      add_visible<true>(smem, p, step, query0, key0);
    } else {
      add_visible<false>(smem, p, step, query0, key0);
    }
  }

  // In the order of the threads, for the kernel that adds parts up.
  __device__ __forceinline__ void store_part(float4* part) const {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const float(&x)[4] = sum_[m][n];
        part[(m * kN + n) * Config::kThreads + threadIdx.x] = make_float4(x[0], x[1], x[2], x[3]);
      }
    }
  }

  __device__ __forceinline__ void load_parts(const float4* part, int num_parts, int64_t stride) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        float(&x)[4] = sum_[m][n];
        x[0] = x[1] = x[2] = x[3] = 0.0f;
        for (int i = 0; i < num_parts; ++i) {
          const float4 y = part[i * stride + (m * kN + n) * Config::kThreads + threadIdx.x];
          x[0] += y.x, x[1] += y.y, x[2] += y.z, x[3] += y.w;
        }
      }
    }
  }

  // Straight to the gradient of a bias that has queries and keys.
  __device__ __forceinline__ void store_rows(const BackwardParams& p, const DbiasOwner<Config>& owner) const {
    Value* base = static_cast<Value*>(p.dbias) + owner.offset(p);
    const int num_rows = p.num_queries - owner.q_blocks.first * Config::kQueries;
    const int num_columns = p.num_keys - owner.key_blocks.first * Config::kKeys;
    const bool paired = are_paired(p, base, p.dbias_query, p.dbias_key);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Value* row = base + row_of(m, half) * p.dbias_query;
        const int columns = row_of(m, half) < num_rows ? num_columns : 0;
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          const float* x = &sum_[m][n][2 * half];
          const int column = column_of(n, 0);
          if (paired) {
            if (column < columns) *reinterpret_cast<Pair*>(row + column) = to_pair(x[0], x[1]);
          } else {
            if (column < columns) row[column * p.dbias_key] = from_float<Value>(x[0]);
            if (column + 1 < columns) row[(column + 1) * p.dbias_key] = from_float<Value>(x[1]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void store_tile(float* tile) const {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int r = 0; r < 4; ++r) tile[row_of(m, r / 2) * Storage::kStride + column_of(n, r % 2)] = sum_[m][n][r];
      }
    }
  }

 protected:
  // Without a branch, so that all loads are under way together. Beyond the last query or key others are read, whose P is 0.
  __device__ __forceinline__ void load_bias(const BackwardParams& p, const DbiasStep& owner) {
    const int64_t offset = owner.head.b0 * p.bias_b0 + owner.head.b1 * p.bias_b1 + owner.head.head * p.bias_head;
    const Value* base = static_cast<const Value*>(p.bias) + offset;
    const int query0 = owner.head.tile * Config::kQueries, key0 = owner.key_block * Config::kKeys;
    const bool paired = are_paired(p, base, p.bias_query, p.bias_key);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Value* row = base + min(query0 + row_of(m, half), p.num_queries - 1) * p.bias_query;
        if (paired) {
#pragma unroll
          for (int n = 0; n < kN; ++n) {
            bias_[m][n][half] = *reinterpret_cast<const Pair*>(row + min(key0 + column_of(n, 0), p.num_keys - 2));
          }
        } else {
#pragma unroll
          for (int n = 0; n < kN; ++n) {
            float x[2];
#pragma unroll
            for (int c = 0; c < 2; ++c) x[c] = to_float(row[min(key0 + column_of(n, c), p.num_keys - 1) * p.bias_key]);
            bias_[m][n][half] = to_pair(x[0], x[1]);
          }
        }
      }
    }
  }

  // Whether two keys of a query lie side by side and can be moved in one access.
  __device__ __forceinline__ static bool are_paired(const BackwardParams& p, const Value* base, int64_t query_stride,
                                                    int64_t key_stride) {
    return key_stride == 1 && query_stride % 2 == 0 && p.num_keys % 2 == 0 &&
           reinterpret_cast<uintptr_t>(base) % sizeof(Pair) == 0;
  }

  __device__ __forceinline__ static Pair to_pair(float low, float high) {
    if constexpr (sizeof(Value) == 4) {
      return make_float2(low, high);
    } else {
      return pack<Value>(low, high);
    }
  }

  __device__ __forceinline__ static float2 values_of(Pair pair) {
    if constexpr (sizeof(Value) == 4) {
      return pair;
    } else {
      return unpack<Value>(pair);
    }
  }

  struct RowValues {
    float score[kM][2], shift[kM][2], delta[kM][2];
  };

  // P (dP gradient + offset), less the factors of the row, is P' (dP + offset / gradient): of float32 the powers of two
  // that the operands carry go into the exponent of P'.
  __device__ __forceinline__ RowValues rows_of(const Stage& smem, const BackwardParams& p, const DbiasStep& step) const {
    float factor = 1.0f;
    if constexpr (Config::kFloat) {
      factor = 1.0f / scales_of<Config>(p, kv_head_of(p, step.head)).ds / row_scale(p, step.head.head);
    }
    RowValues rows;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const QueryRow row = query_row(smem.query_rows, row_of(m, half));
        rows.score[m][half] = row.score;
        rows.shift[m][half] = row.shift;
        if constexpr (Config::kFloat) rows.shift[m][half] += log2f(row.gradient * factor);
        rows.delta[m][half] = row.gradient != 0.0f ? row.offset * ptx::reciprocal_approx(row.gradient) : 0.0f;
      }
    }
    return rows;
  }

  template <bool kHidden>
  __device__ __forceinline__ void add_visible(const Stage& smem, const BackwardParams& p, const DbiasStep& step,
                                              int query0, int key0) {
    const RowValues rows = rows_of(smem, p, step);
    const QueryReader q(smem.q, row0_, 0), dout(smem.dout, row0_, 0);
    uint32_t held_q[Config::kHoldRows ? kSteps : 1][kPlanes * kM][4];
    uint32_t held_dout[Config::kHoldRows ? kSteps : 1][kPlanes * kM][4];
    if constexpr (Config::kHoldRows) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        load_rows(held_q[step], q, step);
        load_rows(held_dout[step], dout, step);
      }
    }
#pragma unroll
    for (int n0 = 0; n0 < kN; n0 += kChunk) {
      const KeyReader k(smem.k, column0_ + 8 * n0, 0), v(smem.v, column0_ + 8 * n0, 0);
      float s[kM][kChunk][4], dp[kM][kChunk][4];
      set_zero(s);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kChunk; ++n) {
#pragma unroll
          for (int r = 0; r < 4; ++r) dp[m][n][r] = rows.delta[m][r / 2];
        }
      }
      multiply(s, held_q, q, k);
      multiply(dp, held_dout, dout, v);
#pragma unroll
      for (int n = 0; n < kChunk; ++n) {
        const int column = column0_ + 8 * (n0 + n) + lane_ % 4 * 2;
        const float2 factors = *reinterpret_cast<const float2*>(smem.key_factor + column);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          const float2 low = values_of(bias_[m][n0 + n][0]), high = values_of(bias_[m][n0 + n][1]);
          const float bias[4] = {low.x, low.y, high.x, high.y};
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const float t = Config::kFoldsNorm ? s[m][n][r] * (r % 2 == 0 ? factors.x : factors.y) : s[m][n][r];
            float x = fmaf(t, rows.score[m][r / 2], fmaf(bias[r], kLog2e, rows.shift[m][r / 2]));
            if constexpr (kHidden) {
              const bool visible = (smem.visible[column / 32] >> (column % 32 + r % 2) & 1) &&
                                   (!p.causal || key0 + column + r % 2 <=
                                                     query0 + row_of(m, r / 2) + p.num_keys - p.num_queries);
              x = visible ? x : -INFINITY;
            }
            sum_[m][n0 + n][r] = fmaf(ptx::exp2_approx(x), dp[m][n][r], sum_[m][n0 + n][r]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ static void load_rows(uint32_t (&a)[kPlanes * kM][4], const QueryReader& rows, int step) {
#pragma unroll
    for (int i = 0; i < kPlanes * kM; ++i) rows.load(a[i], i / kM * Config::kQueries + 16 * (i % kM), 2 * step);
  }

  // acc += rows keys^T over the head dim, for kChunk n8 tiles of keys.
  template <int kHeld>
  __device__ __forceinline__ static void multiply(float (&acc)[kM][kChunk][4],
                                                  const uint32_t (&held)[kHeld][kPlanes * kM][4],
                                                  const QueryReader& rows, const KeyReader& keys) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[kPlanes * kM][4];
      if constexpr (Config::kHoldRows) {
#pragma unroll
        for (int i = 0; i < 4 * kPlanes * kM; ++i) a[i / 4][i % 4] = held[step][i / 4][i % 4];
      } else {
        load_rows(a, rows, step);
      }
#pragma unroll
      for (int n = 0; n < kChunk; n += 2) {
        uint32_t b[kPlanes][4];
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) keys.load(b[plane], plane * Config::kKeys + 8 * n, 2 * step);
#pragma unroll
        for (int m = 0; m < kM; ++m) multiply_pair<Operand, kPlanes, kM>(acc[m][n], acc[m][n + 1], a, m, b);
      }
    }
  }
};

// The tile out of shared memory, summed over its rows and columns where the bias is broadcast along them.
template <class Config>
__device__ __forceinline__ void write_tile(const float* tile, const BackwardParams& p, const DbiasOwner<Config>& owner) {
  constexpr int kStride = DbiasStorage<Config>::kStride;
  const int num_rows = min(Config::kQueries, p.num_queries - owner.q_blocks.first * Config::kQueries);
  const int num_columns = min(Config::kKeys, p.num_keys - owner.key_blocks.first * Config::kKeys);
  const int rows = p.dbias_query == 0 ? 1 : num_rows, row_span = p.dbias_query == 0 ? num_rows : 1;
  const int columns = p.dbias_key == 0 ? 1 : num_columns, column_span = p.dbias_key == 0 ? num_columns : 1;
  const int64_t offset = owner.offset(p);
  for (int i = threadIdx.x; i < rows * columns; i += Config::kThreads) {
    const int row = i / columns, column = i % columns;
    float sum = 0.0f;
    for (int r = row; r < row + row_span; ++r) {
      for (int c = column; c < column + column_span; ++c) sum += tile[r * kStride + c];
    }
    store_dbias<Config>(p, offset + row * p.dbias_query + column * p.dbias_key, sum);
  }
}

// The sums of a block of threads, to the workspace of the parts or to the gradient.
template <class Config, class Warp>
__device__ __forceinline__ void finish_dbias(const Warp& warp, DbiasStorage<Config>& storage, const BackwardParams& p,
                                             const DbiasParts& parts, const DbiasOwner<Config>& owner) {
  if (parts.count > 1) {
    warp.store_part(reinterpret_cast<float4*>(p.dbias_parts) + blockIdx.x * (Config::kTileFloats / 4));
    return;
  }
  __syncthreads();
  warp.store_tile(storage.tile);
  __syncthreads();
  write_tile<Config>(storage.tile, p, owner);
}

// Of a part of the sharers; grid: tiles, then parts.
template <class Config, class Value>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    backward_dbias_kernel(const __grid_constant__ BackwardParams p, const DbiasParts parts) {
  extern __shared__ __align__(128) char shared_memory[];
  using Storage = DbiasStorage<Config>;
  constexpr int kStages = Config::kStages;
  Storage& storage = *reinterpret_cast<Storage*>(shared_memory);
  const DbiasOwner<Config> owner(p, blockIdx.x % parts.tiles);
  const int part = blockIdx.x / parts.tiles, first = part * parts.sharers_a_part;
  const int end = min(first + parts.sharers_a_part, owner.num_sharers());
  DbiasWarp<Config, Value> warp;

  DbiasStep next = owner.sharer(first);
  owner.skip_hidden(p, next, end);
  DbiasSources<Config> from(p, next);
  if (next.index < end) load_step<Config>(storage.stage[0], p, from, next);
  ptx::cp_async_commit();
  warp.start(p, owner.sharer(0));  // while the first operands are on their way
#pragma unroll 1
  for (int stage = 0; next.index < end; stage = (stage + 1) % kStages) {
    const DbiasStep step = next;
    if (parts.row.is_linear) {
      ++next.index, next.head.b0 += parts.row.b0, next.head.b1 += parts.row.b1;
      from.advance(parts.row);
    } else {
      owner.advance(next);
      owner.skip_hidden(p, next, end);
      from = DbiasSources<Config>(p, next);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step's operands are there; nobody reads those of the step before
    if (kStages == 2 && next.index < end) load_step<Config>(storage.stage[(stage + 1) % kStages], p, from, next);
    warp.add(storage.stage[stage], p, step);
    if constexpr (kStages == 1) {
      __syncthreads();  // nobody reads these operands any more
      if (next.index < end) load_step<Config>(storage.stage[0], p, from, next);
    }
    ptx::cp_async_commit();
  }
  finish_dbias(warp, storage, p, parts, owner);
}

// Where few share a tile and there are many: a block takes one tile after the other, and the next tile's operands are on
// their way while this one's last sharer is added. Of a bias that has queries and keys.
template <class Config, class Value>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    backward_dbias_tiles_kernel(const __grid_constant__ BackwardParams p, const DbiasParts parts) {
  extern __shared__ __align__(128) char shared_memory[];
  static_assert(Config::kStages == 2);
  auto& stages = reinterpret_cast<DbiasStorage<Config>*>(shared_memory)->stage;
  DbiasWarp<Config, Value> warp;
  const int sharers = DbiasOwner<Config>(p, 0).num_sharers();
  // The first sharer of a tile that is not hidden, or index `sharers`; its operands are then on their way.
  const auto begin_tile = [&](int tile, int stage) {
    const DbiasOwner<Config> owner(p, tile);
    DbiasStep step = owner.sharer(0);
    owner.skip_hidden(p, step, sharers);
    if (step.index < sharers) load_step<Config>(stages[stage], p, DbiasSources<Config>(p, step), step);
    ptx::cp_async_commit();
    return step;
  };

  int stage = 0, tile = blockIdx.x;
  DbiasStep next = begin_tile(tile, stage);
#pragma unroll 1
  while (tile < parts.tiles) {
    const DbiasOwner<Config> owner(p, tile);
    warp.start(p, owner.sharer(0));
    const int next_tile = tile + gridDim.x;
    bool has_begun = false;  // the next tile
    DbiasStep step = next;
#pragma unroll 1
    while (step.index < sharers) {
      DbiasStep after = step;
      owner.advance(after);
      owner.skip_hidden(p, after, sharers);
      ptx::cp_async_wait<0>();
      __syncthreads();  // this step's operands are there; nobody reads those of the step before
      if (after.index < sharers) {
        load_step<Config>(stages[stage ^ 1], p, DbiasSources<Config>(p, after), after);
        ptx::cp_async_commit();
      } else if (next_tile < parts.tiles) {
        next = begin_tile(next_tile, stage ^ 1);
        has_begun = true;
      }
      warp.add(stages[stage], p, step);
      stage ^= 1, step = after;
    }
    if (!has_begun && next_tile < parts.tiles) next = begin_tile(next_tile, stage);  // all of this one is hidden
    warp.store_rows(p, owner);
    tile = next_tile;
  }
}

// Adds the parts of one tile up, in their order.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    backward_dbias_sum_kernel(const __grid_constant__ BackwardParams p, const DbiasParts parts) {
  extern __shared__ __align__(128) char shared_memory[];
  float* tile = reinterpret_cast<DbiasStorage<Config>*>(shared_memory)->tile;
  constexpr int64_t kTileFours = Config::kTileFloats / 4;
  DbiasWarp<Config> warp;
  warp.load_parts(reinterpret_cast<const float4*>(p.dbias_parts) + blockIdx.x * kTileFours, parts.count,
                  parts.tiles * kTileFours);
  warp.store_tile(tile);
  __syncthreads();
  write_tile<Config>(tile, p, DbiasOwner<Config>(p, blockIdx.x));
}

// The same for a bias that has queries and keys: one fragment of the accumulators a block, each element for itself.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    backward_dbias_sum_fragments_kernel(const __grid_constant__ BackwardParams p, const DbiasParts parts) {
  constexpr int kFragments = Config::kM * Config::kN;
  constexpr int64_t kTileFours = Config::kTileFloats / 4;
  const int fragment = blockIdx.x % kFragments;
  const DbiasOwner<Config> owner(p, blockIdx.x / kFragments);
  const float4* part = reinterpret_cast<const float4*>(p.dbias_parts) + blockIdx.x / kFragments * kTileFours +
                       fragment * Config::kThreads + threadIdx.x;
  float sum[4] = {};
#pragma unroll 4
  for (int i = 0; i < parts.count; ++i) {
    const float4 x = part[i * parts.tiles * kTileFours];
    sum[0] += x.x, sum[1] += x.y, sum[2] += x.z, sum[3] += x.w;
  }
  DbiasWarp<Config> warp;
  const int64_t offset = owner.offset(p);
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int row = warp.row_of(fragment / Config::kN, r / 2), column = warp.column_of(fragment % Config::kN, r % 2);
    const bool valid = owner.q_blocks.first * Config::kQueries + row < p.num_queries &&
                       owner.key_blocks.first * Config::kKeys + column < p.num_keys;
    if (valid) store_dbias<Config>(p, offset + row * p.dbias_query + column * p.dbias_key, sum[r]);
  }
}

// Adds up the sums of the parts, where there are several.
template <class Config>
cudaError_t launch_dbias_sum(const BackwardParams& p, const DbiasParts& parts, cudaStream_t stream) {
  const int64_t tiles = parts.tiles;
  if (parts.count == 1) return cudaSuccess;
  if (p.dbias_query == 0 || p.dbias_key == 0) {
    return launch_blocks<backward_dbias_sum_kernel<Config>>(p, parts, tiles, Config::kThreads,
                                                            sizeof(DbiasStorage<Config>::tile), stream);
  }
  return launch_blocks<backward_dbias_sum_fragments_kernel<Config>>(p, parts, tiles * Config::kM * Config::kN,
                                                                    Config::kThreads, 0, stream);
}

template <class Config, class Value>
cudaError_t launch_dbias_tiles(const BackwardParams& p, cudaStream_t stream) {
  int multiprocessors = 1;
  cudaError_t error = multiprocessor_count(&multiprocessors);
  if (error != cudaSuccess) return error;
  const DbiasParts parts = dbias_parts<Config>(p, multiprocessors);
  if (parts.count == 0) return cudaErrorInvalidConfiguration;
  const int64_t tiles = parts.tiles;
  constexpr int kBytes = sizeof(DbiasStorage<Config>);
  if constexpr (Config::kStages == 2 && Config::kDepth > 32) {
    if (parts.count == 1 && p.dbias_query != 0 && p.dbias_key != 0) {
      const int64_t blocks = min(tiles, static_cast<int64_t>(multiprocessors) * Config::kMinBlocks);
      return launch_blocks<backward_dbias_tiles_kernel<Config, Value>>(p, parts, blocks, Config::kThreads, kBytes, stream);
    }
  }
  error = launch_blocks<backward_dbias_kernel<Config, Value>>(p, parts, tiles * parts.count, Config::kThreads, kBytes, stream);
  return error != cudaSuccess ? error : launch_dbias_sum<Config>(p, parts, stream);
}

template <class Config>
cudaError_t launch_dbias_of_type(const BackwardParams& p, cudaStream_t stream) {
  if constexpr (!Config::kFloat) {
    if (!p.bias_is_float32) return launch_dbias_tiles<Config, typename Config::Element>(p, stream);
  }
  return launch_dbias_tiles<Config, float>(p, stream);
}

template <class Traits>
cudaError_t launch_dbias(const BackwardParams& p, cudaStream_t stream) {
  using Large = DbiasConfig<Traits, false>;
  using Small = DbiasConfig<Traits, true>;
  static_assert(sizeof(DbiasStorage<Small>) <= kSmallSharedMemory && sizeof(DbiasStorage<Large>) <= 163 * 1024);
  if constexpr (sizeof(DbiasStorage<Large>) > kSmallSharedMemory) {
    int device = 0, limit = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (error != cudaSuccess) return error;
    if (limit < static_cast<int>(sizeof(DbiasStorage<Large>))) return launch_dbias_of_type<Small>(p, stream);
  }
  return launch_dbias_of_type<Large>(p, stream);
}

}  // namespace fcsa::sm80
