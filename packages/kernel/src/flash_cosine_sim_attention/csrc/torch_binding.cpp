// The only file with torch headers: LibTorch's stable ABI, so that one binary serves every torch from 2.10 on (with or
// without CUDA) and every Python. Defines the operators
//     flash_cosine_sim_attention::launch_forward, launch_backward, and of the common call common_{forward, backward}
// which fill the params structs from tensors and call a launcher, given as the address of its exported function.
// Shapes are those of params.h. The adapter (cuda.py) prepares the tensors; what a kernel could not bear is checked here.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "params.h"

// Of libtorch_cuda, which a CPU-only torch lacks: weak, so that the library loads there too.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
__attribute__((weak)) AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char* file, const char* function,
                                                              uint32_t line, bool device_assertions, char** message);
__attribute__((weak)) void torch_c10_cuda_free_error_msg(char* message);
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::string shape_of(const Tensor& x) {
  std::string text = "(";
  for (int64_t dim = 0; dim < x.dim(); ++dim) text += (dim ? ", " : "") + std::to_string(x.size(dim));
  return text + ")";
}

[[noreturn]] void fail(const char* name, const std::string& expected, const std::string& got) {
  throw std::runtime_error(std::string(name) + ": expected " + expected + ", got " + got);
}

void check_shape(const char* name, const Tensor& x, std::initializer_list<int64_t> shape) {
  bool same = x.dim() == static_cast<int64_t>(shape.size());
  int64_t dim = 0;
  for (int64_t size : shape) same = same && x.size(dim++) == size;
  if (same) return;
  std::string expected = "shape (";
  for (int64_t size : shape) expected += std::to_string(size) + ", ";
  fail(name, expected.substr(0, expected.size() - 2) + ")", shape_of(x));
}

// Broadcast dims have size 1.
void check_broadcasts(const char* name, const Tensor& x, std::initializer_list<int64_t> shape) {
  bool fits = x.dim() == static_cast<int64_t>(shape.size());
  int64_t dim = 0;
  for (int64_t size : shape) {
    fits = fits && (x.size(dim) == size || x.size(dim) == 1);
    ++dim;
  }
  if (!fits) fail(name, "a shape that broadcasts to the logits", shape_of(x));
}

void check_dtype(const char* name, const Tensor& x, ScalarType dtype) {
  if (x.scalar_type() == dtype) return;
  fail(name, "dtype " + std::to_string(static_cast<int>(dtype)), std::to_string(static_cast<int>(x.scalar_type())));
}

void check_device(const char* name, const Tensor& x, const Tensor& like) {
  if (x.get_device_index() != like.get_device_index() || x.is_cuda() != like.is_cuda())
    fail(name, "the device of q", "another");
}

// Rows of d contiguous elements that start on 16-byte boundaries, as copies of 16 bytes need them; of a (b0, b1, h, n, d)
// tensor or a (b, h, n, d) one.
fcsa::Strides row_strides(const char* name, const Tensor& x) {
  const int64_t per_chunk = 16 / static_cast<int64_t>(x.element_size());
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  const int64_t last = x.dim() - 1;
  bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && strides[last] == 1;
  int64_t kept[4] = {};
  for (int64_t dim = 0; dim < last; ++dim) {
    kept[dim] = sizes[dim] == 1 ? 0 : strides[dim];
    aligned = aligned && kept[dim] % per_chunk == 0;
  }
  if (!aligned) fail(name, "a contiguous last dim and rows on 16-byte boundaries", "other strides");
  if (last == 3) return {kept[0], 0, kept[1], kept[2]};
  return {kept[0], kept[1], kept[2], kept[3]};
}

int64_t broadcast_stride(const Tensor& x, int64_t dim) { return x.size(dim) == 1 ? 0 : x.stride(dim); }

// A contiguous float32 tensor of the given shape; nullptr where none is given.
float* float_data(const char* name, const OptionalTensor& x, const Tensor& like, std::initializer_list<int64_t> shape) {
  if (!x.has_value()) return nullptr;
  check_shape(name, *x, shape);
  check_dtype(name, *x, ScalarType::Float);
  check_device(name, *x, like);
  if (!x->is_contiguous()) fail(name, "a contiguous tensor", "other strides");
  return static_cast<float*>(x->data_ptr());
}

