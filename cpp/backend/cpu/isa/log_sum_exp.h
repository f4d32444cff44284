// Included once per instruction set; see kernels.inc.

/// exp of what is at most 0; anything else (NaN, or what is left of infinities) passes through.
inline Vec exp_below(Vec x) {
  constexpr float kLog2E = 1.44269504088896F;
  return x <= 0.0F ? exp2(x * kLog2E) : x;
}

/// Adds a run of logits to a row's log-sum-exp; see LogSumExpTask. A NaN makes the sum NaN.
inline void log_sum_exp(const LogSumExpTask& task) {
  const int64_t whole = task.n / kLanes * kLanes;
  Vec largest = broadcast(*task.max);
  for (int64_t i = 0; i < whole; i += kLanes) largest = max(load(task.x + i), largest);
  float top = max_lane(largest);
  for (int64_t i = whole; i < task.n; ++i) top = std::max(top, task.x[i]);

  Vec sums = {};
  const Vec base = broadcast(top);
  for (int64_t i = 0; i < whole; i += kLanes) sums += exp_below(load(task.x + i) - base);
  float last[kLanes];
  std::fill(last, last + kLanes, -std::numeric_limits<float>::infinity());
  std::copy(task.x + whole, task.x + task.n, last);
  if (whole < task.n) sums += exp_below(load(last) - base);
  *task.sum = *task.sum * std::exp(static_cast<double>(*task.max) - top) + sum_lanes(sums);
  *task.max = top;
}
