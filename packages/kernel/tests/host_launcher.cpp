// Launchers that run on host memory: the same params structs, the formulas of docs/math.md in plain loops. With them the
// whole way from the Python call over the operators to a launcher is tested by value on a machine without a GPU.
// What a kernel may rely on is checked here as well; a launcher then returns an error instead of cudaSuccess.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "params.h"

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();

template <class Element>
double load(const void* data, int64_t index) {
  return static_cast<double>(static_cast<float>(static_cast<const Element*>(data)[index]));
}

template <class Element>
void store(void* data, int64_t index, double value) {
  static_cast<Element*>(data)[index] = static_cast<Element>(static_cast<float>(value));
}

struct Row {
  int b0, b1, head, row;
};

int64_t offset(const fcsa::Strides& s, Row r) { return r.b0 * s.b0 + r.b1 * s.b1 + r.head * s.head + r.row * s.row; }

int64_t query_index(const fcsa::Problem& p, Row r) {  // of a contiguous (b0, b1, h, i)
  return ((int64_t(r.b0) * p.b1 + r.b1) * p.heads + r.head) * p.num_queries + r.row;
}

int64_t key_index(const fcsa::Problem& p, Row r) {  // of a contiguous (b0, b1, hk, j)
  return ((int64_t(r.b0) * p.b1 + r.b1) * p.kv_heads + r.head) * p.num_keys + r.row;
}

template <class Element>
std::vector<double> values(const void* data, const fcsa::Strides& strides, Row r, int width) {
  std::vector<double> x(width);
  for (int c = 0; c < width; ++c) x[c] = load<Element>(data, offset(strides, r) + c);
  return x;
}

template <class Element>
void write(void* data, const fcsa::Strides& strides, Row r, const std::vector<double>& x) {
  for (size_t c = 0; c < x.size(); ++c) store<Element>(data, offset(strides, r) + c, x[c]);
}

double dot(const std::vector<double>& x, const std::vector<double>& y) {
  double sum = 0;
  for (size_t c = 0; c < x.size(); ++c) sum += x[c] * y[c];
  return sum;
}

std::vector<double> chunk_rnorms(const fcsa::Problem& p, const std::vector<double>& x) {
  std::vector<double> rnorm(p.groups);
  const int width = p.head_dim / p.groups;
  for (int g = 0; g < p.groups; ++g) {
    double sum = 0;
    for (int c = g * width; c < (g + 1) * width; ++c) sum += x[c] * x[c];
    rnorm[g] = 1 / std::max(std::sqrt(sum), 1e-12);
  }
  return rnorm;
}

std::vector<double> scaled(const fcsa::Problem& p, std::vector<double> x, const float* rnorm) {
  if (!p.l2norm_qk) return x;
  for (int c = 0; c < p.head_dim; ++c) x[c] *= rnorm[c / (p.head_dim / p.groups)];
  return x;
}

// dx = rnorm (dn - (dn . n) n), per chunk
std::vector<double> through_norm(const fcsa::Problem& p, std::vector<double> dn, const std::vector<double>& n,
                                 const float* rnorm) {
  if (!p.l2norm_qk) return dn;
  const int width = p.head_dim / p.groups;
  for (int g = 0; g < p.groups; ++g) {
    double along = 0;
    for (int c = g * width; c < (g + 1) * width; ++c) along += dn[c] * n[c];
    for (int c = g * width; c < (g + 1) * width; ++c) dn[c] = rnorm[g] * (dn[c] - along * n[c]);
  }
  return dn;
}

bool visible(const fcsa::Problem& p, Row r, int key) {
  if (p.causal && key > r.row + p.num_keys - p.num_queries) return false;
  return p.mask == nullptr || p.mask[r.b0 * p.mask_b0 + r.b1 * p.mask_b1 + key * p.mask_key] != 0;
}

double scale_of(const fcsa::Problem& p, int head) { return p.scale != nullptr ? p.scale[head] : p.scale_value; }

