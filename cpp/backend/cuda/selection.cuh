#pragma once

#include <cmath>
#include <cstdint>

#include "backend/cuda/block_sums.cuh"

// Selecting from a row of logits, by one block of kBlockThreads threads: all of them call every
// function that takes the block's Scratch. Sums are of integers, so that their order is nothing.

namespace longspan::cuda {

inline constexpr int kBuckets = 2048;
inline constexpr int kMaxCandidates = 3072;    // tokens that a block keeps in shared memory
inline constexpr float kBucketsPerLogit = 32;  // of the first, coarse look, from the largest down

/// Shared memory of a block.
struct Scratch {
  uint32_t low[kBuckets];  // a histogram of 64-bit sums
  uint32_t high[kBuckets];
  alignas(16) float logits[kMaxCandidates];
  int32_t tokens[kMaxCandidates];
  uint64_t sums[kBlockWarps];
  uint64_t found[2];
};

/// Logits in order of token: a whole row, or some of it.
struct Source {
  const float* logits;
  const int32_t* tokens;  // null: the index itself
  int count;

  __device__ int32_t token(int i) const { return tokens == nullptr ? i : tokens[i]; }
};

/// Logits [i, i + 4), of which `count` are there, from 0 to 4.
struct Quad {
  float x[4];
  int i;
  int count;
};

/// Calls fn(quad) for the quads of [begin, end), `lanes` threads taking one after another; all
/// threads of a warp call it together, equally often. begin is a multiple of 4. Loads some quads
/// ahead: a pass is as fast as memory answers.
template <class Fn>
__device__ void for_each_quad(const Source& source, int begin, int end, int lane, int lanes,
                              Fn fn) {
  constexpr int kAhead = 4;
  const bool aligned = reinterpret_cast<uintptr_t>(source.logits) % 16 == 0;
  for (int base = begin; base < end; base += 4 * lanes * kAhead) {
    Quad quads[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      Quad& q = quads[j];
      q.i = base + 4 * (j * lanes + lane);
      q.count = max(0, min(4, end - q.i));
      if (aligned && q.count == 4) {
        const float4 x = *reinterpret_cast<const float4*>(source.logits + q.i);
        q.x[0] = x.x;
        q.x[1] = x.y;
        q.x[2] = x.z;
        q.x[3] = x.w;
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (k < q.count) q.x[k] = source.logits[q.i + k];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) fn(quads[j]);
  }
}

/// Calls fn(i, logit) for i of [begin, end), as for_each_quad().
template <class Fn>
__device__ void for_each(const Source& source, int begin, int end, int lane, int lanes, Fn fn) {
  for_each_quad(source, begin, end, lane, lanes, [&](const Quad& q) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k < q.count) fn(q.i + k, q.x[k]);
    }
  });
}
/// For all of it, by the whole block.
template <class Fn>
__device__ void for_each(const Source& source, Fn fn) {
  for_each(source, 0, source.count, static_cast<int>(threadIdx.x), kBlockThreads, fn);
}

/// Elements of each warp where the block's warps share out `count` in order: whole quads of lanes.
inline __device__ int part_of_warp(int count) {
  constexpr int kStep = 4 * 32;
  return (count + kBlockWarps * kStep - 1) / (kBlockWarps * kStep) * kStep;
}

/// A number that orders as the float does; -0 counts as +0.
inline __device__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return (bits & 0x80000000) != 0 ? ~bits : bits | 0x80000000;
}
inline __device__ float logit_of(uint32_t key) {
  return __uint_as_float((key & 0x80000000) != 0 ? key & 0x7fffffff : ~key);
}

/// The row's largest logit and the first token that has it.
struct Largest {
  float logit;
  int32_t token;
  bool finite;  // no NaN, no +inf, and not everything -inf
};
inline __device__ Largest find_largest(const Source& row, Scratch& s) {
  float largest = -INFINITY;
  int first = 0;
  bool bad = false;
  for_each(row, [&](int i, float logit) {
    if (logit > largest) {
      largest = logit;
      first = i;
    }
    bad |= !(logit < INFINITY);  // NaN too compares false
  });
  const uint64_t best =
      max_block(uint64_t{key_of(largest)} << 32 | static_cast<uint32_t>(~first), s.sums);
  const float logit = logit_of(static_cast<uint32_t>(best >> 32));
  const bool finite = __syncthreads_or(bad) == 0 && logit > -INFINITY;
  return {logit, static_cast<int32_t>(~static_cast<uint32_t>(best)), finite};
}

