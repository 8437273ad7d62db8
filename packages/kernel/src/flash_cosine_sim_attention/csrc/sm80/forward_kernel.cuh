// The fused forward for one block of queries: norm, scores, softmax and weighted values in one walk over the keys.
//
//   start      q (kBlockM, d) through shared memory to registers    row_factor_i = scale * log2(e) / |q_i|
//   each tile  k, v (kBlockN, d) in shared memory
//              s = q k^T    x_ij = s_ij * k_rnorm_j * row_factor_i    P = exp2(x - shift)    out += P v
//   end        out / sum P, lse
//
// A warp owns kRowsPerWarp queries from start to end, so that no row is shared between warps. P goes from the
// accumulator of one product to the operand of the next within registers.
#pragma once

#include "../common/mask.cuh"
#include "../norm/l2norm_forward.cuh"
#include "forward_bias.cuh"
#include "forward_smem.cuh"
#include "tile_copy.cuh"
#include "tile_reader.cuh"

namespace fcsa::sm80 {

template <class Config, Bias kBias>
class ForwardBlock {
  using Element = typename Config::Element;
  using Operand = typename Config::Operand;
  using Smem = ForwardSmem<Config>;
  using QueryTile = typename Smem::QueryTile;
  using KeyTile = typename Smem::KeyTile;
  using QueryReader = TileReader<QueryTile, LanePattern::kRowsFirst>;
  using KeyReader = TileReader<KeyTile, LanePattern::kChunksFirst>;
  using ValueReader = TileReader<KeyTile, LanePattern::kRowsFirst>;
  using KeyCopy = TileCopy<KeyTile, Config::kThreads>;
  static constexpr int kParts = Config::kParts, kRowTiles = Config::kRowTiles, kScoreTiles = Config::kScoreTiles;
  static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kChunkN = Config::kChunkN;
  static constexpr int kHeldSteps = Config::kQueryInRegisters ? Config::kDepthSteps : 1;
  static constexpr int kHeadroom = Config::kFloat ? 7 : 0;  // of P: with kRescaleThreshold it stays below 2^15

  using Scores = float[kRowTiles][kScoreTiles][4];
  using Weights = uint32_t[kParts][kRowTiles][kChunkN / 16][4];  // P as the left operand of P v

  const ForwardParams& p_;
  Smem& smem_;
  const TileIndex index_;     // of queries
  const TileIndex kv_index_;  // of the keys and values that these queries read
  const int lane_, warp_row_, first_query_;
  const bool folds_norm_;  // the norm is in the factors of rows and columns; else q and k are of unit norm

  uint32_t query_[kParts][kRowTiles][kHeldSteps][4];
  float row_factor_[kRowTiles][2];
  float out_[kRowTiles][Config::kValueTiles][4];
  SoftmaxRows<Config::kSoftmax, kRowTiles, kHeadroom> softmax_;

 public:
  __device__ __forceinline__ ForwardBlock(const ForwardParams& p, Smem& smem, const TileIndex& index)
      : p_(p),
        smem_(smem),
        index_(index),
        kv_index_{index.tile, index.head / (p.heads / p.kv_heads), index.b1, index.b0},
        lane_(threadIdx.x % 32),
        warp_row_(threadIdx.x / 32 * Config::kRowsPerWarp),
        first_query_(index.tile * kBlockM),
        folds_norm_(p.l2norm_qk && p.k_unit == nullptr) {}

  __device__ __forceinline__ void run() {
    const KeyRange range = KeyRange::of_queries<kBlockM, kBlockN>(p_, first_query_);
    const KeyCopy copy_k(static_cast<const Operand*>(p_.k) + kv_index_.offset(p_.k_strides), p_.k_strides.row,
                         p_.head_dim);
    const KeyCopy copy_v(static_cast<const Operand*>(p_.v) + kv_index_.offset(p_.v_strides), p_.v_strides.row,
                         p_.head_dim);
    KeyMask<kBlockN> mask(p_, index_);
    auto start_next_copy = [&](int tile, int stage) {  // of the next tile from `tile` on that has a visible key
      KeyBits<kBlockN> bits;
      tile = mask.next_visible(tile, range.num_tiles, bits);
      if (tile < range.num_tiles) start_key_copy(copy_k, copy_v, tile, bits, stage);
      ptx::cp_async_commit();
      return tile;
    };

    start_query_copy();
    mask.prefetch(0);
    int tile = start_next_copy(0, 0);
    start_rows();
    for (int stage = 0; tile < range.num_tiles; stage = following(stage)) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // this tile is here for all, and nobody reads the stage that is filled next
      const int next = start_next_copy(tile + 1, following(stage));
      const KeyBits<kBlockN> bits = smem_.key_bits[stage];
      if (bits.all() && (tile + 1) * kBlockN - 1 <= range.first_limit) {
        process_tile<false>(tile, bits, stage);
      } else {
        process_tile<true>(tile, bits, stage);
      }
      tile = next;
    }
    finish();
  }

