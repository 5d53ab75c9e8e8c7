#pragma once
/// sample on sm_80 and later: a block of 512 threads is one row, a thread a lane of sample_rule.h.
/// The row (0.3 to 0.6 MB) is read from memory once and from the L2 cache in each further pass: one
/// for the largest logit, one for all weights, one for each token looked at, of which most need no
/// weight. Nothing is allocated and no logit is written. Compiled and emulated, not yet run on a
/// GPU.

#include "arch/arch.h"
#include "common/vectors.h"
#include "ops/sample/sample_check.h"

namespace qwen1m {

/// Logit is float or bf16.
template <typename Logit>
struct SampleKernel {
  static constexpr int kThreads = kSampleLanes;
  static constexpr int kWarps = kThreads / 32;

  struct Params {
    SampleParams args;
  };
  struct Smem {
    uint64_t partial[2][kWarps];  // in turn, so that one barrier per reduction is enough
    uint64_t picked;
  };

  static int64_t blocks(const Params& p) { return p.args.logits.size(0); }
  static int threads(const Params&) { return kThreads; }

  static Q1M_DEVICE uint64_t shuffle_from(uint64_t value, int lane) {
    const uint32_t low = arch::shuffle(static_cast<uint32_t>(value), lane);
    const uint32_t high = arch::shuffle(static_cast<uint32_t>(value >> 32), lane);
    return uint64_t{high} << 32 | low;
  }

  /// The thread's view of its row; what `draw` asks for.
  struct Row {
    using LaneWeights = uint64_t;
    const SampleParams& args;
    arch::Shared<Smem> smem;
    int64_t index;  // of the row
    SampleSettings settings;
    float largest = 0;  // adjusted logit of the row
    int turn = 0;       // of the shared partial results

    Q1M_DEVICE int64_t vocab() const { return args.logits.size(1); }

