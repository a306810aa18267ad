// Device memory with no page mapped in front of it: whatever reaches before its first byte faults. For tensors whose maps start ahead of them.
#pragma once
#include <cudaTypedefs.h>

#include <memory>

#include "cuda/launch.h"

namespace machmoe::test {

template <class Function>
Function driver_function(const char* name) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  MACHMOE_CUDA_CALL(cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess) throw Error(Status::Backend, fmt::format("the driver has no {}: install one for CUDA 12 or later", name));
  return reinterpret_cast<Function>(entry);
}

inline std::shared_ptr<void> edge_memory(size_t bytes) {
  static const auto granularity_of = driver_function<PFN_cuMemGetAllocationGranularity_v10020>("cuMemGetAllocationGranularity");
  static const auto reserve = driver_function<PFN_cuMemAddressReserve_v10020>("cuMemAddressReserve");
  static const auto create = driver_function<PFN_cuMemCreate_v10020>("cuMemCreate");
  static const auto map = driver_function<PFN_cuMemMap_v10020>("cuMemMap");
  static const auto set_access = driver_function<PFN_cuMemSetAccess_v10020>("cuMemSetAccess");
  static const auto release = driver_function<PFN_cuMemRelease_v10020>("cuMemRelease");
  static const auto unmap = driver_function<PFN_cuMemUnmap_v10020>("cuMemUnmap");
  static const auto free_range = driver_function<PFN_cuMemAddressFree_v10020>("cuMemAddressFree");
  const auto call = [](CUresult result) {
    if (result != CUDA_SUCCESS) throw Error(Status::Backend, fmt::format("virtual memory: driver error {}", static_cast<int>(result)));
  };
  int device = 0;
  MACHMOE_CUDA_CALL(cudaGetDevice(&device));
  CUmemAllocationProp prop{};
  prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  prop.location.id = device;
  size_t page = 0;
  call(granularity_of(&page, &prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM));
  const size_t size = (bytes + page - 1) / page * page;
  CUdeviceptr range = 0;
  call(reserve(&range, page + size, page, 0, 0));
  CUmemGenericAllocationHandle memory = 0;
  call(create(&memory, size, &prop, 0));
  const CUdeviceptr first = range + page;
  call(map(first, size, 0, memory, 0));
  call(release(memory));  // the mapping keeps it
  const CUmemAccessDesc access{prop.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  call(set_access(first, size, &access, 1));
  return {reinterpret_cast<void*>(first), [=](void*) {
            cudaDeviceSynchronize();
            unmap(first, size);
            free_range(range, page + size);
          }};
}

}  // namespace machmoe::test
