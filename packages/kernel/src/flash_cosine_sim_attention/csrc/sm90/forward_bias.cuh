// The additive bias of the Hopper forward. Tiles of it travel by TMA beside the keys; a thread reads from them the values of
// its accumulators: 16-bit ones by ldmatrix, whose words are pairs of an accumulator as they stand.
//
// The shift of a row has to follow something, since a bias has no bound. Where the scores have one, |s| <= B, the largest
// bias that the row has met will do: it is known before S is, and by packed comparisons. Else the largest logit.
#pragma once

#include "../common/softmax.cuh"
#include "../common/vectorized.cuh"
#include "key_factors.cuh"
#include "ptx.cuh"
#include "tensor_map.h"

namespace fcsa::sm90 {

struct Diagonals {};  // in the place of the type of a bias's values: float32, by diagonals

// The largest B for a shift that follows the bias alone, P in bfloat16: the largest P of a row lies in e^[-B, B] times 2^8
// at most, so what is e^-47 of it is still there, and sums stay finite.
constexpr float kBiasBound = 40.0f;

// kRows x kCols values in panels as TMA swizzles them: each row of a panel kRowBytes bytes, its 16-byte chunks permuted by an
// XOR with bits of the row.
template <class Value_, int kRows_, int kCols_>
struct BiasTile {
  using Value = Value_;
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kRowBytes = kCols * sizeof(Value) % 128 == 0 ? 128 : 64;
  static constexpr int kPanelCols = kRowBytes / sizeof(Value);
  static constexpr int kPanels = kCols / kPanelCols;
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;
  static_assert(kCols % kPanelCols == 0 && kPanelBytes % 1024 == 0);

  alignas(1024) unsigned char data[kBytes];

  __device__ __forceinline__ static int permutation(int row) { return kRowBytes == 128 ? row & 7 : row >> 1 & 3; }
};

// One thread; the bytes of all panels count at `barrier`. Beyond the queries and keys the tile gets zeros.
template <class Tile>
__device__ __forceinline__ void load_bias_tile(Tile& tile, const TensorMap& source, int first_query, int first_key, int head,
                                               int b1, int b0, uint64_t& barrier) {
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    const int32_t coordinates[5] = {first_key + panel * Tile::kPanelCols, first_query * source.row_step, head * source.head_step,
                                    b1 * source.b1_step, b0 * source.b0_step};
    load_box(tile.data + panel * Tile::kPanelBytes, source.map, coordinates, barrier);
  }
}

// What a thread adds to its accumulators of S, in steps of 16 keys: pairs[n8 tile][half].
template <class Tile>
class BiasReader {
  using Value = typename Tile::Value;
  static constexpr bool kWide = sizeof(Value) == 4;
  int offset_ = 0;       // of its address in the first step
  int eight_rows_ = 0;   // from half to half, kWide only

  __device__ __forceinline__ static int address(int offset, int step) {
    constexpr int kSteps = Tile::kRowBytes / (16 * sizeof(Value)), kStepBytes = 16 * sizeof(Value);  // of a panel's row
    return step / kSteps * Tile::kPanelBytes + (offset ^ step % kSteps * kStepBytes);
  }

 public:
  BiasReader() = default;

  // row: the thread's first; shared: all queries have one row of biases.
  __device__ __forceinline__ BiasReader(int row, bool shared) {
    const int lane = threadIdx.x % 32;
    const int own = shared ? 0 : kWide ? row : row - lane / 4 + lane % 16;
    const int chunk = kWide ? lane % 4 / 2 : lane / 16;
    offset_ = own * Tile::kRowBytes + (chunk ^ Tile::permutation(own)) * 16 + (kWide ? lane % 2 * 8 : 0);
    eight_rows_ = shared ? 0 : 8 * Tile::kRowBytes;
  }

  __device__ __forceinline__ void load(uint32_t (&words)[2][2], const Tile& tile, int step) const {
    uint32_t four[4];
    load_matrix_x4(four, tile.data + address(offset_, step));
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i / 2][i % 2] = four[i];
  }

  __device__ __forceinline__ void load(float2 (&pairs)[2][2], const Tile& tile, int step) const {
    if constexpr (kWide) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int offset = address(offset_, step) ^ i / 2 * 32;
        pairs[i / 2][i % 2] = *reinterpret_cast<const float2*>(tile.data + offset + i % 2 * eight_rows_);
      }
    } else {
      uint32_t words[2][2];
      load(words, tile, step);
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[i / 2][i % 2] = unpack<Value>(words[i / 2][i % 2]);
    }
  }
};

