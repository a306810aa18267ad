// The table of the CUDA backend, and whether there is a GPU for it.
#include "backend.h"

#include <string>

#include "core/check.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/work.h"

namespace machmoe {
namespace {

void check_shape(const Shape& s) {
  validate(s);
  MACHMOE_SUPPORTED(s.dtype == DType::BF16, "dtype is {}, expected BF16 (1) on CUDA: cast the tensors to bfloat16, or use autocast",
                    static_cast<int>(s.dtype));
  MACHMOE_SUPPORTED(s.T * (s.d / 8) < int64_t{1} << 32, "T is {} and d {}, expected fewer than 2^35 elements of x on CUDA: split the tokens", s.T,
                    s.d);
  MACHMOE_SUPPORTED(s.E <= cuda::kMaxExperts, "E is {}, expected at most {} experts on CUDA", s.E, cuda::kMaxExperts);
}

// "" with a GPU of compute capability 9.0 that this process can use.
std::string find_gpu() {
  int devices = 0;
  if (const cudaError_t status = cudaGetDeviceCount(&devices); status != cudaSuccess)
    return fmt::format("no CUDA device: {}", cudaGetErrorString(status));
  for (int device = 0; device < devices; device++) {
    int major = 0, minor = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 && minor == 0)
      return "";
  }
  return fmt::format("{} CUDA device(s), none of compute capability 9.0: the kernels are for Hopper (H100, H200)", devices);
}
const std::string& gpu_problem() {
  static const std::string problem = find_gpu();
  return problem;
}

}  // namespace

const Backend* cuda_backend() {
  static constexpr Backend table = {
      .index_scratch = cuda::index_scratch,
      .topk_scratch = cuda::topk_scratch,
      .tiles_bytes = [](const Shape& s) { return static_cast<int64_t>(cuda::work_bytes(s.R_cap, s.E)); },
      .ds_parts = cuda::hopper::ds_parts,
      .check_shape = check_shape,
      .clear = cuda::clear,
      .index_topk = checked<cuda::index_topk>,
      .index_lists = checked<cuda::index_lists>,
      .index_rows = checked<cuda::index_rows>,
      .topk = checked<cuda::topk>,
      .topk_backward = checked<cuda::topk_backward>,
      .up_proj = checked<cuda::hopper::up_proj>,
      .down_proj = checked<cuda::hopper::down_proj>,
      .aggregate = checked<cuda::aggregate>,
      .down_proj_bwd = checked<cuda::hopper::down_proj_bwd>,
      .up_proj_bwd = checked<cuda::hopper::up_proj_bwd>,
      .weight_grad_w2 = checked<cuda::hopper::weight_grad_w2>,
      .weight_grad_w1 = checked<cuda::hopper::weight_grad_w1>,
      .bias_grad = checked<cuda::bias_grad>,
      .score_grad = checked<cuda::score_grad>,
      .token_round_scratch = cuda::token_round_scratch,
      .token_round = checked<cuda::token_round>,
      .token_round_backward = checked<cuda::token_round_backward>,
  };
  return gpu_problem().empty() ? &table : nullptr;
}

const char* cuda_unavailable_reason() { return gpu_problem().c_str(); }

}  // namespace machmoe
