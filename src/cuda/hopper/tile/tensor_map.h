// Tensor maps, the descriptors of the tensor copy engine. Encoded on the host through the driver, which is found at run time.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>
#include <initializer_list>

namespace machmoe::cuda::hopper {

// dims, strides (bytes, of every dimension but the first) and box innermost first; swizzle = bytes of its span: 128, 64 or 0. Elements outside are read
// as zero and not written.
CUtensorMap encode_tensor_map(CUtensorMapDataType type, const void* base, std::initializer_list<uint64_t> dims,
                              std::initializer_list<uint64_t> strides, std::initializer_list<uint32_t> box, int swizzle);

template <class T>
constexpr CUtensorMapDataType kTensorMapType = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
template <>
inline constexpr CUtensorMapDataType kTensorMapType<float> = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;

template <class T>
CUtensorMap tensor_map(const void* base, std::initializer_list<uint64_t> dims, std::initializer_list<uint64_t> strides,
                       std::initializer_list<uint32_t> box, int swizzle) {
  return encode_tensor_map(kTensorMapType<T>, base, dims, strides, box, swizzle);
}

// Up to box.rows rows of [rows, planes, columns] bf16 that end exactly at a given row, without editing a descriptor: one more dimension of box.rows rows
// overlaps the next one, so that the box sticks out of the tensor by the rows to clip. Coordinates (column, box.rows - v, row + v, plane) write rows
// row .. row + v - 1 of the box and nothing else, or read them and zeros for the rest. The base lies box.rows rows before the tensor, where nothing need be
// mapped as long as v > 0: a load all out of bounds can fault.
constexpr int kRaggedRows = 16;  // of most
struct RaggedBox {
  uint32_t columns, rows = kRaggedRows, planes = 1;
};
CUtensorMap ragged_map(const void* base, uint64_t rows, uint64_t planes, uint64_t columns, const RaggedBox& box);

}  // namespace machmoe::cuda::hopper