 private:
  __device__ __forceinline__ static int following(int stage) { return stage + 1 == Config::kStages ? 0 : stage + 1; }

  // This thread's query in row tile m; the two halves of a tile are 8 rows apart.
  __device__ __forceinline__ int query_of(int m, int half) const {
    return first_query_ + warp_row_ + m * 16 + half * 8 + lane_ / 4;
  }

  // Of a contiguous (b0, b1, h, i) tensor: this thread's first query, the others are 8 and 16 further.
  __device__ __forceinline__ float* rows_of(float* tensor) const {
    return tensor + index_.first_row(p_.b1, p_.heads, p_.num_queries) + query_of(0, 0);
  }

  __device__ __forceinline__ void store_row(float* rows, int m, int half, float value) const {
    if (lane_ % 4 == 0 && query_of(m, half) < p_.num_queries) rows[m * 16 + half * 8] = value;
  }

  // ---- start: queries, their norms and factors ----

  __device__ __forceinline__ void start_query_copy() {
    const Operand* source = static_cast<const Operand*>(p_.q) + index_.offset(p_.q_strides);
    const TileCopy<QueryTile, Config::kThreads> copy(source, p_.q_strides.row, p_.head_dim);
    const int rows = p_.num_queries - first_query_;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      copy.copy(
          smem_.query().parts[part], first_query_, [rows](int row, int offset) { return row + offset < rows; },
          part * p_.head_dim);
    }
    ptx::cp_async_commit();
    if (folds_norm_) return;
    for (int i = threadIdx.x; i < Config::kStages * kBlockN; i += Config::kThreads) (&smem_.k_rnorm[0][0])[i] = 1.0f;
  }

  // Waits for the queries, all groups but the newest; then they move to registers, if they are to stay there.
  __device__ __forceinline__ void start_rows() {
    ptx::cp_async_wait<1>();
    __syncthreads();
    float squares[kRowTiles][2] = {};
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const QueryReader reader(smem_.query().parts[part], warp_row_, 0);
#pragma unroll
      for (int step = 0; step < Config::kDepthSteps; ++step) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          uint32_t a[4];
          reader.load(a, m * 16, step * 2);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack<Operand>(a[i]);
            squares[m][i % 2] += pair.x * pair.x + pair.y * pair.y;
            if constexpr (Config::kQueryInRegisters) query_[part][m][step][i] = a[i];
          }
        }
      }
    }
    float factor = (p_.scale == nullptr ? p_.scale_value : p_.scale[index_.head]) * kLog2e;
    if constexpr (Config::kSplit) factor /= kUnitScale * kUnitScale;
    float* rnorms = folds_norm_ ? rows_of(p_.q_rnorm) : nullptr;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        row_factor_[m][half] = factor;
        if (folds_norm_) {
          const float rnorm = reciprocal_norm(lane_sum<4>(squares[m][half]));
          row_factor_[m][half] *= rnorm;
          store_row(rnorms, m, half, rnorm);
        }
      }
