// The main kernel of the backward: dk and dv of a block of keys in registers, dq by additions to a float accumulator.
//
// One block of threads owns (b0, b1, kv head, kBlockK keys) and walks over the query heads of its kv head and their
// query blocks that can see its keys. Scores are transposed: a warp's accumulators are operands of the next product.
//
//   S^T (keys x queries) = K Q^T          P^T  = exp2(S^T factors + shift)
//   dP^T                 = V dO^T         dS'^T = P^T (dP^T gradient + offset) k_factor
//   dv += P^T dO          dk += dS'^T Q          dq (queries x d) = dS' K, dS' through shared memory
#pragma once

#include "../common/diagonal_window.cuh"
#include "backward_dq_accum.cuh"
#include "backward_tiles.cuh"
#include "backward_traits.cuh"

namespace fcsa::sm80 {

// Shared memory that a configuration may not have: an empty base takes no room.
template <bool kPresent, class Tile>
struct PTile {};
template <class Tile>
struct PTile<true, Tile> {
  Tile p;  // exchanged among the warps that share keys
};
template <bool kPresent, class Tile>
struct BiasTile {};
template <class Tile>
struct BiasTile<true, Tile> {
  Tile bias;  // queries in rows
};

template <class Config>
struct DkDvStorage {
  using Operand = typename Config::Operand;
  using KeyTile = SmemTile<Operand, Config::kPlanes * Config::kBlockK, Config::kHeadDim>;
  using QueryTile = SmemTile<Operand, Config::kPlanes * Config::kBlockQ, Config::kHeadDim>;
  using ScoreTile = SmemTile<Operand, Config::kPlanes * Config::kBlockK, Config::kBlockQ>;
  using BiasSmemTile = SmemTile<Operand, Config::kBlockQ, Config::kBlockK>;
  struct Tiles {
    KeyTile k, v;
    QueryTile q[Config::kStages], dout[Config::kStages];
    ScoreTile ds;
    float4 query_rows[Config::kBlockQ];
  };
  static_assert(sizeof(Tiles) % 128 == 0, "tiles begin where their swizzle repeats");
  struct Loop : Tiles, PTile<Config::kSplit != 1, ScoreTile>, BiasTile<Config::kStagedBias, BiasSmemTile> {};
  static constexpr int kStride = Config::kHeadDim + 8;  // spreads the rows of a fragment over the banks
  union {
    Loop loop;
    float epilogue[Config::kBlockK * kStride];  // dv, then dk
  };
};

struct QueryStep {
  int head, q_block;  // within the kv head's group; block of kBlockQ queries
};

// Where a block of threads stands, and what it wants.
template <class Config>
struct DkDvWork {
  TileIndex index;  // head: kv head; tile: key block
  int key0;         // first key of the block
  int key_limit;    // keys of the block that exist
  int first_q_block, num_q_blocks;  // query blocks that can see a key of the block: per query head
  int group;        // query heads of the kv head
  bool wants_dk, wants_dv, wants_dq;

  __device__ __forceinline__ DkDvWork(const BackwardParams& p, uint32_t block)
      : index(TileIndex::from_block(block, ceil_div(p.num_keys, Config::kBlockK), p.kv_heads, p.b1)),
        key0(index.tile * Config::kBlockK),
        key_limit(min(Config::kBlockK, p.num_keys - key0)),
        group(p.heads / p.kv_heads),
        wants_dk(p.dk != nullptr),
        wants_dv(p.dv != nullptr),
        wants_dq(p.dq_accum != nullptr) {
    const int first_query = p.causal ? max(0, key0 - (p.num_keys - p.num_queries)) : 0;
    first_q_block = first_query / Config::kBlockQ;
    num_q_blocks = max(0, ceil_div(p.num_queries, Config::kBlockQ) - first_q_block);
  }

  __device__ __forceinline__ TileIndex query_head(const QueryStep& step) const {
    TileIndex result = index;
    result.head = index.head * group + step.head;
    return result;
  }