// A bias by its diagonals, float32: what a tile of kRows x kCols needs of them, by key - query from -(kRows - 1) on. Twice, so
// that each thread finds its pairs of neighbours on 8-byte boundaries: in the second copy one entry earlier, and half a
// turn of the banks later.
template <int kRows_, int kCols_>
struct DiagonalTile {
  using Value = float;
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kShift = 15;  // of the second copy
  static constexpr int kEntries = kRows + kCols - 1;
  static constexpr int kCopy = (kEntries + kShift + 31) / 32 * 32;
  static constexpr int kBytes = 0;  // by TMA

  alignas(16) float data[2 * kCopy];
};

// Those entries on their way from device memory to shared memory through the registers of one warp.
template <class Tile>
struct DiagonalLoads {
  static constexpr int kEach = (Tile::kEntries + 31) / 32;
  const float* diagonals;  // [key - query]
  float values[kEach];

  __device__ __forceinline__ void load(const Problem& p, int first_query, int first_key) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = first_key - first_query - (Tile::kRows - 1) + i * 32 + static_cast<int>(threadIdx.x % 32);
      values[i] = at > -p.num_queries && at < p.num_keys ? diagonals[at] : 0.0f;
    }
  }

  __device__ __forceinline__ void store(Tile& tile) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int entry = i * 32 + threadIdx.x % 32;
      if (entry >= Tile::kEntries) continue;
      tile.data[entry] = values[i];
      tile.data[Tile::kCopy + Tile::kShift + entry] = values[i];
    }
  }
};

template <int kRows, int kCols>
class BiasReader<DiagonalTile<kRows, kCols>> {
  using Tile = DiagonalTile<kRows, kCols>;
  int offset_ = 0;  // of the pair of its first row and column

  __device__ __forceinline__ float2 pair(const Tile& tile, int distance) const {  // so many columns further
    return *reinterpret_cast<const float2*>(tile.data + offset_ + distance);
  }

 public:
  BiasReader() = default;

  __device__ __forceinline__ BiasReader(int row, bool) {
    const int entry = kRows - 1 - row + threadIdx.x % 4 * 2;
    offset_ = entry % 2 == 0 ? entry : entry + Tile::kCopy + Tile::kShift;
  }

  __device__ __forceinline__ void load(float2 (&pairs)[2][2], const Tile& tile, int step) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i / 2][i % 2] = pair(tile, step * 16 + (i / 2 - i % 2) * 8);
  }

  // Of all columns; what the two rows share is compared once.
  __device__ __forceinline__ void largest(float (&maximum)[2], const Tile& tile) const {
    const float2 first = pair(tile, -8), last = pair(tile, kCols - 8);
    float shared = -INFINITY;
#pragma unroll
    for (int distance = 0; distance < kCols - 8; distance += 8) {
      const float2 both = pair(tile, distance);
      shared = fmaxf(shared, fmaxf(both.x, both.y));
    }
    maximum[0] = fmaxf(shared, fmaxf(last.x, last.y));
    maximum[1] = fmaxf(shared, fmaxf(first.x, first.y));
  }
};

// The biases of one tile as a thread sees them; kHeld: 16-bit ones, read once, and kept in registers as they are.
template <class Tile, bool kHeld>
struct BiasView {
  const BiasReader<Tile>& reader;
  const Tile& tile;
  uint32_t words[kHeld ? Tile::kCols / 16 : 1][2][2];

  __device__ __forceinline__ BiasView(const BiasReader<Tile>& reader_, const Tile& tile_) : reader(reader_), tile(tile_) {
    if constexpr (kHeld) {
#pragma unroll
      for (int step = 0; step < Tile::kCols / 16; ++step) reader.load(words[step], tile, step);
    }
  }

  __device__ __forceinline__ void load(uint32_t (&pairs)[2][2], int step) const {
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[i / 2][i % 2] = words[step][i / 2][i % 2];
    } else {
      reader.load(pairs, tile, step);
    }
  }

  __device__ __forceinline__ void load(float2 (&pairs)[2][2], int step) const {
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[i / 2][i % 2] = unpack<typename Tile::Value>(words[step][i / 2][i % 2]);
    } else {
      reader.load(pairs, tile, step);
    }
  }
};

template <class Tile>
constexpr bool kIsDiagonals = false;
template <int kRows, int kCols>
constexpr bool kIsDiagonals<DiagonalTile<kRows, kCols>> = true;

