#pragma once

#include "backend/cuda/mma.cuh"

/// The PTX that only sm_90a has: clusters, copies to several thread blocks, wgmma.
namespace longspan::cuda {

// Clusters -----------------------------------------------------------------------------------

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;\n" ::: "memory");
}

/// Makes initialised mbarriers visible to the cluster and to copies.
__device__ inline void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// mbarrier_wait for the midst of a computation: a loop outside the asm, around which ptxas
/// schedules other work. The prefill kernel of head_dim 64 is 18 % faster for it.
__device__ inline void mbarrier_wait_amid(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
}

/// The address in the cluster of what thread block `rank` has at `address`.
__device__ inline uint32_t cluster_address(uint32_t address, uint32_t rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

/// Arrives at an mbarrier in the cluster. Of memory it orders what an arrival at an own one would:
/// a wider scope costs a fence at every step.
__device__ inline void mbarrier_arrive_cluster(uint32_t there) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(there) : "memory");
}

/// Copies `bytes`, a multiple of 16, to the same address in each thread block of the mask, and
/// reports them to the mbarrier of the same address there.
__device__ inline void bulk_copy_multicast(uint32_t to, const void* from, uint32_t bytes,
                                           uint32_t barrier, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "h"(mask)
      : "memory");
}

/// Writes to shared memory of the cluster, and reports the bytes to an mbarrier there as a copy
/// does. Where the mbarrier is waited for anyway, nobody need order such a write with anything
/// else.
__device__ inline void store_async(uint32_t to, float4 x, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
      : "memory");
}
__device__ inline void store_async(uint32_t to, float2 x, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
          to),
      "f"(x.x), "f"(x.y), "r"(barrier)
      : "memory");
}
__device__ inline void store_async(uint32_t to, float x, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(x),
      "r"(barrier)
      : "memory");
}

/// Waits for `threads` threads at hardware barrier `id`, 1 to 15.
__device__ inline void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// What a warpgroup gives of its registers, others may take.
template <int count>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

/// Four numbers in e4m3, the first lowest; of larger magnitude than 448 they become 448.
__device__ inline uint32_t pack_e4m3(float a, float b, float c, float d) {
  uint32_t four;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n"
      "}\n"
      : "=r"(four)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return four;
}

// Products of a warpgroup --------------------------------------------------------------------
//
// Accumulators d of [64][N]: d[4 j + 2 h + i] of lane l of warp w is row 16 w + l / 4 + 8 h, column
// 8 j + l % 4 * 2 + i. They, and operands in registers, belong to the products from the first one
// issued until wgmma_wait.