  // The walk: query blocks of the first query head, then of the next.
  __device__ __forceinline__ QueryStep first() const { return {0, first_q_block}; }
  __device__ __forceinline__ QueryStep after(const QueryStep& step) const {
    if (step.q_block + 1 < first_q_block + num_q_blocks) return {step.head, step.q_block + 1};
    return {step.head + 1, first_q_block};
  }
};

// q and dout of one step, with cp.async (not committed).
template <class Config>
__device__ __forceinline__ void load_queries(typename DkDvStorage<Config>::Loop& smem, const BackwardParams& p,
                                             const DkDvWork<Config>& work, const QueryStep& step, int stage) {
  const TileIndex head = work.query_head(step);
  const int query0 = step.q_block * Config::kBlockQ, num_rows = p.num_queries - query0;
  const auto q = query_operand<Config>(p, head).from(query0), dout = dout_operand<Config>(p, head).from(query0);
  copy_rows_async<Config::kThreads, Config::kPlanes>(smem.q[stage], q, num_rows, p.head_dim);
  copy_rows_async<Config::kThreads, Config::kPlanes>(smem.dout[stage], dout, num_rows, p.head_dim);
}

// What is needed of a step until its scores are done: the records of its queries, and the bias.
template <class Config>
__device__ __forceinline__ void load_query_rows(typename DkDvStorage<Config>::Loop& smem, const BackwardParams& p,
                                                const DkDvWork<Config>& work, const QueryStep& step) {
  const int64_t row = work.query_head(step).first_row(p.b1, p.heads, padded_queries(p.num_queries));
  const int query0 = step.q_block * Config::kBlockQ;
  copy_query_rows_async(smem.query_rows, p.query_rows + row + query0);
  if constexpr (Config::kStagedBias) {
    const BiasReader<Config> bias(p, work.query_head(step));
    const auto* base = static_cast<const typename Config::Operand*>(bias.base) + query0 * p.bias_query + work.key0;
    const Rows<typename Config::Operand> rows = {base, p.bias_query, 0};
    copy_rows_async<Config::kThreads, 1>(smem.bias, rows, p.num_queries - query0, work.key_limit);
  }
}

template <class Config>
__device__ __forceinline__ void load_keys(typename DkDvStorage<Config>::Loop& smem, const BackwardParams& p,
                                          const DkDvWork<Config>& work) {
  const auto k = key_operand<Config>(p, work.index).from(work.key0);
  const auto v = value_operand<Config>(p, work.index).from(work.key0);
  const uint8_t* mask = mask_row(p, work.index);
  if (mask != nullptr) mask += work.key0 * p.mask_key;
  copy_rows_async<Config::kThreads, Config::kPlanes>(smem.k, k, work.key_limit, p.head_dim, mask, p.mask_key);
  copy_rows_async<Config::kThreads, Config::kPlanes>(smem.v, v, work.key_limit, p.head_dim, mask, p.mask_key);
}

// What a thread knows of its keys: row 8 half + lane / 4 of m16 tile m.
template <class Config>
struct ThreadKeys {
  float factor[Config::kKeyTiles][2];  // k_rnorm where the norm is folded; 0 for keys that are not there
  uint32_t visible = 0;                // bit 2 m + half

  __device__ __forceinline__ ThreadKeys(const BackwardParams& p, const DkDvWork<Config>& work, int first_key) {
    const uint8_t* mask = mask_row(p, work.index);
    const int64_t row0 = work.index.first_row(p.b1, p.kv_heads, p.num_keys) + work.key0;
    const bool folded = Config::kFoldsNorm && norm_is_folded<Config>(p);
#pragma unroll
    for (int i = 0; i < 2 * Config::kKeyTiles; ++i) {
      const int key = first_key + 8 * i + threadIdx.x % 32 / 4;
      bool is_visible = key < work.key_limit;
      if (is_visible && mask != nullptr) is_visible = mask[(work.key0 + key) * p.mask_key] != 0;
      visible |= static_cast<uint32_t>(is_visible) << i;
      factor[i / 2][i % 2] = !is_visible ? 0.0f : folded ? folded_factor<Config>(p.k_rnorm[row0 + key]) : 1.0f;
    }
  }

  __device__ __forceinline__ bool all_visible() const { return visible == (1u << 2 * Config::kKeyTiles) - 1; }
};

// Calls function(n) for the share `part` of `parts` of a warp's n8 tiles of scores.
template <int kN, class Function>
__device__ __forceinline__ void for_tiles(int part, int parts, Function function) {
  const int per_part = (kN + parts - 1) / parts;
#pragma unroll
  for (int n = part * per_part; n < (part + 1) * per_part; ++n) {
    if (n < kN) function(n);
  }
}

// The bias of a warp's chunk of scores, in the base of the logits.
template <class Config>
struct ChunkBias {
  BiasReader<Config> reader;
  int query0, key0;  // of the chunk
  uint32_t tile;     // staged: address of this lane's row and 16-byte chunk of n8 tile 0
  const char* packed;  // this lane's values of the fragment that the chunk begins with; nullptr: not packed
  int last;            // of the chunk's fragments, the last that exists
  // Of float32, whose values are read ahead.
  float4 ahead[Config::kFloat ? Config::kKeyTiles : 1][Config::kFloat ? Config::kChunkQ / 8 : 1];