template <class Element>
double bias_of(const fcsa::Problem& p, Row r, int key) {
  if (p.bias == nullptr) return 0;
  const int64_t at = r.b0 * p.bias_b0 + r.b1 * p.bias_b1 + r.head * p.bias_head + r.row * p.bias_query + key * p.bias_key;
  return p.bias_is_float32 ? load<float>(p.bias, at) : load<Element>(p.bias, at);
}

template <class Function>
void each_row(const fcsa::Problem& p, int heads, int rows, Function function) {
  for (int b0 = 0; b0 < p.b0; ++b0)
    for (int b1 = 0; b1 < p.b1; ++b1)
      for (int head = 0; head < heads; ++head)
        for (int row = 0; row < rows; ++row) function(Row{b0, b1, head, row});
}

template <class Element>
cudaError_t fill_workspaces(const fcsa::Problem& p, bool wanted) {
  if ((p.q_unit != nullptr) != wanted || (p.k_unit != nullptr) != wanted) return cudaErrorInvalidValue;
  if (!wanted) return cudaSuccess;
  const int64_t queries = int64_t(p.b0) * p.b1 * p.heads * p.num_queries * p.head_dim;
  const int64_t keys = int64_t(p.b0) * p.b1 * p.kv_heads * p.num_keys * p.head_dim;
  for (int64_t index = 0; index < queries; ++index) store<Element>(p.q_unit, index, kPoison);
  for (int64_t index = 0; index < keys; ++index) store<Element>(p.k_unit, index, kPoison);
  return cudaSuccess;
}

template <class Element>
cudaError_t forward(const fcsa::ForwardParams& p, bool bounded) {
  const double bound = p.scale != nullptr ? kInfinity : std::abs(double(p.scale_value)) * p.groups;
  if (bounded && (p.bias != nullptr || p.scale != nullptr || std::abs(p.bound - bound) > 1e-4)) return cudaErrorInvalidValue;
  if (p.l2norm_qk != (p.q_rnorm != nullptr) || p.l2norm_qk != (p.k_rnorm != nullptr)) return cudaErrorInvalidValue;
  constexpr bool kSplit = std::is_same_v<Element, float>;
  if (fill_workspaces<Element>(p, kSplit || (p.l2norm_qk && p.groups > 1)) != cudaSuccess) return cudaErrorInvalidValue;
  if (kSplit != (p.v_split != nullptr) || kSplit != (p.v_largest != nullptr)) return cudaErrorInvalidValue;
  if (p.l2norm_qk) {
    each_row(p, p.heads, p.num_queries, [&](Row r) {
      const auto rnorm = chunk_rnorms(p, values<Element>(p.q, p.q_strides, r, p.head_dim));
      std::copy(rnorm.begin(), rnorm.end(), p.q_rnorm + query_index(p, r) * p.groups);
    });
    each_row(p, p.kv_heads, p.num_keys, [&](Row r) {
      const auto rnorm = chunk_rnorms(p, values<Element>(p.k, p.k_strides, r, p.head_dim));
      std::copy(rnorm.begin(), rnorm.end(), p.k_rnorm + key_index(p, r) * p.groups);
    });
  }
  each_row(p, p.heads, p.num_queries, [&](Row r) {
    const auto qn = scaled(p, values<Element>(p.q, p.q_strides, r, p.head_dim), p.q_rnorm + query_index(p, r) * p.groups);
    std::vector<double> logits(p.num_keys, -kInfinity), out(p.head_dim, 0.0);
    double maximum = -kInfinity, sum = 0;
    for (int j = 0; j < p.num_keys; ++j) {
      if (!visible(p, r, j)) continue;
      const Row key{r.b0, r.b1, r.head / (p.heads / p.kv_heads), j};
      const auto kn = scaled(p, values<Element>(p.k, p.k_strides, key, p.head_dim), p.k_rnorm + key_index(p, key) * p.groups);
      logits[j] = scale_of(p, r.head) * dot(qn, kn) + bias_of<Element>(p, r, j);
      maximum = std::max(maximum, logits[j]);
    }
    for (int j = 0; j < p.num_keys; ++j) {
      if (logits[j] == -kInfinity) continue;
      const Row key{r.b0, r.b1, r.head / (p.heads / p.kv_heads), j};
      const auto v = values<Element>(p.v, p.v_strides, key, p.head_dim);
      const double weight = std::exp(logits[j] - maximum);
      sum += weight;
      for (int c = 0; c < p.head_dim; ++c) out[c] += weight * v[c];
    }
    for (double& x : out) x = sum > 0 ? x / sum : 0;
    write<Element>(p.out, p.out_strides, r, out);
    p.lse[query_index(p, r)] = static_cast<float>(sum > 0 ? maximum + std::log(sum) : -kInfinity);
  });
  return cudaSuccess;
}