// A tensor of the dtype of q with aligned rows; nullptr and no strides where none is given.
void* rows_data(const char* name, const OptionalTensor& x, const Tensor& like, std::initializer_list<int64_t> shape,
                fcsa::Strides& strides) {
  if (!x.has_value()) return nullptr;
  check_shape(name, *x, shape);
  check_dtype(name, *x, like.scalar_type());
  check_device(name, *x, like);
  strides = row_strides(name, *x);
  return x->data_ptr();
}

// A workspace: contiguous, dtype of q.
void* unit_data(const char* name, const OptionalTensor& x, const Tensor& like, std::initializer_list<int64_t> shape) {
  fcsa::Strides strides;
  void* data = rows_data(name, x, like, shape, strides);
  if (data != nullptr && !x->is_contiguous()) fail(name, "a contiguous tensor", "other strides");
  return data;
}

// Sizes of one call, 64 bits wide.
struct Sizes {
  int64_t b0, b1, heads, kv_heads, queries, keys, head_dim, groups;
};

struct Options {
  double scale_value;
  int64_t groups;
  bool causal, l2norm_qk, toeplitz;
};

Sizes sizes_of(const Tensor& q, const Tensor& k, int64_t groups) {
  if (q.dim() != 5) fail("q", "5 dims (b0, b1, h, i, d)", shape_of(q));
  if (k.dim() != 5) fail("k", "5 dims (b0, b1, hk, j, d)", shape_of(k));
  const Sizes s{q.size(0), q.size(1), q.size(2), k.size(2), q.size(3), k.size(3), q.size(4), groups};
  for (int64_t size : {s.b0, s.b1, s.heads, s.kv_heads, s.queries, s.keys, s.head_dim, s.groups})
    if (size < 1 || size > INT32_MAX) fail("q, k", "sizes from 1 to 2^31 - 1", shape_of(q) + ", " + shape_of(k));
  if (s.head_dim % 8 != 0) fail("q", "a head dim that is a multiple of 8", shape_of(q));
  if (s.head_dim % s.groups != 0) fail("groups", "a divisor of the head dim", std::to_string(s.groups));
  if (s.heads % s.kv_heads != 0) fail("k", "kv heads that divide the heads", shape_of(k));
  return s;
}

void set_mask(fcsa::Problem& p, const OptionalTensor& mask, const Tensor& q, const Sizes& s) {
  if (!mask.has_value()) return;
  check_broadcasts("mask", *mask, {s.b0, s.b1, s.keys});
  check_dtype("mask", *mask, ScalarType::Bool);
  check_device("mask", *mask, q);
  p.mask = static_cast<const uint8_t*>(mask->data_ptr());
  p.mask_b0 = broadcast_stride(*mask, 0);
  p.mask_b1 = broadcast_stride(*mask, 1);
  p.mask_key = broadcast_stride(*mask, 2);
}

// By its diagonals (b0, b1, h, 1, i + j - 1): entry (i, j) is number num_queries - 1 + j - i.
void set_toeplitz_bias(fcsa::Problem& p, const Tensor& bias, const Tensor& q, const Sizes& s) {
  const int64_t count = s.queries + s.keys - 1;
  check_broadcasts("bias", bias, {s.b0, s.b1, s.heads, 1, count});
  check_dtype("bias", bias, ScalarType::Float);
  check_device("bias", bias, q);
  if (bias.size(4) != count || (count > 1 && bias.stride(4) != 1)) fail("bias", "contiguous diagonals", shape_of(bias));
  p.bias_is_float32 = true;
  p.bias = static_cast<const float*>(bias.data_ptr()) + (s.queries - 1);
  p.bias_b0 = broadcast_stride(bias, 0);
  p.bias_b1 = broadcast_stride(bias, 1);
  p.bias_head = broadcast_stride(bias, 2);
  p.bias_query = -1;
  p.bias_key = 1;
}

void set_bias(fcsa::Problem& p, const OptionalTensor& bias, const Tensor& q, const Sizes& s, bool toeplitz) {
  if (!bias.has_value()) return;
  if (toeplitz) return set_toeplitz_bias(p, *bias, q, s);
  check_broadcasts("bias", *bias, {s.b0, s.b1, s.heads, s.queries, s.keys});
  p.bias_is_float32 = bias->scalar_type() == ScalarType::Float;
  if (!p.bias_is_float32) check_dtype("bias", *bias, q.scalar_type());
  check_device("bias", *bias, q);
  p.bias = bias->data_ptr();
  p.bias_b0 = broadcast_stride(*bias, 0);
  p.bias_b1 = broadcast_stride(*bias, 1);
  p.bias_head = broadcast_stride(*bias, 2);
  p.bias_query = broadcast_stride(*bias, 3);
  p.bias_key = broadcast_stride(*bias, 4);
}

