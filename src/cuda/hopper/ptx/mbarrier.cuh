// mbarrier: arrivals and transaction bytes in shared memory (PTX ISA "Parallel Synchronization and Communication Instructions: mbarrier").
#pragma once
#include "device.cuh"

namespace machmoe::cuda::hopper {

DEV void mbar_init(uint32_t bar, uint32_t count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory"); }
// Makes the initialised barriers visible to the cluster and to the copy engine.
DEV void mbar_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEV void mbar_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
// The shared::cluster address of the same variable in CTA `cta` of this cluster, own rank allowed.
DEV uint32_t cluster_address(uint32_t addr, uint32_t cta) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(addr), "r"(cta));
  return remote;
}
// Arrives on a barrier at a cluster_address. The default semantics on purpose: spelling out .release.cluster makes every arrival a fence of the whole
// cluster and cost 35 to 60 % of a GEMM.
DEV void mbar_arrive_cluster(uint32_t bar) { asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory"); }
// Waits until the phase of this parity has completed. Ambiguous by two phases: callers stay within one phase of the barrier.
DEV void mbar_wait(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(bar),
      "r"(parity)
      : "memory");
}
// An arrival counted in the initial count, made once all earlier cp.async of this thread have landed.
DEV void cp_async_mbar_arrive_noinc(uint32_t bar) { asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory"); }

}  // namespace machmoe::cuda::hopper