/// Tokens chosen by their logits: every logit above `least`, and those equal to it up to last_tie.
struct Kept {
  float least = -INFINITY;
  int32_t last_tie = INT32_MAX;

  __device__ bool has(const Source& source, int i, float logit) const {
    return logit > least || (logit == least && source.token(i) <= last_tie);
  }
};

/// Index of the first element, in order, at which the summed weight exceeds `stop`, which is below
/// the whole sum. weight(i, logit) of an element.
template <class Fn>
__device__ int find_in_order(const Source& source, uint64_t stop, Scratch& s, Fn weight) {
  int begin = 0;
  int end = source.count;
  while (end - begin > kBlockThreads) {  // each warp sums a part; then look into the right one
    const int part = part_of_warp(end - begin);
    const int first = min(end, begin + warp_index() * part);
    uint64_t sum = 0;
    for_each(source, first, min(end, first + part), lane_index(), 32,
             [&](int i, float logit) { sum += weight(i, logit); });
    sum = __shfl_sync(0xffffffff, scan_lanes(sum), 31);
    __syncthreads();
    if (lane_index() == 0) s.sums[warp_index()] = sum;
    __syncthreads();
    const uint64_t own = s.sums[lane_index()];
    const uint64_t up_to = scan_lanes(own);
    const int found = __ffs(static_cast<int>(__ballot_sync(0xffffffff, up_to > stop))) - 1;
    stop -= __shfl_sync(0xffffffff, up_to - own, found);
    begin += found * part;
    end = min(end, begin + part);
  }
  const int i = begin + static_cast<int>(threadIdx.x);
  const uint64_t own = i < end ? weight(i, source.logits[i]) : 0;
  const BlockSum sum = sum_block(own, s.sums);
  if (sum.before <= stop && stop - sum.before < own) s.found[0] = static_cast<uint64_t>(i);
  __syncthreads();
  return static_cast<int>(s.found[0]);
}

/// Empties the histogram.
inline __device__ void clear(Scratch& s) {
  __syncthreads();
  for (int b = static_cast<int>(threadIdx.x); b < kBuckets; b += kBlockThreads) {
    s.low[b] = s.high[b] = 0;
  }
  __syncthreads();
}

/// Adds to a bucket of the histogram.
inline __device__ void add(Scratch& s, uint32_t bucket, uint64_t weight) {
  const auto low = static_cast<uint32_t>(weight);
  const uint32_t old = atomicAdd(&s.low[bucket], low);
  const uint32_t high = static_cast<uint32_t>(weight >> 32) + (old + low < old ? 1 : 0);
  if (high != 0) atomicAdd(&s.high[bucket], high);
}

/// The bucket, from the highest down, at which the sum reaches target(sum of all), at least 1.
struct Crossing {
  uint32_t bucket;
  uint64_t above;   // sum of the buckets above
  uint64_t wanted;  // the target; more than there is: no bucket
};
template <class Target>
__device__ Crossing find_crossing(Scratch& s, Target target) {
  __syncthreads();
  static_assert(kBuckets == 2 * kBlockThreads);
  const uint32_t upper = kBuckets - 1 - 2 * threadIdx.x;
  const auto sum_of = [&](uint32_t b) { return uint64_t{s.high[b]} << 32 | s.low[b]; };
  const uint64_t first = sum_of(upper);
  const uint64_t second = sum_of(upper - 1);
  const BlockSum sum = sum_block(first + second, s.sums);
  const uint64_t wanted = target(sum.total);
  if (sum.before < wanted && wanted <= sum.before + first) {
    s.found[0] = upper;
    s.found[1] = sum.before;
  } else if (sum.before + first < wanted && wanted <= sum.before + first + second) {
    s.found[0] = upper - 1;
    s.found[1] = sum.before + first;
  }
  __syncthreads();
  return {static_cast<uint32_t>(s.found[0]), s.found[1], wanted};
}