// Fragments of 32 x 16 values for every bias that there is (sm80/packed_bias.cuh).
void set_packed_bias(fcsa::Problem& p, const OptionalTensor& packed, bool pair_kernels) {
  if (!packed.has_value()) return;
  p.pair_kernels = pair_kernels;
  const int64_t rows = int64_t{(p.num_queries + 31) / 32} * 2, columns = int64_t{(p.num_keys + 31) / 32} * 2;
  const int64_t fragments = rows * columns / 2;  // either of queries and keys may be the rows
  int64_t matrices = p.bias_head == 0 ? 1 : p.heads;
  if (p.bias_b0 != 0) matrices *= p.b0;
  if (p.bias_b1 != 0) matrices *= p.b1;
  const int64_t bytes = matrices * fragments * 512 * (p.bias_is_float32 ? 4 : 2);
  if (p.bias == nullptr || packed->numel() * static_cast<int64_t>(packed->element_size()) < bytes)
    fail("packed_bias", std::to_string(bytes) + " bytes, and a bias", shape_of(*packed));
  p.packed_bias = packed->data_ptr();
}

void set_bias_gradient(fcsa::BackwardParams& p, const OptionalTensor& dbias, const OptionalTensor& bias,
                       const Tensor& q) {
  if (!dbias.has_value()) return;
  if (!bias.has_value()) fail("dbias", "none without a bias", shape_of(*dbias));
  check_shape("dbias", *dbias, {bias->size(0), bias->size(1), bias->size(2), bias->size(3), bias->size(4)});
  check_dtype("dbias", *dbias, bias->scalar_type());
  check_device("dbias", *dbias, q);
  p.dbias = dbias->data_ptr();
  p.dbias_b0 = broadcast_stride(*dbias, 0);
  p.dbias_b1 = broadcast_stride(*dbias, 1);
  p.dbias_head = broadcast_stride(*dbias, 2);
  p.dbias_query = broadcast_stride(*dbias, 3);
  p.dbias_key = broadcast_stride(*dbias, 4);
}

void set_problem(fcsa::Problem& p, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                 const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& q_unit,
                 const OptionalTensor& k_unit, const Options& options, const Sizes& s) {
  p.b0 = static_cast<int32_t>(s.b0);
  p.b1 = static_cast<int32_t>(s.b1);
  p.heads = static_cast<int32_t>(s.heads);
  p.kv_heads = static_cast<int32_t>(s.kv_heads);
  p.num_queries = static_cast<int32_t>(s.queries);
  p.num_keys = static_cast<int32_t>(s.keys);
  p.head_dim = static_cast<int32_t>(s.head_dim);
  p.groups = static_cast<int32_t>(s.groups);
  p.causal = options.causal;
  p.l2norm_qk = options.l2norm_qk;
  p.q = rows_data("q", q, q, {s.b0, s.b1, s.heads, s.queries, s.head_dim}, p.q_strides);
  p.k = rows_data("k", k, q, {s.b0, s.b1, s.kv_heads, s.keys, s.head_dim}, p.k_strides);
  p.v = rows_data("v", v, q, {s.b0, s.b1, s.kv_heads, s.keys, s.head_dim}, p.v_strides);
  set_mask(p, mask, q, s);
  set_bias(p, bias, q, s, options.toeplitz);
  p.scale = float_data("scale", scale, q, {s.heads});
  p.scale_value = static_cast<float>(options.scale_value);
  p.q_unit = unit_data("q_unit", q_unit, q, {s.b0, s.b1, s.heads, s.queries, s.head_dim});
  p.k_unit = unit_data("k_unit", k_unit, q, {s.b0, s.b1, s.kv_heads, s.keys, s.head_dim});
}

void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::string message = std::string(what) + ": CUDA error " + std::to_string(static_cast<int>(error));
  char* text = nullptr;
  if (torch_c10_cuda_check_msg != nullptr && torch_c10_cuda_free_error_msg != nullptr) {
    torch_c10_cuda_check_msg(static_cast<int32_t>(error), __FILE__, what, __LINE__, false, &text);
    if (text != nullptr) {
      message += std::string(": ") + text;
      torch_c10_cuda_free_error_msg(text);
    }
  }
  throw std::runtime_error(message);
}