  // The four of tile (m, n).
  __device__ __forceinline__ float4 packed_values(int m, int n) const {
    using Element = typename Config::Element;
    const int index = min(n / 2, last) * kFragment + m * 8 + n % 2 * 4;
    if (Config::kFloat || reader.is_float32) return *reinterpret_cast<const float4*>(packed + index * 4);
    const uint2 pairs = *reinterpret_cast<const uint2*>(packed + index * 2);
    const float2 low = unpack<typename Config::Operand>(pairs.x), high = unpack<typename Config::Operand>(pairs.y);
    return make_float4(low.x, low.y, high.x, high.y);
  }

  // All of n8 tile n: x[m][half][c].
  __device__ __forceinline__ void read(float (&x)[Config::kKeyTiles][2][2], int n) const {
    if constexpr (Config::kStagedBias) {
      static_assert(Config::kKeyTiles == 2);
      uint32_t pairs[4];  // stored with queries in rows; two neighbouring queries of keys 8 i + lane / 4
      ptx::ldmatrix_x4_trans(pairs, tile + 8 * n * DkDvStorage<Config>::BiasSmemTile::kPanelCols * 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack<typename Config::Operand>(pairs[i]);
        x[i / 2][i % 2][0] = pair.x * kLog2e, x[i / 2][i % 2][1] = pair.y * kLog2e;
      }
    } else if (packed != nullptr) {
#pragma unroll
      for (int m = 0; m < Config::kKeyTiles; ++m) {
        const float4 values = Config::kFloat ? ahead[m % (Config::kFloat ? Config::kKeyTiles : 1)][n] : packed_values(m, n);
        x[m][0][0] = values.x * kLog2e, x[m][0][1] = values.y * kLog2e;
        x[m][1][0] = values.z * kLog2e, x[m][1][1] = values.w * kLog2e;
      }
    } else {
      const int lane = threadIdx.x % 32;
#pragma unroll
      for (int m = 0; m < Config::kKeyTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[m][i / 2][i % 2] =
              reader(query0 + 8 * n + lane % 4 * 2 + i % 2, key0 + 16 * m + i / 2 * 8 + lane / 4);
        }
      }
    }
  }
};

// The same of a bias by its diagonals. Element (m, half, n, c) lies on diagonal 8 (2 m + half - n) - c.
template <class Config>
struct ToeplitzChunkBias {
  static constexpr int kBelow = Config::kChunkQ / 8 - 1;
  DiagonalWindow<2 * Config::kKeyTiles + kBelow> window;

  __device__ __forceinline__ void read(float (&x)[Config::kKeyTiles][2][2], int n) const {
#pragma unroll
    for (int m = 0; m < Config::kKeyTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[m][i / 2][i % 2] = window.values[2 * m + i / 2 - n + kBelow][1 - i % 2];
    }
  }
};

template <class Config>
__device__ __forceinline__ ToeplitzChunkBias<Config> toeplitz_chunk_bias(const BackwardParams& p,
                                                                         const BiasReader<Config>& reader, int query0,
                                                                         int key0) {
  ToeplitzChunkBias<Config> bias;
  const int key_minus_query = key0 + threadIdx.x % 32 / 4 - query0 - threadIdx.x % 4 * 2;
  bias.window.load(p, static_cast<const float*>(reader.base),
                   key_minus_query - 8 * ToeplitzChunkBias<Config>::kBelow - 1);
  return bias;
}

