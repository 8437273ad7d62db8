// TMA descriptors ("tensor maps") of the (b0, b1, heads, rows, d) tensors of params.h, built on the host at each launch
// and passed to the kernel by value. Reads beyond the rows or the head dim give zeros.
#pragma once

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <type_traits>

#include "../params.h"

namespace fcsa::sm90 {

// cuTensorMapEncodeTiled of the driver; the library itself links no libcuda, so that it loads where there is none.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &found);
    const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(usable ? pointer : nullptr);
  }();
  return encoder;
}

// Which coordinates a tensor really has: an expanded dim (stride 0) is a dim of size 1, always at 0.
struct TensorMap {
  CUtensorMap map;
  int row_step, head_step, b1_step, b0_step;  // 1, or 0 where expanded
};

template <class Element>
constexpr CUtensorMapDataType kMapType = std::is_same_v<Element, float>    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                         : std::is_same_v<Element, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                           : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

// Boxes of `box_rows` x `box_cols`, 128 or 64 bytes wide and swizzled by as many. Expanded rows: only where a map may be one of
// a single row (`shared_rows`), which then is at row 0.
template <class Element>
cudaError_t make_tensor_map(TensorMap* result, const void* data, const Strides& strides, const int32_t (&sizes)[5],
                            int box_rows, int box_cols = 64, bool shared_rows = false) {
  const auto encoder = tensor_map_encoder();
  if (encoder == nullptr) return cudaErrorNotSupported;
  const int64_t steps[4] = {strides.row, strides.head, strides.b1, strides.b0};
  cuuint64_t extents[5] = {static_cast<cuuint64_t>(sizes[4])}, byte_strides[4];
  for (int i = 0; i < 4; ++i) {
    const bool expanded = (i > 0 || shared_rows) && (steps[i] == 0 || sizes[3 - i] == 1);
    extents[i + 1] = expanded ? 1 : sizes[3 - i];
    byte_strides[i] = steps[i] == 0 || expanded ? 16 : steps[i] * sizeof(Element);
  }
  if (strides.row == 0 && sizes[3] > 1 && !shared_rows) return cudaErrorNotSupported;  // the adapter copies such inputs
  const cuuint32_t box[5] = {static_cast<cuuint32_t>(box_cols), static_cast<cuuint32_t>(box_rows), 1, 1, 1};
  const cuuint32_t element_strides[5] = {1, 1, 1, 1, 1};
  const auto swizzle = box_cols * sizeof(Element) == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  const CUresult error = encoder(&result->map, kMapType<Element>, 5, const_cast<void*>(data), extents, byte_strides, box,
                                 element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  result->row_step = extents[1] != 1 || sizes[3] == 1;
  result->head_step = extents[2] != 1 || sizes[2] == 1;
  result->b1_step = extents[3] != 1 || sizes[1] == 1;
  result->b0_step = extents[4] != 1 || sizes[0] == 1;
  return error == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// The maps of q, k and v: of their copies where there are, contiguous. q_rows, k_rows: of a tile of queries, of keys.
template <class Element, class Maps>
cudaError_t make_input_maps(Maps* maps, const Problem& p, int q_rows, int k_rows) {
  const int32_t q_sizes[5] = {p.b0, p.b1, p.heads, p.num_queries, p.head_dim};
  const int32_t k_sizes[5] = {p.b0, p.b1, p.kv_heads, p.num_keys, p.head_dim};
  const auto contiguous = [&](int64_t heads, int64_t rows) {
    return Strides{p.b1 * heads * rows * p.head_dim, heads * rows * p.head_dim, rows * p.head_dim, p.head_dim};
  };
  const bool copies = p.q_unit != nullptr;
  const Strides q_strides = copies ? contiguous(p.heads, p.num_queries) : p.q_strides;
  const Strides k_strides = copies ? contiguous(p.kv_heads, p.num_keys) : p.k_strides;
  cudaError_t error = make_tensor_map<Element>(&maps->q, copies ? p.q_unit : p.q, q_strides, q_sizes, q_rows);
  if (error != cudaSuccess) return error;
  error = make_tensor_map<Element>(&maps->k, copies ? p.k_unit : p.k, k_strides, k_sizes, k_rows);
  if (error != cudaSuccess) return error;
  return make_tensor_map<Element>(&maps->v, p.v, p.v_strides, k_sizes, k_rows);
}

}  // namespace fcsa::sm90