// On torch's current stream of the tensors' device. Host memory comes only from tests, whose launchers run no kernel.
template <class Launcher, class Params>
void launch(int64_t address, const Params& params, const Tensor& q, const char* what) {
  if (address == 0) fail("launcher", "the address of a launcher", "0");
  const auto launcher = reinterpret_cast<Launcher>(address);
  if (!q.is_cuda()) return check_cuda(launcher(params, nullptr), what);
  const int32_t device = q.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr) throw std::runtime_error("this torch has no CUDA");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  check_cuda(launcher(params, static_cast<cudaStream_t>(stream)), what);
}

void launch_forward(int64_t launcher, Tensor q, Tensor k, Tensor v, OptionalTensor mask, OptionalTensor bias,
                    OptionalTensor scale, double scale_value, double bound, int64_t groups, bool causal, bool l2norm_qk,
                    bool toeplitz, Tensor out, Tensor lse, OptionalTensor q_rnorm, OptionalTensor k_rnorm, OptionalTensor q_unit,
                    OptionalTensor k_unit, OptionalTensor v_split, OptionalTensor v_largest, OptionalTensor next_item,
                    OptionalTensor packed_bias, bool pair_kernels) {
  const Sizes s = sizes_of(q, k, groups);
  fcsa::ForwardParams p{};
  set_problem(p, q, k, v, mask, bias, scale, q_unit, k_unit, {scale_value, groups, causal, l2norm_qk, toeplitz}, s);
  p.out = rows_data("out", out, q, {s.b0, s.b1, s.heads, s.queries, s.head_dim}, p.out_strides);
  p.lse = float_data("lse", lse, q, {s.b0, s.b1, s.heads, s.queries});
  p.q_rnorm = float_data("q_rnorm", q_rnorm, q, {s.b0, s.b1, s.heads, s.queries, s.groups});
  p.k_rnorm = float_data("k_rnorm", k_rnorm, q, {s.b0, s.b1, s.kv_heads, s.keys, s.groups});
  p.bound = static_cast<float>(bound);
  p.v_split = unit_data("v_split", v_split, q, {s.b0, s.b1, s.kv_heads, s.keys, s.head_dim});
  p.v_largest = float_data("v_largest", v_largest, q, {s.b0, s.b1, s.kv_heads});
  p.next_item = reinterpret_cast<uint32_t*>(float_data("next_item", next_item, q, {1}));
  set_packed_bias(p, packed_bias, pair_kernels);
  launch<fcsa::ForwardLauncher>(launcher, p, q, "forward");
}