template <class Config>
__device__ __forceinline__ ChunkBias<Config> chunk_bias(const typename DkDvStorage<Config>::Loop& smem,
                                                        const BiasReader<Config>& reader, int query0, int key0, int row,
                                                        int first_key) {
  ChunkBias<Config> bias = {reader, query0, key0, 0, nullptr, 0};
  if constexpr (Config::kStagedBias) {
    const int lane = threadIdx.x % 32;
    bias.tile = smem.bias.chunk_address(row + lane % 8, first_key / 8 + lane / 8);
  } else if (Config::kHasBias && reader.packed != nullptr) {
    const int fragment = min(query0 / 16, reader.query_fragments - 1), key_fragment = min(key0 / 32, reader.key_fragments - 1);
    const int64_t index = (static_cast<int64_t>(key_fragment) * reader.query_fragments + fragment) * kFragment +
                          threadIdx.x % 32 * 16 + key0 / 16 % 2 * 8;
    bias.packed = reader.packed + index * (reader.is_float32 ? 4 : 2);
    bias.last = reader.query_fragments - 1 - fragment;
    if constexpr (Config::kFloat) {
#pragma unroll
      for (int m = 0; m < Config::kKeyTiles; ++m) {
#pragma unroll
        for (int n = 0; n < Config::kChunkQ / 8; ++n) bias.ahead[m][n] = bias.packed_values(m, n);
      }
    }
  }
  return bias;
}

// P^T in place of S^T, in n8 tile n. rows: records of the chunk's queries.
template <class Config, int kN, class Bias>
__device__ __forceinline__ void exponentiate(float (&s)[Config::kKeyTiles][kN][4], int n,
                                             const ThreadKeys<Config>& keys, const float4* rows,
                                             const Bias& bias) {
  const float4 pair = rows[8 * n + threadIdx.x % 4 * 2];
  const float score[2] = {pair.x, pair.y}, row_shift[2] = {pair.z, pair.w};
  float tile_bias[Config::kKeyTiles][2][2] = {};
  if constexpr (Config::kHasBias) bias.read(tile_bias, n);
#pragma unroll
  for (int m = 0; m < Config::kKeyTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float& x = s[m][n][r];
      const float t = Config::kFoldsNorm ? x * keys.factor[m][r / 2] : x;
      const float shift = Config::kHasBias ? row_shift[r % 2] + tile_bias[m][r / 2][r % 2] : row_shift[r % 2];
      x = ptx::exp2_approx(fmaf(t, score[r % 2], shift));
    }
  }
}

// dS'^T in place of dP^T, in n8 tile n.
template <class Config, int kN>
__device__ __forceinline__ void differentiate(float (&dp)[Config::kKeyTiles][kN][4],
                                              const float (&p)[Config::kKeyTiles][kN][4], int n,
                                              const ThreadKeys<Config>& keys, const float4* rows) {
  const float4 pair = rows[8 * n + threadIdx.x % 4 * 2 + 1];
  const float gradient[2] = {pair.x, pair.y}, offset[2] = {pair.z, pair.w};
#pragma unroll
  for (int m = 0; m < Config::kKeyTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float& x = dp[m][n][r];
      x = p[m][n][r] * fmaf(x, gradient[r % 2], offset[r % 2]);
      if constexpr (Config::kFoldsNorm) x *= keys.factor[m][r / 2];
    }
  }
}

// P = 0 where a query does not see a key.
template <class Config, int kN>
__device__ __forceinline__ void hide(float (&p)[Config::kKeyTiles][kN][4], const ThreadKeys<Config>& keys,
                                     const BackwardParams& params, int query0, int key0) {
  const int lane = threadIdx.x % 32, last = params.num_keys - params.num_queries;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int m = 0; m < Config::kKeyTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int query = query0 + 8 * n + lane % 4 * 2 + r % 2, key = key0 + 16 * m + r / 2 * 8 + lane / 4;
        const bool visible = (keys.visible >> (2 * m + r / 2) & 1) && (!params.causal || key <= query + last);
        if (!visible) p[m][n][r] = 0.0f;
      }
    }
  }
}