// Sums a broadcast gradient in double before it is rounded to the dtype of the bias.
template <class Element>
struct BiasGradient {
  const fcsa::BackwardParams& p;
  int64_t size = 1;
  std::vector<double> sums;

  explicit BiasGradient(const fcsa::BackwardParams& params) : p(params) {
    size += (p.b0 - 1) * p.dbias_b0 + (p.b1 - 1) * p.dbias_b1 + (p.heads - 1) * p.dbias_head;
    size += (p.num_queries - 1) * p.dbias_query + (p.num_keys - 1) * p.dbias_key;
    sums.assign(p.dbias == nullptr ? 0 : size, 0.0);
  }
  void add(Row r, int j, double value) {
    if (p.dbias == nullptr) return;
    sums[r.b0 * p.dbias_b0 + r.b1 * p.dbias_b1 + r.head * p.dbias_head + r.row * p.dbias_query + j * p.dbias_key] += value;
  }
  void finish() {
    for (size_t index = 0; index < sums.size(); ++index)
      p.bias_is_float32 ? store<float>(p.dbias, index, sums[index]) : store<Element>(p.dbias, index, sums[index]);
  }
};

template <class Element>
cudaError_t backward(const fcsa::BackwardParams& p, bool has_bias) {
  if (has_bias != (p.bias != nullptr) || p.query_rows == nullptr) return cudaErrorInvalidValue;
  if (p.l2norm_qk != (p.q_rnorm != nullptr) || p.l2norm_qk != (p.k_rnorm != nullptr)) return cudaErrorInvalidValue;
  constexpr bool kSplit = std::is_same_v<Element, float>;
  const bool copies = kSplit || (p.l2norm_qk && (p.groups > 1 || std::is_same_v<Element, __half>));
  if (fill_workspaces<Element>(p, copies) != cudaSuccess) return cudaErrorInvalidValue;
  if (kSplit != (p.v_split != nullptr) || kSplit != (p.v_largest != nullptr)) return cudaErrorInvalidValue;
  if (kSplit != (p.dout_split != nullptr) || kSplit != (p.dout_largest != nullptr)) return cudaErrorInvalidValue;
  const bool accumulates = (p.dq != nullptr || p.dscale_rows != nullptr) && !p.deterministic;
  if ((p.dq_accum != nullptr) != accumulates) return cudaErrorInvalidValue;
  const int64_t rows = int64_t(p.b0) * p.b1 * p.heads * ((p.num_queries + 127) / 128 * 128);
  for (int64_t index = 0; index < rows; ++index) p.query_rows[index] = {kPoison, kPoison, kPoison, kPoison};
  for (int64_t index = 0; accumulates && index < rows * p.head_dim; ++index) p.dq_accum[index] = kPoison;

  const int64_t keys = int64_t(p.b0) * p.b1 * p.kv_heads * p.num_keys;
  std::vector<double> dkn(keys * p.head_dim, 0.0), dv(keys * p.head_dim, 0.0);
  BiasGradient<Element> dbias(p);
  each_row(p, p.heads, p.num_queries, [&](Row r) {
    const float* rnorm = p.q_rnorm + query_index(p, r) * p.groups;
    const auto qn = scaled(p, values<Element>(p.q, p.q_strides, r, p.head_dim), rnorm);
    const auto dout = values<Element>(p.dout, p.dout_strides, r, p.head_dim);
    const auto out = values<Element>(p.out, p.out_strides, r, p.head_dim);
    const double delta = dot(dout, out) - (p.dlse != nullptr ? p.dlse[query_index(p, r)] : 0.0);
    const double lse = p.lse[query_index(p, r)], scale = scale_of(p, r.head);
    std::vector<double> dqn(p.head_dim, 0.0);
    double dscale = 0;
    for (int j = 0; j < p.num_keys; ++j) {
      if (!visible(p, r, j)) continue;
      const Row key{r.b0, r.b1, r.head / (p.heads / p.kv_heads), j};
      const auto kn = scaled(p, values<Element>(p.k, p.k_strides, key, p.head_dim), p.k_rnorm + key_index(p, key) * p.groups);
      const double cosine = dot(qn, kn), logit = scale * cosine + bias_of<Element>(p, r, j);
      if (logit == -kInfinity) continue;
      const double weight = std::exp(logit - lse);
      const double ds = weight * (dot(dout, values<Element>(p.v, p.v_strides, key, p.head_dim)) - delta);
      dbias.add(r, j, ds);
      dscale += ds * cosine;
      for (int c = 0; c < p.head_dim; ++c) {
        dqn[c] += scale * ds * kn[c];
        dkn[key_index(p, key) * p.head_dim + c] += scale * ds * qn[c];
        dv[key_index(p, key) * p.head_dim + c] += weight * dout[c];
      }
    }
    if (p.dq != nullptr) write<Element>(p.dq, p.dq_strides, r, through_norm(p, dqn, qn, rnorm));
    if (p.dscale_rows != nullptr) p.dscale_rows[query_index(p, r)] = static_cast<float>(dscale);
  });
  each_row(p, p.kv_heads, p.num_keys, [&](Row r) {
    const int64_t at = key_index(p, r) * p.head_dim;
    const float* rnorm = p.k_rnorm + key_index(p, r) * p.groups;
    const auto kn = scaled(p, values<Element>(p.k, p.k_strides, r, p.head_dim), rnorm);
    const std::vector<double> own(dkn.begin() + at, dkn.begin() + at + p.head_dim);
    const bool hidden = std::all_of(own.begin(), own.end(), [](double x) { return x == 0; });  // its k may be NaN
    if (p.dk != nullptr) write<Element>(p.dk, p.dk_strides, r, hidden ? own : through_norm(p, own, kn, rnorm));
    if (p.dv != nullptr) write<Element>(p.dv, p.dv_strides, r, {dv.begin() + at, dv.begin() + at + p.head_dim});
  });
  dbias.finish();
  return cudaSuccess;
}

}  // namespace