    // --- Reductions --------------------------------------------------------------------------
    template <typename Operation>
    static Q1M_DEVICE uint64_t reduce_warp(uint64_t value, const Operation& operation) {
      Q1M_UNROLL
      for (int mask = 16; mask > 0; mask /= 2) {
        value = operation(value, shuffle_from(value, arch::lane_index() ^ mask));
      }
      return value;
    }
    /// Puts a value of each warp where all threads see it; returns that of warp number lane, 0
    /// without one.
    Q1M_DEVICE uint64_t exchange(uint64_t of_warp) {
      const auto partial = Q1M_SHARED_MEMBER(smem, partial)[turn];
      turn ^= 1;
      if (arch::lane_index() == 0) arch::shared_store(partial[arch::warp_index()], of_warp);
      arch::block_sync();
      return arch::lane_index() < kWarps ? arch::shared_load(partial[arch::lane_index()]) : 0;
    }
    template <typename Operation>
    Q1M_DEVICE uint64_t reduce(uint64_t value, const Operation& operation) {
      return reduce_warp(exchange(reduce_warp(value, operation)), operation);
    }
    Q1M_DEVICE uint64_t sum(uint64_t value) {
      return reduce(value, [](uint64_t a, uint64_t b) { return a + b; });
    }
    Q1M_DEVICE uint64_t maximum(uint64_t value) {
      return reduce(value, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
    }
    /// Inclusive prefix sum over the lanes of a warp.
    static Q1M_DEVICE uint64_t prefix(uint64_t value) {
      const int lane = arch::lane_index();
      Q1M_UNROLL
      for (int step = 1; step < 32; step *= 2) {
        const uint64_t below = shuffle_from(value, lane >= step ? lane - step : lane);
        if (lane >= step) value += below;
      }
      return value;
    }

    // --- The row -----------------------------------------------------------------------------
    /// Calls f(id, logit, adjusted) for the tokens of this lane, by ascending id, until it returns
    /// false.
    template <typename F>
    Q1M_DEVICE void for_each(const F& f) const {
      const int64_t whole = vocab() / kLaneRun;
      int64_t run = arch::thread_index();
      for (; run < whole; run += kThreads) {
        const int64_t first = run * kLaneRun;
        float logits[kLaneRun];
        int32_t history[kLaneRun] = {};
        load_run(first, logits);
        if (args.history) load_history(first, history);
        Q1M_UNROLL
        for (int i = 0; i < kLaneRun; ++i) {
          if (!f(first + i, logits[i], adjust(settings, logits[i], history[i]))) return;
        }
      }
      if (run != whole) return;
      Q1M_NO_UNROLL
      for (int64_t id = whole * kLaneRun; id < vocab(); ++id) {
        const float logit = load_logit(id);
        const int32_t history =
            args.history ? arch::global_load_coherent(history_at(id)) : int32_t{0};
        if (!f(id, logit, adjust(settings, logit, history))) return;
      }
    }
    Q1M_DEVICE const Logit* logits_at(int64_t id) const {
      return args.logits.template as<const Logit>().at(index, id);
    }
    /// Written at the end, hence not for the read-only path.
    Q1M_DEVICE const int32_t* history_at(int64_t id) const { return args.history.at(index, id); }

    Q1M_DEVICE float load_logit(int64_t id) const {
      const Logit logit = arch::global_load(logits_at(id));
      if constexpr (sizeof(Logit) == 4) {
        return logit;
      } else {
        return arch::bf16_low(logit.bits);
      }
    }
    Q1M_DEVICE void load_run(int64_t first, float (&logits)[kLaneRun]) const {
      if constexpr (sizeof(Logit) == 4) {
        Q1M_UNROLL
        for (int half = 0; half < 2; ++half) {
          const arch::Vec16 vector = arch::global_load(vector_at(logits_at(first), half));
          Q1M_UNROLL
          for (int w = 0; w < 4; ++w) logits[4 * half + w] = arch::as_float(vector.word[w]);
        }
      } else {
        unpack(arch::global_load(vector_at(logits_at(first), 0)), logits);
      }
    }
    Q1M_DEVICE void load_history(int64_t first, int32_t (&history)[kLaneRun]) const {
      Q1M_UNROLL
      for (int half = 0; half < 2; ++half) {
        const arch::Vec16 vector = arch::global_load_coherent(vector_at(history_at(first), half));
        Q1M_UNROLL
        for (int w = 0; w < 4; ++w) history[4 * half + w] = static_cast<int32_t>(vector.word[w]);
      }
    }

    // --- For draw ----------------------------------------------------------------------------
    Q1M_DEVICE uint64_t weight(uint64_t order) const {
      return weight_of(settings, value_of(order), largest);
    }
    Q1M_DEVICE uint64_t only(uint64_t order) const {
      const bool own = id_of(order) / kLaneRun % kSampleLanes == arch::thread_index();
      return own ? weight(order) : 0;
    }
    Q1M_DEVICE TokensAbove<uint64_t> above(uint64_t order) {
      uint64_t lane = 0, count = 0;
      for_each([&](int64_t id, float, float a) {
        if (order_of(a, id) > order) {
          lane += weight_of(settings, a, largest);
          ++count;
        }
        return true;
      });
      const uint64_t weight = sum(lane);
      return {order, weight, static_cast<int64_t>(sum(count)), lane};
    }
    Q1M_DEVICE uint64_t pick(uint64_t lane_weight, uint64_t x, uint64_t lower, uint64_t upper) {
      const int lane = arch::lane_index();
      const uint64_t within = prefix(lane_weight);  // of the warp's lanes
      const uint64_t of_warp = exchange(shuffle_from(within, 31));
      const uint64_t through = prefix(of_warp);  // of the warps
      // The one warp, and in it the one lane, whose range holds x.
      const bool here = through - of_warp <= x && x < through;
      const auto warp = static_cast<int>(reduce_warp(here ? static_cast<uint64_t>(lane) : 0,
                                                     [](uint64_t a, uint64_t b) { return a + b; }));
      const uint64_t rest = x - shuffle_from(through - of_warp, warp);
      if (warp == arch::warp_index() && within - lane_weight <= rest && rest < within) {
        uint64_t left = rest - (within - lane_weight);
        for_each([&](int64_t id, float, float a) {
          const uint64_t order = order_of(a, id);
          if (order <= lower || order >= upper) return true;
          const uint64_t own = weight_of(settings, a, largest);
          if (left < own) {
            arch::shared_store(Q1M_SHARED_MEMBER(smem, picked), order);
            return false;
          }
          left -= own;
          return true;
        });
      }
      arch::block_sync();
      return arch::shared_load(Q1M_SHARED_MEMBER(smem, picked));
    }
  };

