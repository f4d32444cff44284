#pragma once

#include <cuda_bf16.h>

#include <cstdint>

/// The PTX that the sm_80 kernels are made of: ldmatrix, mma.sync, cp.async and mbarriers, plus the
/// bulk copy that takes the place of cp.async from sm_90 on. Shared-memory addresses are 32-bit.
namespace longspan::cuda {

/// What turns a logarithm in base 2 into a natural one.
inline constexpr float kLn2 = 0.693147180559945F;

__device__ inline uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

/// Byte offset of 16-byte chunk `chunk` (0..7) of row `row` in the 128-byte swizzle of KvLayout.
__device__ constexpr uint32_t swizzle(uint32_t row, uint32_t chunk) {
  return row * 128 + ((chunk ^ (row % 8)) * 16);
}

/// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
/// In r[m] each lane gets the elements (lane / 4, lane % 4 * 2 + {0, 1}) of matrix m.
__device__ inline void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

/// The same, each matrix transposed.
__device__ inline void ldmatrix_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

/// Transposes an 8x8 matrix of 16-bit elements across a warp: lane l gives and gets the elements
/// (l / 4, l % 4 * 2 + {0, 1}).
__device__ inline uint32_t transposed(uint32_t word) {
  uint32_t r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(word));
  return r;
}

/// d[16][8] += a[16][16] b[16][8]. Lane l holds of d the rows l / 4 (d[0], d[1]) and l / 4 + 8
/// (d[2], d[3]), columns l % 4 * 2 + {0, 1}.
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// d[16][8] += a[16][32] b[32][8] of signed bytes. A register holds four that follow each other in
/// K, otherwise laid out as in mma().
__device__ inline void mma(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Two floats as a pair of bfloat16, the first in the low half.
__device__ inline uint32_t pack_bf16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Copies 16 bytes to shared memory asynchronously, past L1; zeroes them there unless `valid`.
__device__ inline void cp_async(uint32_t to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until at most `pending` of this thread's committed groups are under way.
template <int pending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

__device__ inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
#else
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.shared.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
#endif
}

/// Arrives on the barrier once this thread's cp.async copies so far have landed.
__device__ inline void cp_async_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
/// Arrives once and makes the barrier's phase wait for `bytes` of bulk copies as well.
__device__ inline void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

/// Copies `bytes`, a multiple of 16, to shared memory and reports them to the barrier. What is
/// read is marked to leave L2 first: a decode step reads every key once.
__device__ inline void bulk_copy_once(uint32_t to, const void* from, uint32_t bytes,
                                      uint32_t barrier) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

/// Orders this thread's writes to shared memory before later bulk copies.
__device__ inline void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
#endif

/// Prepares a warp's barriers, one to each of its stages: a phase waits for what one lane brings by
/// bulk copies or, on cards that have none, for all lanes' copies. For the whole warp to call.
__device__ inline void init_landed(uint32_t landed, int num_stages, int lane) {
#if __CUDA_ARCH__ >= 900
  const uint32_t arrivals = 1;
#else
  const uint32_t arrivals = 32;
#endif
  if (lane < num_stages) mbarrier_init(landed + lane * 8, arrivals);
#if __CUDA_ARCH__ >= 900
  fence_async_proxy();
#endif
  __syncwarp();
}

}  // namespace longspan::cuda