#define LAUNCHERS(dtype, Element)                                                                                  \
  extern "C" cudaError_t forward_##dtype##_bounded(const fcsa::ForwardParams& p, cudaStream_t) {                   \
    return forward<Element>(p, true);                                                                              \
  }                                                                                                                \
  extern "C" cudaError_t forward_##dtype##_running_max(const fcsa::ForwardParams& p, cudaStream_t) {               \
    return forward<Element>(p, false);                                                                             \
  }                                                                                                                \
  extern "C" cudaError_t forward_##dtype##_bias(const fcsa::ForwardParams& p, cudaStream_t) {                      \
    return forward<Element>(p, false);                                                                             \
  }                                                                                                                \
  extern "C" cudaError_t backward_##dtype##_plain(const fcsa::BackwardParams& p, cudaStream_t) {                   \
    return backward<Element>(p, false);                                                                            \
  }                                                                                                                \
  extern "C" cudaError_t backward_##dtype##_bias(const fcsa::BackwardParams& p, cudaStream_t) {                    \
    return backward<Element>(p, true);                                                                             \
  }

LAUNCHERS(float16, __half)
LAUNCHERS(bfloat16, __nv_bfloat16)
LAUNCHERS(float32, float)

extern "C" cudaError_t failing(const void*, cudaStream_t) { return cudaErrorInvalidConfiguration; }