/// Narrows `kept` to its largest logits, as few as have a summed weight of at least
/// target(sum of all weights): a radix select on the keys, from the top 11, 11 and 10 bits down.
/// weight(logit): the same for equal logits.
template <class Fn, class Target>
__device__ Kept narrow(const Source& source, const Kept& kept, Scratch& s, Fn weight,
                       Target target) {
  uint32_t prefix = 0;
  uint64_t above = 0;
  uint64_t wanted = 0;
  int shift = 32;
#pragma unroll 1  // three copies of what follows would take long to compile and be no faster
  for (int bits = 11; shift > 0; bits = min(11, shift)) {
    const int parent = shift;
    shift -= bits;
    clear(s);
    for_each(source, [&](int i, float logit) {
      const uint32_t key = key_of(logit);
      if (uint64_t{key} >> parent != prefix || !kept.has(source, i, logit)) return;
      const uint64_t w = weight(logit);
      if (w != 0) add(s, (key >> shift) & ((1u << bits) - 1), w);
    });
    const Crossing crossing = find_crossing(
        s, [&](uint64_t total) { return parent == 32 ? target(total) : wanted - above; });
    if (parent == 32) wanted = crossing.wanted;
    above += crossing.above;
    prefix = prefix << bits | crossing.bucket;
  }
  const float least = logit_of(prefix);
  const uint64_t one = weight(least);
  const uint64_t ties = (wanted - above + one - 1) / one;
  const int last = find_in_order(source, ties - 1, s, [&](int i, float logit) {
    return uint64_t{logit == least && kept.has(source, i, logit)};
  });
  return {least, source.token(last)};
}

/// Buckets of the coarse look: the highest at the largest logit.
inline __device__ int coarse_bucket(float largest, float logit) {
  const float distance = fminf((largest - logit) * kBucketsPerLogit, kBuckets);
  return kBuckets - 1 - static_cast<int>(distance);  // below 0: too far down for a bucket
}

/// Copies to shared memory, in order, the logits from a coarse bucket up, unless they are too many:
/// then returns the row itself.
inline __device__ Source gather(const Source& row, float largest, uint32_t first_bucket,
                                Scratch& s) {
  const auto chosen = [&](float logit) {
    return coarse_bucket(largest, logit) >= static_cast<int>(first_bucket);
  };
  const int part = part_of_warp(row.count);
  const int first = min(row.count, warp_index() * part);
  const int end = min(row.count, first + part);
  uint64_t count = 0;
  for_each(row, first, end, lane_index(), 32,
           [&](int, float logit) { count += chosen(logit) ? 1 : 0; });
  const BlockSum sum = sum_block(count, s.sums);
  if (sum.total > kMaxCandidates) return row;
  int place = static_cast<int>(__shfl_sync(0xffffffff, sum.before, 0));
  for_each_quad(row, first, end, lane_index(), 32, [&](const Quad& q) {
    int before = 0;  // chosen by the lanes below
    int total = 0;
    bool take[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      take[k] = k < q.count && chosen(q.x[k]);
      const uint32_t lanes = __ballot_sync(0xffffffff, take[k]);
      before += __popc(lanes & ((1u << lane_index()) - 1));
      total += __popc(lanes);
    }
    int own = place + before;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (!take[k]) continue;
      s.logits[own] = q.x[k];
      s.tokens[own++] = q.i + k;
    }
    place += total;
  });
  __syncthreads();
  return {s.logits, s.tokens, static_cast<int>(sum.total)};
}

/// A source that holds a row's largest logits, as many as have a summed weight of at least
/// target(sum of all weights): a copy of few where a histogram of the logits soon tells them, else
/// the whole row. All weights of the row: their sum in `whole`.
template <class Fn, class Target>
__device__ Source preselect(const Source& row, float largest, Scratch& s, uint64_t& whole,
                            Fn weight, Target target) {
  clear(s);
  uint64_t sum = 0;
  for_each(row, [&](int, float logit) {
    const int bucket = coarse_bucket(largest, logit);
    const uint64_t w = weight(logit);
    sum += w;
    if (bucket >= 0 && w != 0) add(s, static_cast<uint32_t>(bucket), w);
  });
  whole = sum_block(sum, s.sums).total;
  uint64_t seen = 0;
  const Crossing crossing = find_crossing(s, [&](uint64_t total) {
    seen = total;
    return target(whole);
  });
  return seen < crossing.wanted ? row : gather(row, largest, crossing.bucket, s);
}

}  // namespace longspan::cuda