void launch_backward(int64_t launcher, Tensor q, Tensor k, Tensor v, OptionalTensor mask, OptionalTensor bias,
                     OptionalTensor scale, double scale_value, int64_t groups, bool causal, bool l2norm_qk, bool toeplitz,
                     Tensor dout, OptionalTensor dlse, Tensor out, Tensor lse, OptionalTensor q_rnorm, OptionalTensor k_rnorm,
                     OptionalTensor dq, OptionalTensor dk, OptionalTensor dv, OptionalTensor dbias,
                     OptionalTensor dscale_rows, Tensor query_rows, OptionalTensor dq_accum,
                     OptionalTensor dq_progress, OptionalTensor q_unit, OptionalTensor k_unit, OptionalTensor v_split,
                     OptionalTensor v_largest, OptionalTensor dout_split, OptionalTensor dout_largest,
                     OptionalTensor dbias_parts, OptionalTensor packed_bias, bool pair_kernels,
                     bool deterministic) {
  const Sizes s = sizes_of(q, k, groups);
  fcsa::BackwardParams p{};
  set_problem(p, q, k, v, mask, bias, scale, q_unit, k_unit, {scale_value, groups, causal, l2norm_qk, toeplitz}, s);
  p.dout = rows_data("dout", dout, q, {s.b0, s.b1, s.heads, s.queries, s.head_dim}, p.dout_strides);
  p.out = rows_data("out", out, q, {s.b0, s.b1, s.heads, s.queries, s.head_dim}, p.out_strides);
  p.dlse = float_data("dlse", dlse, q, {s.b0, s.b1, s.heads, s.queries});
  p.lse = float_data("lse", lse, q, {s.b0, s.b1, s.heads, s.queries});
  p.q_rnorm = float_data("q_rnorm", q_rnorm, q, {s.b0, s.b1, s.heads, s.queries, s.groups});
  p.k_rnorm = float_data("k_rnorm", k_rnorm, q, {s.b0, s.b1, s.kv_heads, s.keys, s.groups});
  p.dq = rows_data("dq", dq, q, {s.b0, s.b1, s.heads, s.queries, s.head_dim}, p.dq_strides);
  p.dk = rows_data("dk", dk, q, {s.b0, s.b1, s.kv_heads, s.keys, s.head_dim}, p.dk_strides);
  p.dv = rows_data("dv", dv, q, {s.b0, s.b1, s.kv_heads, s.keys, s.head_dim}, p.dv_strides);
  set_bias_gradient(p, dbias, bias, q);
  p.dscale_rows = float_data("dscale_rows", dscale_rows, q, {s.b0, s.b1, s.heads, s.queries});
  const int64_t rows = (s.queries + 127) / 128 * 128;
  p.query_rows = reinterpret_cast<float4*>(float_data("query_rows", query_rows, q, {s.b0, s.b1, s.heads, rows, 4}));
  if (dq_accum.has_value() && dq_accum->size(dq_accum->dim() - 1) < s.head_dim)
    fail("dq_accum", "columns of the variant's head dim", shape_of(*dq_accum));
  const int64_t columns = dq_accum.has_value() ? dq_accum->size(dq_accum->dim() - 1) : 0;
  p.dq_accum = float_data("dq_accum", dq_accum, q, {s.b0, s.b1, s.heads, rows, columns});
  p.dq_progress = reinterpret_cast<uint32_t*>(
      float_data("dq_progress", dq_progress, q, {s.b0, s.b1, s.kv_heads, (s.keys + 127) / 128, 2}));
  p.v_split = unit_data("v_split", v_split, q, {s.b0, s.b1, s.kv_heads, s.keys, s.head_dim});
  p.v_largest = float_data("v_largest", v_largest, q, {s.b0, s.b1, s.kv_heads});
  p.dout_split = unit_data("dout_split", dout_split, q, {s.b0, s.b1, s.heads, s.queries, s.head_dim});
  p.dout_largest = float_data("dout_largest", dout_largest, q, {2, s.b0, s.b1, s.kv_heads});
  p.dbias_parts_size = dbias_parts.has_value() ? dbias_parts->numel() : 0;
  p.dbias_parts = float_data("dbias_parts", dbias_parts, q, {p.dbias_parts_size});
  set_packed_bias(p, packed_bias, pair_kernels);
  p.deterministic = deterministic;
  launch<fcsa::BackwardLauncher>(launcher, p, q, "backward");
}

// ---- the common call, allocations included, in one go each way: half precision, (b, h, n, d) tensors in the kernels' form with one
// head dim, one group, the norm, a mask (b | 1, j) or none, no bias, no learned scale. The adapter (common_call.py) knows all this of a signature.