#pragma unroll
      for (int n = 0; n < Config::kValueTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out_[m][n][e] = 0.0f;
      }
    }
    softmax_.start(bounded_shift<Element>(p_.bound) * kLog2e);
  }

  // ---- the way of keys and values into shared memory ----

  __device__ __forceinline__ void start_key_copy(const KeyCopy& copy_k, const KeyCopy& copy_v, int tile,
                                                 const KeyBits<kBlockN>& bits, int stage) {
    const int64_t first_key = static_cast<int64_t>(tile) * kBlockN;
    if (folds_norm_ && threadIdx.x < kBlockN) {
      const float* source = p_.k_rnorm + kv_index_.first_row(p_.b1, p_.kv_heads, p_.num_keys);
      const int64_t key = first_key + threadIdx.x;
      const bool valid = key < p_.num_keys;
      ptx::cp_async_4(ptx::smem_address(&smem_.k_rnorm[stage][threadIdx.x]), valid ? source + key : source, valid);
    }
    if (threadIdx.x == 0) smem_.key_bits[stage] = bits;
    typename Smem::Stage& target = smem_.stages[stage];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int first_col = part * p_.head_dim;
      if (bits.all()) {
        copy_k.copy_all(target.k[part], first_key, first_col);
        copy_v.copy_all(target.v[part], first_key, first_col);
      } else {  // hidden rows become zero and are not read: they may hold NaN, or not exist
        const auto visible = [&bits](int key, int offset) { return bits.visible(key, offset); };
        copy_k.copy(target.k[part], first_key, visible, first_col);
        copy_v.copy(target.v[part], first_key, visible, first_col);
      }
    }
  }

  // ---- one tile of keys, in chunks ----

  template <bool kMasked>
  __device__ __forceinline__ void process_tile(int tile, const KeyBits<kBlockN>& bits, int stage) {
#pragma unroll
    for (int chunk = 0; chunk < Config::kChunks; ++chunk) {
      BiasChunk<Config, kBias> bias;
      bias.load(p_, index_, query_of(0, 0), tile * kBlockN + chunk * kChunkN + lane_ % 4 * 2);
      Scores x;
      multiply_keys(x, stage, chunk);
      scale_scores(x, smem_.k_rnorm[stage] + chunk * kChunkN, bias);
      if constexpr (kBias != Bias::kToeplitz) bias.add_to(x);
      if constexpr (kMasked) hide(x, bits, tile, chunk);
      if constexpr (Config::kSoftmax == Softmax::kRunningMax) follow_maximum(x);
      Weights weights;
      exponentiate(weights, x);
      multiply_values(weights, stage, chunk);
    }
  }

  // s = q k^T
  __device__ __forceinline__ void multiply_keys(Scores& s, int stage, int chunk) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[m][n][e] = 0.0f;
      }
    }
#pragma unroll
    for (int step = 0; step < Config::kDepthSteps; ++step) {
      uint32_t q[kParts][kRowTiles][4];
#pragma unroll
      for (int part = 0; part < kParts; ++part) load_query(q[part], part, step);
#pragma unroll
      for (int n = 0; n < kScoreTiles; n += 2) {
        uint32_t k[kParts][4];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const KeyReader reader(smem_.stages[stage].k[part], 0, 0);
          reader.load(k[part], chunk * kChunkN + n * 8, step * 2);
        }
        if constexpr (Config::kSplit) {  // the small products first
          multiply(s, q[1], k[0], n);
          multiply(s, q[0], k[1], n);
        }
        multiply(s, q[0], k[0], n);
      }
    }
  }

  __device__ __forceinline__ void load_query(uint32_t (&q)[kRowTiles][4], int part, int step) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      if constexpr (Config::kQueryInRegisters) {
#pragma unroll
        for (int i = 0; i < 4; ++i) q[m][i] = query_[part][m][step][i];
      } else {
        const QueryReader reader(smem_.query().parts[part], warp_row_, 0);
        reader.load(q[m], m * 16, step * 2);
      }
    }
  }

  // Columns 8 n to 8 n + 15 of c += a b, for all row tiles.
  template <int kTiles>
  __device__ __forceinline__ static void multiply(float (&c)[kRowTiles][kTiles][4], const uint32_t (&a)[kRowTiles][4],
                                                  const uint32_t (&b)[4], int n) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      ptx::mma_16816<Operand>(c[m][n], a[m], b[0], b[1]);
      ptx::mma_16816<Operand>(c[m][n + 1], a[m], b[2], b[3]);
    }
  }

  // x = s * k_rnorm * row_factor, with a bounded softmax already minus the shift, and plus a bias that needs no conversion
  __device__ __forceinline__ void scale_scores(Scores& x, const float* k_rnorm,
                                               const BiasChunk<Config, kBias>& bias) const {
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
      const float2 factors = *reinterpret_cast<const float2*>(k_rnorm + n * 8 + lane_ % 4 * 2);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float cosine = x[m][n][e] * (e % 2 == 0 ? factors.x : factors.y);
          if constexpr (Config::kSoftmax == Softmax::kBounded) {
            x[m][n][e] = fmaf(cosine, row_factor_[m][e / 2], -softmax_.shift[m][e / 2]);
          } else if constexpr (kBias == Bias::kToeplitz) {
            x[m][n][e] = fmaf(cosine, row_factor_[m][e / 2], bias(m, n, e));
          } else {
            x[m][n][e] = cosine * row_factor_[m][e / 2];
          }
        }
      }
    }
  }

  // x = -inf where the pair is not visible
  __device__ __forceinline__ void hide(Scores& x, const KeyBits<kBlockN>& bits, int tile, int chunk) const {
    const int lane_key = lane_ % 4 * 2;
    int limit[kRowTiles][2];  // the last key of this tile that causality leaves to a row, counted from lane_key
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int last_key = query_of(m, half) + p_.num_keys - p_.num_queries;
        limit[m][half] = p_.causal ? last_key - tile * kBlockN - lane_key : kBlockN;
      }
    }
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
      const int key = chunk * kChunkN + n * 8;
      const uint32_t word = bits.words[key / 32] >> lane_key;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const bool visible = (word >> (key % 32 + e % 2) & 1) != 0 && key + e % 2 <= limit[m][e / 2];
          x[m][n][e] = visible ? x[m][n][e] : -INFINITY;
        }
      }
    }
  }

  // Raises the rows' shifts where the maximum has climbed too far above them, and rescales what has been summed so far.
  __device__ __forceinline__ void follow_maximum(const Scores& x) {
    float maximum[kRowTiles][2], factor[kRowTiles][2];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        maximum[m][half] = -INFINITY;
#pragma unroll
        for (int n = 0; n < kScoreTiles; ++n) {
          maximum[m][half] = fmaxf(maximum[m][half], fmaxf(x[m][n][2 * half], x[m][n][2 * half + 1]));
        }
        maximum[m][half] = lane_max<4>(maximum[m][half]);
      }
    }
    if (!softmax_.raise(maximum, factor)) return;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < Config::kValueTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out_[m][n][e] *= factor[m][e / 2];
      }
    }
  }

  // P = exp2(x - shift): its sum in float, itself rounded to the operand of P v
  __device__ __forceinline__ void exponentiate(Weights& weights, Scores& x) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = 0.0f;  // of the chunk first: fewer roundings at the size of the whole
