// Named barriers, register hand-over, proxy fences and clusters.
#pragma once
#include "device.cuh"

namespace machmoe::cuda::hopper {

// Orders this thread's shared-memory accesses before those of the async proxy (wgmma operands, tensor copies).
DEV void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEV void bar_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// The same value in every lane, and known to be: it goes to a uniform register.
DEV int uniform(int v) { return __shfl_sync(~0u, v, 0); }
// The same for a condition that holds in every lane or in none: what follows from it goes to uniform registers.
DEV bool uniform(bool v) { return __any_sync(~0u, v); }
// Read where it is used: no register keeps it.
DEV int lane_id() {
  int l;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(l));
  return l;
}
// Registers per thread of this warpgroup from now on.
template <int N>
DEV void reg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
DEV void reg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
DEV uint32_t cluster_ctarank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
DEV void cluster_sync() { asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory"); }

}  // namespace machmoe::cuda::hopper
