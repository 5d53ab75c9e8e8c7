// CPU backend of sample: a row's order and weights are computed once, the search of sample_rule.h
// runs over them.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "common/dispatch.h"
#include "common/math.h"
#include "common/target.h"
#include "ops/sample/sample_check.h"

namespace qwen1m {
namespace {

/// A weight for each lane.
struct LaneSums {
  std::vector<uint64_t> sums = std::vector<uint64_t>(kSampleLanes);

  LaneSums operator+(const LaneSums& other) const { return zip(other, std::plus<>()); }
  LaneSums operator-(const LaneSums& other) const { return zip(other, std::minus<>()); }

 private:
  template <typename Operation>
  LaneSums zip(const LaneSums& other, const Operation& operation) const {
    LaneSums result;
    std::transform(sums.begin(), sums.end(), other.sums.begin(), result.sums.begin(), operation);
    return result;
  }
};

int lane_of(int64_t id) { return static_cast<int>(id / kLaneRun % kSampleLanes); }

/// What `draw` asks of a row.
struct CpuRow {
  using LaneWeights = LaneSums;
  std::vector<uint64_t> orders, weights;  // by id

  TokensAbove<LaneSums> above(uint64_t order) const {
    TokensAbove<LaneSums> result{order, 0, 0, {}};
    for (size_t id = 0; id < orders.size(); ++id) {
      if (orders[id] <= order) continue;
      result.weight += weights[id];
      result.count += 1;
      result.lanes.sums[static_cast<size_t>(lane_of(static_cast<int64_t>(id)))] += weights[id];
    }
    return result;
  }

  uint64_t pick(const LaneSums& lanes, uint64_t x, uint64_t lower, uint64_t upper) const {
    size_t lane = 0;
    while (x >= lanes.sums[lane]) x -= lanes.sums[lane++];
    for (size_t first = lane * kLaneRun;; first += size_t{kSampleLanes} * kLaneRun) {
      for (size_t id = first; id < std::min(first + kLaneRun, orders.size()); ++id) {
        if (orders[id] <= lower || orders[id] >= upper) continue;
        if (x < weights[id]) return orders[id];
        x -= weights[id];
      }
    }
  }

  uint64_t weight(uint64_t order) const { return weights[static_cast<size_t>(id_of(order))]; }
  LaneSums only(uint64_t order) const {
    LaneSums result;
    result.sums[static_cast<size_t>(lane_of(id_of(order)))] = weight(order);
    return result;
  }
};

/// Penalties; false if a logit is NaN.
template <typename T>
Q1M_INLINE bool adjust_row(float* adjusted, const T* logits, const int32_t* history, int64_t vocab,
                           const SampleSettings& s) {
  bool ok = true;
  for (int64_t i = 0; i < vocab; ++i) {
    const float logit = load(logits + i);
    ok &= logit == logit;
    adjusted[i] = adjust(s, logit, history == nullptr ? 0 : history[i]);
  }
  return ok;
}

/// log(sum(exp(logits))), with fp32 exponentials and a float64 sum.
template <typename T>
Q1M_INLINE float log_sum(const T* logits, int64_t vocab) {
  float largest = load(logits);
  for (int64_t i = 1; i < vocab; ++i) largest = std::max(largest, load(logits + i));
  double sum = 0;
  for (int64_t i = 0; i < vocab; ++i) sum += exp_nonpositive(load(logits + i) - largest);
  return static_cast<float>(static_cast<double>(largest) + std::log(sum));
}

SampleSettings settings_of(const SampleParams& p, int64_t b) {
  SampleSettings s =
      make_settings(*p.temperature.at(b), *p.top_k.at(b), *p.top_p.at(b), *p.min_p.at(b),
                    *p.seed.at(b), *p.position.at(b), p.logits.size(1));
  if (p.penalties) {
    s.repetition = *p.penalties.at(b, 0);
    s.presence = *p.penalties.at(b, 1);
    s.frequency = *p.penalties.at(b, 2);
  }
  return s;
}

template <typename T>
void sample_row(const SampleParams& p, int64_t b) {
  const int64_t vocab = p.logits.size(1);
  const T* logits = p.logits.as<const T>().at(b);
  int32_t* history = p.history ? p.history.at(b) : nullptr;
  const SampleSettings s = settings_of(p, b);
  std::vector<float> adjusted(static_cast<size_t>(vocab));
  const bool numbers = adjust_row(adjusted.data(), logits, history, vocab, s);
  uint64_t best = 0;
  for (int64_t i = 0; i < vocab; ++i) {
    best = std::max(best, order_of(adjusted[static_cast<size_t>(i)], i));
  }
  const float largest = value_of(best);
  if (!numbers || !std::isfinite(largest)) {
    *p.token_ids.at(b) = -1;
    if (p.logprobs) *p.logprobs.at(b) = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  uint64_t token = best;
  if (s.exponent > 0) {
    CpuRow row;
    row.orders.resize(adjusted.size());
    row.weights.resize(adjusted.size());
    for (size_t i = 0; i < adjusted.size(); ++i) {
      row.orders[i] = order_of(adjusted[i], static_cast<int64_t>(i));
      row.weights[i] = weight_of(s, adjusted[i], largest);
    }
    token = draw(row, s, vocab);
  }
  const int64_t id = id_of(token);
  *p.token_ids.at(b) = id;
  if (p.logprobs) *p.logprobs.at(b) = load(logits + id) - log_sum(logits, vocab);
  // Unsigned: whatever the caller has there, nothing is undefined.
  if (history != nullptr)
    history[id] = static_cast<int32_t>(static_cast<uint32_t>(history[id]) + 2);
}

}  // namespace

void sample_cpu(const SampleParams& p, const ParallelFor& parallel_for) {
  check_sample_layout(p);
  check_sample_values(p);
  dispatch_dtype(p.logits.dtype, [&](auto zero) {
    parallel_for(p.logits.size(0),
                 [&](int64_t b, int /*worker*/) { sample_row<decltype(zero)>(p, b); });
  });
}

}  // namespace qwen1m