/// An operand in the 128-byte swizzle: 8 rows of 128 bytes are 1 KiB, groups of 8 rows follow each
/// other, columns of 64 elements are `column_bytes` apart (read of an MN-major operand alone; to
/// walk a K-major one, add the bytes to the address).
__device__ inline uint64_t wgmma_operand(uint32_t address, uint32_t column_bytes = 0) {
  // In a cluster, an address of the own thread block has its rank in the bits above.
  return uint64_t{(address & 0x3FFFF) >> 4} | uint64_t{column_bytes >> 4} << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

/// A K-major operand in the 64-byte swizzle: 8 rows of 64 bytes are 512 bytes.
__device__ inline uint64_t wgmma_operand_64(uint32_t address) {
  return uint64_t{(address & 0x3FFFF) >> 4} | uint64_t{512 >> 4} << 32 | uint64_t{2} << 62;
}

/// The same operand `bytes` further on; a constant where `bytes` is.
__device__ inline uint64_t wgmma_advance(uint64_t operand, uint32_t bytes) {
  return operand + (bytes >> 4);
}

/// Before the first product after its registers were written.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/// Waits until at most `pending` committed groups are under way.
template <int pending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

/// Keeps the compiler from moving uses of the registers across this point.
template <int count>
__device__ inline void pin(float (&d)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int count>
__device__ inline void pin(int32_t (&d)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+r"(d[i])::"memory");
}
template <int count>
__device__ inline void pin(uint32_t (&a)[count][4]) {
#pragma unroll
  for (int i = 0; i < 4 * count; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

// clang-format off
#define LONGSPAN_ACC4(c, d, i) c(d[i]), c(d[(i) + 1]), c(d[(i) + 2]), c(d[(i) + 3])
#define LONGSPAN_ACC16(c, d, i) \
  LONGSPAN_ACC4(c, d, i), LONGSPAN_ACC4(c, d, (i) + 4), LONGSPAN_ACC4(c, d, (i) + 8), LONGSPAN_ACC4(c, d, (i) + 12)
#define LONGSPAN_ACC32(c, d) LONGSPAN_ACC16(c, d, 0), LONGSPAN_ACC16(c, d, 16)
#define LONGSPAN_ACC64(c, d) LONGSPAN_ACC32(c, d), LONGSPAN_ACC16(c, d, 32), LONGSPAN_ACC16(c, d, 48)
// clang-format on
// Registers of d in PTX, those of ACC32 and ACC64.
#define LONGSPAN_D32                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LONGSPAN_D64                                                                   \
  LONGSPAN_D32                                                                         \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

/// d += a b^T (d = a b^T if !accumulate): a [64][16] and b [N][16], both in shared memory.
template <bool accumulate>
__device__ inline void wgmma_ss(float (&d)[64], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{" LONGSPAN_D64
      "}, %64, %65, accumulate, 1, 1, 0, 0;\n"
      "}\n"
      : LONGSPAN_ACC64("+f", d)
      : "l"(a), "l"(b), "n"(static_cast<int>(accumulate)));
}

/// d += a b (d = a b if !accumulate): a [64][16] in registers, a[2 c + h] two elements of row
/// lane / 4 + 8 h of a warp's 16, columns 8 c + lane % 4 * 2 + {0, 1}; b in shared memory, [16][N]
/// where it is MN-major, else [N][16].
template <bool accumulate, bool mn_major>
__device__ inline void wgmma_rs(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{" LONGSPAN_D64
      "}, {%64, %65, %66, %67}, %68, accumulate, 1, 1, %70;\n"
      "}\n"
      : LONGSPAN_ACC64("+f", d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(static_cast<int>(accumulate)),
        "n"(static_cast<int>(mn_major)));
}

template <bool accumulate, bool mn_major>
__device__ inline void wgmma_rs(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{" LONGSPAN_D32
      "}, {%32, %33, %34, %35}, %36, accumulate, 1, 1, %38;\n"
      "}\n"
      : LONGSPAN_ACC32("+f", d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(static_cast<int>(accumulate)),
        "n"(static_cast<int>(mn_major)));
}

/// d += a b^T in integers: a [64][32] signed bytes in registers, a[2 c + h] four elements of row
/// lane / 4 + 8 h of a warp's 16, columns 16 c + lane % 4 * 4 + {0 .. 3}; b [N][32] signed bytes in
/// shared memory.
__device__ inline void wgmma_int8(int32_t (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.eq.b32 accumulate, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 "
      "{" LONGSPAN_D32
      "}, {%32, %33, %34, %35}, %36, accumulate;\n"
      "}\n"
      : LONGSPAN_ACC32("+r", d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/// The same with a [64][32] in shared memory.
__device__ inline void wgmma_int8(int32_t (&d)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.eq.b32 accumulate, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 "
      "{" LONGSPAN_D32
      "}, %32, %33, accumulate;\n"
      "}\n"
      : LONGSPAN_ACC32("+r", d)
      : "l"(a), "l"(b));
}
__device__ inline void wgmma_int8(int32_t (&d)[128], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.eq.b32 accumulate, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 "
      "{" LONGSPAN_D64
      ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "
      "%127}, "
      "%128, %129, accumulate;\n"
      "}\n"
      : LONGSPAN_ACC64("+r", d), LONGSPAN_ACC16("+r", d, 64), LONGSPAN_ACC16("+r", d, 80),
        LONGSPAN_ACC16("+r", d, 96), LONGSPAN_ACC16("+r", d, 112)
      : "l"(a), "l"(b));
}

/// The same with b [128][32]; columns 64 to 127 of d in `more`.
__device__ inline void wgmma_int8(int32_t (&d)[32], int32_t (&more)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.eq.b32 accumulate, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 "
      "{" LONGSPAN_D64
      "}, %64, %65, accumulate;\n"
      "}\n"
      : LONGSPAN_ACC32("+r", d), LONGSPAN_ACC32("+r", more)
      : "l"(a), "l"(b));
}

/// d += a b^T (d = a b^T if !accumulate) of e4m3, operands as of the first wgmma_int8. Tensor cores
/// add the products of an instruction up in about 14 bits.
template <bool accumulate>
__device__ inline void wgmma_fp8(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
      "{" LONGSPAN_D32
      "}, {%32, %33, %34, %35}, %36, accumulate, 1, 1;\n"
      "}\n"
      : LONGSPAN_ACC32("+f", d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(static_cast<int>(accumulate)));
}

/// The same; columns 64 to 71 of d in `more`.
template <bool accumulate>
__device__ inline void wgmma_fp8(float (&d)[32], float (&more)[4], const uint32_t (&a)[4],
                                 uint64_t b) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %41, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n72k32.f32.e4m3.e4m3 "
      "{" LONGSPAN_D32
      ", %32, %33, %34, %35}, "
      "{%36, %37, %38, %39}, %40, accumulate, 1, 1;\n"
      "}\n"
      : LONGSPAN_ACC32("+f", d), LONGSPAN_ACC4("+f", more, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(static_cast<int>(accumulate)));
}

#undef LONGSPAN_ACC4
#undef LONGSPAN_ACC16
#undef LONGSPAN_ACC32
#undef LONGSPAN_ACC64
#undef LONGSPAN_D32
#undef LONGSPAN_D64

}  // namespace longspan::cuda