// A new tensor on the device of `like`.
Tensor empty(const Tensor& like, int32_t dtype, int64_t dims, const int64_t* sizes, const int64_t* strides) {
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

// Dense, of the sizes and dtype of x (b, h, n, d), its dims in the order that they have in the memory of x.
Tensor empty_like(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t order[4] = {0, 1, 2, 3}, dense[4], step = 1;
  const auto swap_if_smaller = [&](int a, int b) {
    if (strides[order[a]] < strides[order[b]]) std::swap(order[a], order[b]);
  };
  swap_if_smaller(0, 1), swap_if_smaller(1, 2), swap_if_smaller(0, 1);
  for (int i = 3; i >= 0; --i) dense[order[i]] = step, step *= sizes[order[i]];
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return empty(x, dtype, 4, sizes.data(), dense);
}

Tensor empty_floats(const Tensor& like, int64_t count) {
  const int64_t one = 1;
  return empty(like, aoti_torch_dtype_float32(), 1, &count, &one);
}

// Several arrays in one allocation: each call gives the place of the next one, in floats.
struct Places {
  int64_t floats = 0;
  int64_t take(int64_t count) {
    const int64_t at = floats;
    floats += (count + 63) / 64 * 64;  // on boundaries of 256 bytes
    return at;
  }
};

// What a forward leaves for its backward beside out: the norm factors, and the log-sum-exp unless it is a result. The counter of
// the kernel's items is used by the forward alone. common_call.py reads it too (`_left_by_forward`).
struct LeftByForward {
  int64_t q_rnorm, k_rnorm, next_item, lse, floats;
  LeftByForward(const fcsa::Problem& p, bool holds_lse) {
    const int64_t queries = int64_t{p.b0} * p.heads * p.num_queries, keys = int64_t{p.b0} * p.kv_heads * p.num_keys;
    Places places;
    q_rnorm = places.take(queries), k_rnorm = places.take(keys), next_item = places.take(1);
    lse = holds_lse ? places.take(queries) : 0;
    floats = places.floats;
  }
};

void set_common_problem(fcsa::Problem& p, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                        double scale_value, bool causal) {
  if (q.dim() != 4 || k.dim() != 4 || v.dim() != 4) fail("q, k, v", "4 dims (b, h, n, d)", shape_of(q) + ", " + shape_of(k));
  const auto q_sizes = q.sizes(), k_sizes = k.sizes();
  p.b0 = static_cast<int32_t>(q_sizes[0]), p.b1 = 1, p.heads = static_cast<int32_t>(q_sizes[1]);
  p.kv_heads = static_cast<int32_t>(k_sizes[1]), p.num_queries = static_cast<int32_t>(q_sizes[2]);
  p.num_keys = static_cast<int32_t>(k_sizes[2]), p.head_dim = static_cast<int32_t>(q_sizes[3]), p.groups = 1;
  p.causal = causal, p.l2norm_qk = true;
  p.q = q.data_ptr(), p.k = k.data_ptr(), p.v = v.data_ptr();
  p.q_strides = row_strides("q", q), p.k_strides = row_strides("k", k), p.v_strides = row_strides("v", v);
  p.scale_value = static_cast<float>(scale_value);
  if (mask.has_value()) {
    p.mask = static_cast<const uint8_t*>(mask->data_ptr());
    p.mask_b0 = broadcast_stride(*mask, 0), p.mask_key = broadcast_stride(*mask, 1);
  }
}

// What decides how a common call is served: sizes, strides, dtypes and devices of q, k, v and the mask, and the options.
struct Signature {
  static constexpr int kWords = 3 * 9 + 5 + 2;
  uint64_t words[kWords];
  bool operator==(const Signature& other) const { return std::memcmp(words, other.words, sizeof(words)) == 0; }
};

struct SignatureHash {
  size_t operator()(const Signature& signature) const {
    uint64_t hash = 0;
    for (uint64_t word : signature.words) {
      hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 29;
    }
    return hash;
  }
};

enum class Pass : uint64_t { kForward, kBackward, kDeterministicBackward };

struct Plan {
  int64_t launcher;
  int64_t columns, dq_heads, progress_words;  // of a backward, as common_backward has them
};

std::unordered_map<Signature, Plan, SignatureHash> plans;
std::mutex plans_mutex;

uint64_t kind_of(const Tensor& x) {  // dtype and device
  int32_t dtype = 0, device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  const uint64_t device = static_cast<uint64_t>(device_type) << 16 | static_cast<uint16_t>(x.get_device_index());
  return static_cast<uint64_t>(dtype) << 32 | device;
}

uint64_t* write_shape(uint64_t* word, const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  for (size_t dim = 0; dim < sizes.size(); ++dim) *word++ = sizes[dim], *word++ = strides[dim];
  *word++ = kind_of(x);
  return word;
}

// Nothing for tensors that the kernels would not take as they are; their strides have been looked at when the plan was made.
std::optional<Signature> signature_of(Pass pass, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                                      double scale_value, bool causal, int64_t backend) {
  Signature signature{};
  uint64_t* word = signature.words;
  for (const Tensor* x : {&q, &k, &v}) {
    if (x->dim() != 4 || reinterpret_cast<uintptr_t>(x->data_ptr()) % 16 != 0) return std::nullopt;
    word = write_shape(word, *x);
  }
  if (mask.has_value() && mask->dim() != 2) return std::nullopt;
  word = mask.has_value() ? write_shape(word, *mask) : word + 5;
  std::memcpy(word++, &scale_value, sizeof(scale_value));
  *word = static_cast<uint64_t>(backend) << 8 | static_cast<uint64_t>(pass) << 1 | static_cast<uint64_t>(causal);
  return signature;
}

std::optional<Plan> plan_of(const std::optional<Signature>& signature) {
  if (!signature.has_value()) return std::nullopt;
  const std::lock_guard<std::mutex> lock(plans_mutex);
  const auto found = plans.find(*signature);
  return found == plans.end() ? std::nullopt : std::make_optional(found->second);
}

// How later calls go that have this call's signature.
void remember_common(int64_t pass, Tensor q, Tensor k, Tensor v, OptionalTensor mask, double scale_value, bool causal, int64_t backend,
                     int64_t launcher, int64_t columns, int64_t dq_heads, int64_t progress_words) {
  const auto signature = signature_of(static_cast<Pass>(pass), q, k, v, mask, scale_value, causal, backend);
  if (!signature.has_value()) return;
  const std::lock_guard<std::mutex> lock(plans_mutex);
  plans[*signature] = {launcher, columns, dq_heads, progress_words};
}

void forget_common(Tensor) {
  const std::lock_guard<std::mutex> lock(plans_mutex);
  plans.clear();
}

// Nothing where no call of this signature has been remembered.
std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> common_forward(Tensor q, Tensor k, Tensor v, OptionalTensor mask,
                                                                          double scale_value, bool causal, int64_t backend,
                                                                          bool returns_lse) {
  const auto plan = plan_of(signature_of(Pass::kForward, q, k, v, mask, scale_value, causal, backend));
  if (!plan.has_value()) return {};
  fcsa::ForwardParams p{};
  set_common_problem(p, q, k, v, mask, scale_value, causal);
  p.bound = std::abs(p.scale_value);
  Tensor out = empty_like(q);
  p.out = out.data_ptr(), p.out_strides = row_strides("out", out);
  const LeftByForward at(p, !returns_lse);
  Tensor left = empty_floats(q, at.floats);
  float* floats = static_cast<float*>(left.data_ptr());
  p.q_rnorm = floats + at.q_rnorm, p.k_rnorm = floats + at.k_rnorm;
  p.next_item = reinterpret_cast<uint32_t*>(floats + at.next_item);
  OptionalTensor lse;
  if (returns_lse) {
    const int64_t sizes[3] = {p.b0, p.heads, p.num_queries};
    const int64_t strides[3] = {sizes[1] * sizes[2], sizes[2], 1};
    lse = empty(q, aoti_torch_dtype_float32(), 3, sizes, strides);
  }
  p.lse = returns_lse ? static_cast<float*>(lse->data_ptr()) : floats + at.lse;
  launch<fcsa::ForwardLauncher>(plan->launcher, p, q, "forward");
  return {out, left, lse};
}

// left, lse: of the forward. Columns: kHeadDim of the variant; dq_heads: for how many dq_accum has room, 0: made without it;
// progress_words: the size of dq_progress, 0: none. Nothing where no backward of this signature has been remembered.
std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> common_backward(
    Tensor dout, OptionalTensor dlse, Tensor out, Tensor left, OptionalTensor lse, Tensor q, Tensor k, Tensor v,
    OptionalTensor mask, double scale_value, bool causal, int64_t backend, bool deterministic, bool wants_dq, bool wants_dk, bool wants_dv) {
  const Pass pass = deterministic ? Pass::kDeterministicBackward : Pass::kBackward;
  const auto plan = plan_of(signature_of(pass, q, k, v, mask, scale_value, causal, backend));
  if (!plan.has_value()) return {};
  fcsa::BackwardParams p{};
  set_common_problem(p, q, k, v, mask, scale_value, causal);
  const int64_t batch = p.b0, heads = p.heads, kv_heads = p.kv_heads, queries = p.num_queries, keys = p.num_keys;
  const int64_t width = p.head_dim;
  check_shape("dout", dout, {batch, heads, queries, width});
  check_dtype("dout", dout, q.scalar_type());
  p.dout = dout.data_ptr(), p.dout_strides = row_strides("dout", dout);
  p.out = out.data_ptr(), p.out_strides = row_strides("out", out);
  p.dlse = float_data("dlse", dlse, q, {batch, heads, queries});
  const LeftByForward at(p, !lse.has_value());
  if (left.numel() != at.floats) fail("left", std::to_string(at.floats) + " floats", shape_of(left));
  const float* floats = static_cast<const float*>(left.data_ptr());
  p.q_rnorm = floats + at.q_rnorm, p.k_rnorm = floats + at.k_rnorm;
  p.lse = lse.has_value() ? float_data("lse", lse, q, {batch, heads, queries}) : floats + at.lse;

  OptionalTensor dq, dk, dv;
  if (wants_dq) dq = empty_like(q), p.dq = dq->data_ptr(), p.dq_strides = row_strides("dq", *dq);
  if (wants_dk) dk = empty_like(k), p.dk = dk->data_ptr(), p.dk_strides = row_strides("dk", *dk);
  if (wants_dv) dv = empty_like(v), p.dv = dv->data_ptr(), p.dv_strides = row_strides("dv", *dv);

  const int64_t rows = (queries + 127) / 128 * 128;
  const bool copies = q.scalar_type() == ScalarType::Half;  // as launch_backward's caller has them
  const int64_t dq_heads = wants_dq ? plan->dq_heads : 0, progress_words = wants_dq ? plan->progress_words : 0;
  Places places;
  const int64_t query_rows = places.take(batch * heads * rows * 4), dq_accum = places.take(dq_heads * rows * plan->columns);
  const int64_t progress = places.take(progress_words);
  const int64_t q_unit = places.take(copies ? batch * heads * queries * width / 2 : 0);
  const int64_t k_unit = places.take(copies ? batch * kv_heads * keys * width / 2 : 0);
  Tensor workspace = empty_floats(q, places.floats);  // goes back to the stream's pool, behind the launch
  float* memory = static_cast<float*>(workspace.data_ptr());
  p.query_rows = reinterpret_cast<float4*>(memory + query_rows);
  if (dq_heads > 0) p.dq_accum = memory + dq_accum;
  if (progress_words > 0) p.dq_progress = reinterpret_cast<uint32_t*>(memory + progress);
  if (copies) p.q_unit = memory + q_unit, p.k_unit = memory + k_unit;
  p.deterministic = deterministic;
  launch<fcsa::BackwardLauncher>(plan->launcher, p, q, "backward");
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(flash_cosine_sim_attention, m) {
  m.def(
      "launch_forward(int launcher, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? scale, "
      "float scale_value, float bound, int groups, bool causal, bool l2norm_qk, bool toeplitz, "
      "Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? q_rnorm, Tensor(d!)? k_rnorm, Tensor(e!)? q_unit, Tensor(f!)? k_unit, Tensor(g!)? v_split, "
      "Tensor(h!)? v_largest, Tensor(i!)? next_item, Tensor(j!)? packed_bias, bool pair_kernels) -> ()");
  m.def(
      "common_forward(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale_value, bool causal, int backend, bool returns_lse) "
      "-> (Tensor? out, Tensor? left, Tensor? lse)");
  m.def(
      "common_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor left, Tensor? lse, Tensor q, Tensor k, Tensor v, "
      "Tensor? mask, float scale_value, bool causal, int backend, bool deterministic, bool wants_dq, bool wants_dk, bool wants_dv) "
      "-> (Tensor? dq, Tensor? dk, Tensor? dv)");
  m.def(
      "remember_common(int which_pass, Tensor q, Tensor k, Tensor v, Tensor? mask, float scale_value, bool causal, int backend, int launcher, "
      "int columns, int dq_heads, int progress_words) -> ()");
  m.def("forget_common(Tensor any) -> ()");
  m.def(
      "launch_backward(int launcher, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? scale, "
      "float scale_value, int groups, bool causal, bool l2norm_qk, bool toeplitz, Tensor dout, Tensor? dlse, Tensor out, "
      "Tensor lse, Tensor? q_rnorm, Tensor? k_rnorm, Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, Tensor(d!)? dbias, "
      "Tensor(e!)? dscale_rows, Tensor(f!) query_rows, Tensor(g!)? dq_accum, Tensor(h!)? dq_progress, "
      "Tensor(i!)? q_unit, Tensor(j!)? k_unit, Tensor(k!)? v_split, Tensor(l!)? v_largest, Tensor(m!)? dout_split, "
      "Tensor(n!)? dout_largest, Tensor(o!)? dbias_parts, Tensor(p!)? packed_bias, "
      "bool pair_kernels, bool deterministic) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flash_cosine_sim_attention, CompositeExplicitAutograd, m) {
  m.impl("launch_forward", TORCH_BOX(&launch_forward));
  m.impl("common_forward", TORCH_BOX(&common_forward));
  m.impl("common_backward", TORCH_BOX(&common_backward));
  m.impl("remember_common", TORCH_BOX(&remember_common));
  m.impl("forget_common", TORCH_BOX(&forget_common));
  m.impl("launch_backward", TORCH_BOX(&launch_backward));
}