// The largest bias of each of the thread's two rows, among its own columns; kMasked: of the visible ones.
template <bool kMasked, class Tile, bool kHeld, class Visible>
__device__ __forceinline__ void largest_bias(float (&maximum)[2], const BiasView<Tile, kHeld>& bias, const Visible& visible) {
  using Value = typename Tile::Value;
  maximum[0] = maximum[1] = -INFINITY;
  if constexpr (!kMasked && kIsDiagonals<Tile>) {
    bias.reader.largest(maximum, bias.tile);
  } else if constexpr (kMasked || sizeof(Value) == 4) {
#pragma unroll
    for (int step = 0; step < Tile::kCols / 16; ++step) {
      float2 pairs[2][2];
      bias.load(pairs, step);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = i / 2, half = i % 2, key = step * 16 + n * 8;
        if (!kMasked || visible(half, key)) maximum[half] = fmaxf(maximum[half], pairs[n][half].x);
        if (!kMasked || visible(half, key + 1)) maximum[half] = fmaxf(maximum[half], pairs[n][half].y);
      }
    }
  } else {
    uint32_t largest[2];
#pragma unroll
    for (int step = 0; step < Tile::kCols / 16; ++step) {
      uint32_t words[2][2];
      bias.load(words, step);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (step == 0) largest[half] = words[0][half];
        else largest[half] = max_pair<Value>(largest[half], words[0][half]);
        largest[half] = max_pair<Value>(largest[half], words[1][half]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 pair = unpack<Value>(largest[half]);
      maximum[half] = fmaxf(pair.x, pair.y);
    }
  }
}

// S of the keys from `first` of a tile -> P in place, and this thread's part of the row sums. Choices come behind the
// exponential (see exponentiate()). subtrahend: base 2.
template <class Traits, bool kMasked, class Visible>
__device__ __forceinline__ void exponentiate_with_bias(float (&s)[Traits::kPartN / 2], float (&sum)[2], const float* k_factor,
                                                       const float (&q_factor)[2], const float (&subtrahend)[2],
                                                       const typename Traits::BiasView& view, int column, int first,
                                                       const Visible& visible) {
#pragma unroll
  for (int step = 0; step < Traits::kPartN / 16; ++step) {
    float factor[2][2];
    load_factors(factor, k_factor + step * 16, column);
    float2 pairs[2][2];
    view.load(pairs, first / 16 + step);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = i / 2, half = i % 2;
      const float bias[2] = {pairs[n][half].x, pairs[n][half].y};
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& x = s[(step * 2 + n) * 4 + half * 2 + c];
        x = exp2_approx(fmaf(x * factor[n][c], q_factor[half], fmaf(bias[c], kLog2e, -subtrahend[half])));
        if (kMasked && !visible(half, first + step * 16 + n * 8 + c)) x = 0.0f;
      }
      sum[half] += s[(step * 2 + n) * 4 + half * 2] + s[(step * 2 + n) * 4 + half * 2 + 1];
    }
  }
}

// S of a tile -> logits in place, natural units, -inf where hidden, and the largest of each row among the thread's columns.
template <class Traits, bool kMasked, class Visible>
__device__ __forceinline__ void add_bias(float (&s)[Traits::kBlockN / 2], float (&maximum)[2], const float* k_factor,
                                         const float (&q_factor)[2], const typename Traits::BiasView& view, int column,
                                         const Visible& visible) {
  maximum[0] = maximum[1] = -INFINITY;
#pragma unroll
  for (int step = 0; step < Traits::kBlockN / 16; ++step) {
    float factor[2][2];
    load_factors(factor, k_factor + step * 16, column);
    float2 pairs[2][2];
    view.load(pairs, step);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = i / 2, half = i % 2;
      const float bias[2] = {pairs[n][half].x, pairs[n][half].y};
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& x = s[(step * 2 + n) * 4 + half * 2 + c];
        x = fmaf(x * factor[n][c], q_factor[half], bias[c]);
        if (kMasked && !visible(half, step * 16 + n * 8 + c)) x = -INFINITY;
        maximum[half] = fmaxf(maximum[half], x);
      }
    }
  }
}

// The bias as boxes of kRows x kPanelCols for BiasTile. Rows start on 16-byte boundaries, keys are contiguous (the adapter
// sees to it).
template <class Tile>
cudaError_t make_bias_map(TensorMap* map, const Problem& p) {
  const int32_t sizes[5] = {p.b0, p.b1, p.heads, p.num_queries, p.num_keys};
  if (p.bias_key != 1 && p.num_keys > 1) return cudaErrorNotSupported;
  return make_tensor_map<typename Tile::Value>(map, p.bias, {p.bias_b0, p.bias_b1, p.bias_head, p.bias_query}, sizes, Tile::kRows,
                                               Tile::kPanelCols, true);
}

}  // namespace fcsa::sm90