  /// log softmax of a logit: one pass, each thread keeping its own maximum.
  static Q1M_DEVICE float logprob(Row& row, float logit) {
    uint64_t highest = 0;
    row.for_each([&](int64_t id, float raw, float) {
      const uint64_t order = order_of(raw, id);
      highest = order > highest ? order : highest;
      return true;
    });
    const float largest = value_of(row.maximum(highest));
    float sum = 0;
    row.for_each([&](int64_t, float raw, float) {
      sum += arch::exp2_approx((raw - largest) * 1.44269504f);
      return true;
    });
    // Fixed point, so that the sum over threads has one order: none.
    constexpr auto kOne = static_cast<float>(uint64_t{1} << kWeightBits);
    const auto total = static_cast<float>(row.sum(static_cast<uint64_t>(sum * kOne)));
    return logit - largest - 0.693147181f * (arch::log2_approx(total) - kWeightBits);
  }

  static Q1M_DEVICE SampleSettings settings_of(const SampleParams& p, int64_t row) {
    SampleSettings s = make_settings(
        arch::global_load(p.temperature.at(row)), arch::global_load(p.top_k.at(row)),
        arch::global_load(p.top_p.at(row)), arch::global_load(p.min_p.at(row)),
        arch::global_load(p.seed.at(row)), arch::global_load(p.position.at(row)), p.logits.size(1));
    if (p.penalties) {
      s.repetition = arch::global_load(p.penalties.at(row, 0));
      s.presence = arch::global_load(p.penalties.at(row, 1));
      s.frequency = arch::global_load(p.penalties.at(row, 2));
    }
    return s;
  }

  static Q1M_DEVICE void run(const Params& p) {
    arch::wait_for_prior_grid();
    arch::launch_dependents();
    Row row = {p.args, arch::shared_memory<Smem>(), arch::block_index(),
               settings_of(p.args, arch::block_index())};
    uint64_t best = 0;
    row.for_each([&](int64_t id, float logit, float a) {
      // A NaN is larger than everything.
      const uint64_t order = logit == logit ? order_of(a, id) : ~uint64_t{0};
      best = order > best ? order : best;
      return true;
    });
    best = row.maximum(best);
    row.largest = value_of(best);
    const bool numbers = best != ~uint64_t{0} && fabsf(row.largest) < INFINITY;
    uint64_t token = best;
    if (numbers && row.settings.exponent > 0) token = draw(row, row.settings, row.vocab());
    const int64_t id = numbers ? id_of(token) : -1;
    if (p.args.logprobs) {
      const float value = numbers ? logprob(row, row.load_logit(id)) : NAN;
      if (arch::thread_index() == 0) arch::global_store(p.args.logprobs.at(row.index), value);
    }
    // Behind the last barrier: nobody reads the history any more.
    if (arch::thread_index() == 0) {
      arch::global_store(p.args.token_ids.at(row.index), id);
      if (p.args.history && numbers) {
        int32_t* count = p.args.history.at(row.index, id);
        arch::global_store(count,
                           arch::global_load_coherent(const_cast<const int32_t*>(count)) + 2);
      }
    }
  }
};

/// What the kernel demands beyond the op's contract; settings are not read.
inline void check_sample_gpu(const SampleParams& p) {
  check_sample_layout(p);
  const ArgCheck args("sample");
  require_aligned_rows(args, "logits", p.logits);
  if (!p.history) return;
  require_aligned_rows(
      args, "history",
      AnyView<2>{p.history.data, DType::kFloat32, p.history.sizes, p.history.strides});
}

}  // namespace qwen1m