// dq += dS' K for the whole block; everyone has written dS'.
template <class Config>
__device__ __forceinline__ void accumulate_dq(const typename DkDvStorage<Config>::Loop& smem, float* dq_accum) {
  using Storage = DkDvStorage<Config>;
  const int warp = threadIdx.x / 32, warp_n = warp % Config::kDqWarpsN, warp_m = warp / Config::kDqWarpsN;
  const ChunksReader<typename Storage::ScoreTile> ds(smem.ds, 0, warp_m * Config::kDqRowTiles * 2);
  const RowsReader<typename Storage::KeyTile> k(smem.k, 0, warp_n * 2);
  float acc[Config::kDqRowTiles][2 * Config::kDqColumnPairs][4];
  set_zero(acc);
#pragma unroll
  for (int step = 0; step < Config::kBlockK / 16; ++step) {
    uint32_t fragment[Config::kPlanes * Config::kDqRowTiles][4];
#pragma unroll
    for (int i = 0; i < Config::kPlanes * Config::kDqRowTiles; ++i) {
      const int plane = i / Config::kDqRowTiles, m = i % Config::kDqRowTiles;
      ds.load_transposed(fragment[i], plane * Config::kBlockK + 16 * step, 2 * m);
    }
    multiply_step<typename Config::Operand, Config::kPlanes, Config::kDqWarpsN>(acc, fragment, k, 16 * step);
  }
#pragma unroll
  for (int m = 0; m < Config::kDqRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < 2 * Config::kDqColumnPairs; ++n) {
      const int fragment = m * 2 * Config::kDqColumnPairs + n;
      add_fragment<Config::kThreads>(dq_accum, fragment, acc[m][n]);
    }
  }
}

// A warp's accumulators into the tile of the epilogue.
template <class Config>
__device__ __forceinline__ void stage_keys(float* tile,
                                           const float (&acc)[Config::kKeyTiles][2 * Config::kColumnPairs][4],
                                           int first_key, int part) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < Config::kKeyTiles; ++m) {
#pragma unroll
    for (int n = 0; n < 2 * Config::kColumnPairs; ++n) {
      const int column = 16 * (n / 2 * Config::kSplit + part) + n % 2 * 8 + lane % 4 * 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_key + 16 * m + 8 * half + lane / 4;
        *reinterpret_cast<float2*>(tile + row * DkDvStorage<Config>::kStride + column) =
            make_float2(acc[m][n][2 * half], acc[m][n][2 * half + 1]);
      }
    }
  }
}

template <class Config>
__device__ __forceinline__ void write_dv(const float* tile, const BackwardParams& p, const DkDvWork<Config>& work) {
  using Element = typename Config::Element;
  constexpr int kChunks = Config::kHeadDim / 8;
  const float inverse = 1.0f / scales_of<Config>(p, work.index).dout;
  Element* target = static_cast<Element*>(p.dv) + work.index.offset(p.dv_strides) + work.key0 * p.dv_strides.row;
  for (int i = threadIdx.x; i < Config::kBlockK * kChunks; i += Config::kThreads) {
    const int row = i / kChunks, column = i % kChunks * 8;
    if (row >= work.key_limit || column >= p.head_dim) continue;
    float x[8];
    load8(x, tile + row * DkDvStorage<Config>::kStride + column);
#pragma unroll
    for (int c = 0; c < 8; ++c) x[c] = x[c] * (1.0f / Config::kProbabilityScale) * inverse;
    store8(target + row * p.dv_strides.row + column, x);
  }
}

template <class Config>
__device__ __forceinline__ void write_dk(float* tile, const BackwardParams& p, const DkDvWork<Config>& work) {
  const auto rows =
      backward::projected_keys<Config>(p, work.index, work.key0, work.key_limit, mask_row(p, work.index));
  backward::project_rows<typename Config::Element, Config::kHeadDim, Config::kBlockK,
                         backward::BlockTeam<Config::kThreads>>(tile, DkDvStorage<Config>::kStride, rows);
}

// dv += P^T dO and dk += dS'^T Q over the queries of the parts that other warps of the same keys computed.
template <class Config>
__device__ __forceinline__ void accumulate_other_parts(const typename DkDvStorage<Config>::Loop& smem, int stage,
                                                       float (&dk)[Config::kKeyTiles][2 * Config::kColumnPairs][4],
                                                       float (&dv)[Config::kKeyTiles][2 * Config::kColumnPairs][4],
                                                       bool wants_dk, bool wants_dv, int first_key, int own_part) {
  using Operand = typename Config::Operand;
  using Storage = DkDvStorage<Config>;
#pragma unroll 1
  for (int other = 1; other < Config::kSplit; ++other) {
    const int part = (own_part + other) % Config::kSplit, row = part * Config::kPartQ;
    uint32_t fragment[Config::kPlanes * Config::kKeyTiles][4];
    if (wants_dv) {
      const RowsReader<typename Storage::ScoreTile> p(smem.p, first_key, row / 8);
      const RowsReader<typename Storage::QueryTile> dout(smem.dout[stage], row, 2 * own_part);
#pragma unroll
      for (int query = 0; query < Config::kPartQ; query += 16) {
#pragma unroll
        for (int i = 0; i < Config::kPlanes * Config::kKeyTiles; ++i) {
          p.load(fragment[i], i / Config::kKeyTiles * Config::kBlockK + 16 * (i % Config::kKeyTiles), query / 8);
        }
        multiply_step<Operand, Config::kPlanes, Config::kSplit>(dv, fragment, dout, query);
      }
    }
    if (wants_dk) {
      const RowsReader<typename Storage::ScoreTile> ds(smem.ds, first_key, row / 8);
      const RowsReader<typename Storage::QueryTile> q(smem.q[stage], row, 2 * own_part);
#pragma unroll
      for (int query = 0; query < Config::kPartQ; query += 16) {
#pragma unroll
        for (int i = 0; i < Config::kPlanes * Config::kKeyTiles; ++i) {
          ds.load(fragment[i], i / Config::kKeyTiles * Config::kBlockK + 16 * (i % Config::kKeyTiles), query / 8);
        }
        multiply_step<Operand, Config::kPlanes, Config::kSplit>(dk, fragment, q, query);
      }
    }
  }
}