#pragma unroll
        for (int n = 0; n < kScoreTiles; ++n) {
          float low = x[m][n][2 * half], high = x[m][n][2 * half + 1];
          if constexpr (Config::kSoftmax == Softmax::kRunningMax) {
            low -= softmax_.subtrahend(m, half);
            high -= softmax_.subtrahend(m, half);
          }
          low = ptx::exp2_approx(low);
          high = ptx::exp2_approx(high);
          sum += low + high;
          const uint32_t pair = pack<Operand>(low, high);
          weights[0][m][n / 2][n % 2 * 2 + half] = pair;
          if constexpr (Config::kSplit) {
            const float2 rounded = unpack<Operand>(pair);
            weights[1][m][n / 2][n % 2 * 2 + half] = pack<Operand>(low - rounded.x, high - rounded.y);
          }
        }
        softmax_.sum[m][half] += sum;
      }
    }
  }

  // out += P v
  __device__ __forceinline__ void multiply_values(const Weights& weights, int stage, int chunk) {
    if constexpr (Config::kSplit) return multiply_split_values(weights, stage, chunk);
    const ValueReader reader(smem_.stages[stage].v[0], 0, 0);
#pragma unroll
    for (int step = 0; step < kChunkN / 16; ++step) {
      uint32_t a[kRowTiles][4];
      operand_of_step(a, weights[0], step);
#pragma unroll
      for (int n = 0; n < Config::kValueTiles; n += 2) {
        uint32_t v[4];
        reader.load_transposed(v, chunk * kChunkN + step * 16, n);
        multiply(out_, a, v, n);
      }
    }
  }

  __device__ __forceinline__ static void operand_of_step(uint32_t (&a)[kRowTiles][4],
                                                         const uint32_t (&weights)[kRowTiles][kChunkN / 16][4],
                                                         int step) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[m][i] = weights[m][step][i];
    }
  }

  // The same from hi and lo. Tensor cores cut their sums off instead of rounding them, a drift of 2^-24 a step that would
  // show over thousands of keys: each chunk is summed on its own and added to the rest by a rounding addition.
  __device__ __forceinline__ void multiply_split_values(const Weights& weights, int stage, int chunk) {
#pragma unroll
    for (int n = 0; n < Config::kValueTiles; n += 2) {
      float sum[kRowTiles][2][4] = {};
#pragma unroll
      for (int step = 0; step < kChunkN / 16; ++step) {
        uint32_t a[2][kRowTiles][4], v[2][4];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          operand_of_step(a[part], weights[part], step);
          const ValueReader reader(smem_.stages[stage].v[part], 0, 0);
          reader.load_transposed(v[part], chunk * kChunkN + step * 16, n);
        }
        multiply(sum, a[1], v[0], 0);
        multiply(sum, a[0], v[1], 0);
        multiply(sum, a[0], v[0], 0);
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int e = 0; e < 8; ++e) out_[m][n + e / 4][e % 4] += sum[m][e / 4][e % 4];
      }
    }
  }

  // ---- end ----

  __device__ __forceinline__ void finish() {
    if constexpr (!Config::kFloat && Config::kQueryInRegisters) __syncthreads();  // out passes through the stages' memory
    float* lses = rows_of(p_.lse);
    float unscale_v = 1.0f;
    if constexpr (Config::kFloat) {
      unscale_v = 1.0f / split_scale(p_.v_largest[kv_index_.first_row(p_.b1, p_.kv_heads, 1)]);
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float factor, lse;
        softmax_.finish(m, half, factor, lse);
        store_row(lses, m, half, lse);
#pragma unroll
        for (int n = 0; n < Config::kValueTiles; ++n) {
          out_[m][n][2 * half] *= factor * unscale_v;
          out_[m][n][2 * half + 1] *= factor * unscale_v;
        }
      }
    }
    if constexpr (Config::kFloat) {
      store_float_out();
    } else {
      store_half_out();
    }
  }

  // Four lanes write 32 bytes of a row, a whole sector.
  __device__ __forceinline__ void store_float_out() const {
    float* out = static_cast<float*>(p_.out) + index_.offset(p_.out_strides) + lane_ % 4 * 2;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t query = query_of(m, half);
        if (query >= p_.num_queries) continue;
#pragma unroll
        for (int n = 0; n < Config::kValueTiles; ++n) {
          if (n * 8 >= p_.head_dim) continue;
          const float* pair = &out_[m][n][2 * half];
          *reinterpret_cast<float2*>(out + query * p_.out_strides.row + n * 8) = make_float2(pair[0], pair[1]);
        }
      }
    }
  }

  // Through shared memory to stores of 16 bytes; each warp touches its own rows only.
  __device__ __forceinline__ void store_half_out() {
    QueryTile& tile = smem_.query().parts[0];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row_ + m * 16 + half * 8 + lane_ / 4;
#pragma unroll
        for (int n = 0; n < Config::kValueTiles; ++n) {
          reinterpret_cast<uint32_t&>(tile.at(row, n * 8 + lane_ % 4 * 2)) =
              pack<Operand>(out_[m][n][2 * half], out_[m][n][2 * half + 1]);
        }
      }
    }
    __syncwarp();
    constexpr int kChunksPerRow = Config::kHeadDim / 8;
    Operand* out = static_cast<Operand*>(p_.out) + index_.offset(p_.out_strides);
#pragma unroll
    for (int step = 0; step < Config::kRowsPerWarp * kChunksPerRow / 32; ++step) {
      const int i = step * 32 + lane_;
      const int row = warp_row_ + i / kChunksPerRow, col = i % kChunksPerRow * 8;
      const int64_t query = first_query_ + row;
      if (query >= p_.num_queries || col >= p_.head_dim) continue;
      *reinterpret_cast<uint4*>(out + query * p_.out_strides.row + col) =
          *reinterpret_cast<const uint4*>(&tile.at(row, col));
    }
  }
};

template <class Config, Bias kBias>
__global__ void __launch_bounds__(Config::kThreads, Config::kTile.min_blocks)
    forward_kernel(const __grid_constant__ ForwardParams p) {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  const int num_tiles = ceil_div(p.num_queries, Config::kBlockM);
  TileIndex index = TileIndex::from_block(blockIdx.x, num_tiles, p.heads, p.b1);
  if (p.causal) index.tile = num_tiles - 1 - index.tile;  // the longest rows first, so that the short ones fill the end
  ForwardBlock<Config, kBias> block(p, reinterpret_cast<ForwardSmem<Config>&>(shared_memory), index);
  block.run();
}

}  // namespace fcsa::sm80
