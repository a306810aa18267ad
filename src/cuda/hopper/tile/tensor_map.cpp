#include "cuda/hopper/tile/tensor_map.h"

#include <cudaTypedefs.h>
#include <fmt/ranges.h>

#include "cuda/launch.h"

namespace machmoe::cuda::hopper {
namespace {

PFN_cuTensorMapEncodeTiled_v12000 find_encoder() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  MACHMOE_CUDA_CALL(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess)
    throw Error(Status::Backend, "the driver has no cuTensorMapEncodeTiled: install a driver for CUDA 12 or later");
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
}

void bind_context() {
  int device = 0;
  MACHMOE_CUDA_CALL(cudaGetDevice(&device));
  MACHMOE_CUDA_CALL(cudaSetDevice(device));
}

}  // namespace

CUtensorMap encode_tensor_map(CUtensorMapDataType type, const void* base, std::initializer_list<uint64_t> dims,
                              std::initializer_list<uint64_t> strides, std::initializer_list<uint32_t> box, int swizzle) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = find_encoder();
  static constexpr uint32_t kDense[5] = {1, 1, 1, 1, 1};
  const CUtensorMapSwizzle mode = swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                  : swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                  : CU_TENSOR_MAP_SWIZZLE_NONE;
  CUtensorMap map;
  const auto attempt = [&] {
    return encode(&map, type, static_cast<uint32_t>(dims.size()), const_cast<void*>(base), dims.begin(), strides.begin(), box.begin(), kDense,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, mode, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = attempt();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {  // a thread that has not launched anything yet: the runtime binds its context here
    bind_context();
    result = attempt();
  }
  if (result != CUDA_SUCCESS)
    throw Error(Status::Backend,
                fmt::format("no tensor map of base {}, sizes {}, byte strides {}, box {} (driver error {}): base and strides must be "
                            "multiples of 16 bytes",
                            base, fmt::join(dims, " x "), fmt::join(strides, ", "), fmt::join(box, " x "), static_cast<int>(result)));
  return map;
}

CUtensorMap ragged_map(const void* base, uint64_t rows, uint64_t planes, uint64_t columns, const RaggedBox& box) {
  const uint64_t pitch = 2 * planes * columns;
  return tensor_map<__nv_bfloat16>(static_cast<const uint8_t*>(base) - box.rows * pitch, {columns, box.rows, rows + 1, planes},
                                   {pitch, pitch, 2 * columns}, {box.columns, box.rows, 1, box.planes}, static_cast<int>(2 * box.columns));
}

}  // namespace machmoe::cuda::hopper