// What one warp does with kChunkQ queries from `row` of the query block on: their P and dS' with its keys, added to dv
// and dk, and stored for other warps. The products and the arithmetic beside them are interleaved by hand, in the order
// in which they may run.
template <class Config>
__device__ __forceinline__ void accumulate_chunk(typename DkDvStorage<Config>::Loop& smem, int stage, int row,
                                                 float (&dk)[Config::kKeyTiles][2 * Config::kColumnPairs][4],
                                                 float (&dv)[Config::kKeyTiles][2 * Config::kColumnPairs][4],
                                                 const BackwardParams& params, const DkDvWork<Config>& work,
                                                 const ThreadKeys<Config>& keys, const BiasReader<Config>& reader,
                                                 bool has_hidden, bool wants_dk, int query0, int first_key, int part) {
  using Operand = typename Config::Operand;
  using Storage = DkDvStorage<Config>;
  using QueryTile = typename Storage::QueryTile;
  using KeyTile = typename Storage::KeyTile;
  constexpr int kPlanes = Config::kPlanes, kOperandTiles = kPlanes * Config::kKeyTiles;
  constexpr int kN = Config::kChunkQ / 8, kSteps = kN / 2, kPairs = Config::kColumnPairs;
  const float4* rows = smem.query_rows + row;
  const int key0 = work.key0 + first_key;
  const bool wants_dv = Config::kAll || work.wants_dv, wants_ds = Config::kAll || wants_dk || work.wants_dq;
  float p[Config::kKeyTiles][kN][4], ds[Config::kKeyTiles][kN][4];
  uint32_t p_operand[kSteps][kOperandTiles][4], ds_operand[kSteps][kOperandTiles][4];

  const auto bias = [&] {
    if constexpr (Config::kToeplitz) {
      return toeplitz_chunk_bias<Config>(params, reader, query0 + row, key0);
    } else {
      return chunk_bias<Config>(smem, reader, query0 + row, key0, row, first_key);
    }
  }();
  set_zero(p);
  multiply_rows<Operand, kPlanes, Config::kHeadDim>(p, RowsReader<KeyTile>(smem.k, first_key, 0),
                                                    ChunksReader<QueryTile>(smem.q[stage], row, 0));
  const auto exponentiate_part = [&](int i, int parts) {
    for_tiles<kN>(i, parts, [&](int n) { exponentiate<Config>(p, n, keys, rows, bias); });
  };
  set_zero(ds);
  if (wants_ds) {
    multiply_rows<Operand, kPlanes, Config::kHeadDim>(ds, RowsReader<KeyTile>(smem.v, first_key, 0),
                                                      ChunksReader<QueryTile>(smem.dout[stage], row, 0),
                                                      exponentiate_part);
  } else {
    exponentiate_part(0, 1);
  }
  if (has_hidden) hide<Config>(p, keys, params, query0 + row, key0);

  to_operand<Operand, kPlanes>(p_operand, p);
  if constexpr (Config::kSplit > 1) store_operand<kPlanes>(smem.p, p_operand, first_key, row);
  const auto differentiate_part = [&](int i, int parts) {
    for_tiles<kN>(i, parts, [&](int n) { differentiate<Config>(ds, p, n, keys, rows); });
  };
  if (wants_dv) {
    const RowsReader<QueryTile> dout(smem.dout[stage], row, 2 * part);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      multiply_step<Operand, kPlanes, Config::kSplit>(dv, p_operand[i], dout, 16 * i, [&](int pair, int) {
        differentiate_part(i * kPairs + pair, kSteps * kPairs);
      });
    }
  } else {
    differentiate_part(0, 1);
  }
  if (!wants_ds) return;
  to_operand<Operand, kPlanes>(ds_operand, ds);
  store_operand<kPlanes>(smem.ds, ds_operand, first_key, row);
  if (Config::kAll || wants_dk) {
    const RowsReader<QueryTile> q(smem.q[stage], row, 2 * part);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) multiply_step<Operand, kPlanes, Config::kSplit>(dk, ds_operand[i], q, 16 * i);
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    backward_dkdv_kernel(const __grid_constant__ BackwardParams params) {
  using Storage = DkDvStorage<Config>;
  constexpr int kColumns = 2 * Config::kColumnPairs;
  extern __shared__ __align__(128) char shared_memory[];
  Storage& storage = *reinterpret_cast<Storage*>(shared_memory);
  typename Storage::Loop& smem = storage.loop;

  const DkDvWork<Config> work(params, blockIdx.x);
  const int part = threadIdx.x / 32 / Config::kKeyWarps;
  const int first_key = threadIdx.x / 32 % Config::kKeyWarps * Config::kKeysPerWarp;
  const int num_steps = work.num_q_blocks * work.group;

  QueryStep next = work.first();
  if (num_steps > 0) {
    load_keys<Config>(smem, params, work);
    load_queries<Config>(smem, params, work, next, 0);
    load_query_rows<Config>(smem, params, work, next);
  }
  ptx::cp_async_commit();
  const ThreadKeys<Config> keys(params, work, first_key);
  float dk[Config::kKeyTiles][kColumns][4], dv[Config::kKeyTiles][kColumns][4];
  set_zero(dk);
  set_zero(dv);

#pragma unroll 1
  for (int step_idx = 0; step_idx < num_steps; ++step_idx) {
    const QueryStep step = next;
    const int stage = step_idx % Config::kStages;
    const bool is_last = step_idx + 1 == num_steps;
    next = work.after(step);
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step's tiles are there; nobody reads those of the step before, nor its dS
    if (Config::kStages > 1 && !is_last) load_queries<Config>(smem, params, work, next, stage ^ 1);

    const TileIndex head = work.query_head(step);
    const int query0 = step.q_block * Config::kBlockQ;
    const bool on_diagonal =
        params.causal && work.key0 + Config::kBlockK - 1 > query0 + params.num_keys - params.num_queries;
    const bool has_hidden = on_diagonal || !keys.all_visible();
    const bool wants_dk = Config::kAll || (work.wants_dk && head_scale(params, head.head) != 0.0f);
    const BiasReader<Config> bias(params, head);
#pragma unroll 1
    for (int row = part * Config::kPartQ; row < (part + 1) * Config::kPartQ; row += Config::kChunkQ) {
      accumulate_chunk<Config>(smem, stage, row, dk, dv, params, work, keys, bias, has_hidden, wants_dk, query0,
                               first_key, part);
    }

    __syncthreads();  // P and dS' of all warps are there; nobody reads the row records any more
    if (!is_last) load_query_rows<Config>(smem, params, work, next);
    if constexpr (Config::kSplit > 1) {
      accumulate_other_parts<Config>(smem, stage, dk, dv, wants_dk, Config::kAll || work.wants_dv, first_key, part);
    }
    if constexpr (Config::kStages == 1) {
      __syncthreads();  // nobody reads q and dout any more
      if (!is_last) load_queries<Config>(smem, params, work, next, 0);
    }
    ptx::cp_async_commit();
    if (Config::kAll || work.wants_dq) accumulate_dq<Config>(smem, dq_accum_block<Config>(params, head, step.q_block));
  }
  __syncthreads();
  if (work.wants_dv) {
    stage_keys<Config>(storage.epilogue, dv, first_key, part);
    __syncthreads();
    write_dv<Config>(storage.epilogue, params, work);
    __syncthreads();
  }
  if (work.wants_dk) {
    stage_keys<Config>(storage.epilogue, dk, first_key, part);
    __syncthreads();
    write_dk<Config>(storage.epilogue, params, work);
  }
}

}  // namespace fcsa::sm80
