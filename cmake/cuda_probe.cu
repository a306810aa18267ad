// What the CUDA backend asks of a toolkit and its host compiler: C++20, the driver's types, the runtime's static library. cuda.cmake compiles and links it.
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <concepts>

template <std::integral T>
__global__ void probe(T) {}

int main() {
  void* encode = nullptr;
  cudaDriverEntryPointQueryResult found;
  probe<<<1, 1>>>(0);
  return cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found);
}
