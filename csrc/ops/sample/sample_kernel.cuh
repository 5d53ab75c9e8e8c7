#pragma once
/// sample on sm_80 and later: 512 threads are one row, a thread a lane of sample_rule.h. The row
/// (0.3 to 0.6 MB) is read from memory once and from the L2 cache in each further pass: one for the
/// largest logit, one for all weights, one for each token looked at, of which most need no weight.
/// Nothing is allocated and no logit is written. Compiled and emulated, not yet run on a GPU.
///
/// A pass is bound by instructions: 50 to 80 a token (counted in the machine code) are 35 to 55 us
/// for 152,064 tokens on one multiprocessor at 1.7 GHz, a draw with top_k and top_p 0.15 to 0.25
/// ms, 4 to 7 % of the 3.5 ms in which a decode step of 7B reads its weights. So on sm_90 a row
/// belongs to a cluster of 8 blocks. Each has an eighth of every lane, its ids in one piece, so
/// that the order of the lanes' tokens, and the token drawn, are those of a single block. Blocks
/// read each other's partial results; a row's bits do not depend on how many rows there are.

#include "arch/arch.h"
#include "common/vectors.h"
#include "ops/sample/sample_check.h"

namespace qwen1m {

/// Logit is float or bf16; kBlocks: of a row, 1 or a cluster of them (up to 32, sm_90).
template <typename Logit, int kBlocks>
struct SampleKernel {
  static constexpr int kThreads = kSampleLanes;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kCluster = kBlocks;

  struct Params {
    SampleParams args;
  };
  struct Smem {
    uint64_t partial[2][kWarps];  // in turn, so that one barrier per reduction is enough
    uint64_t of_block[2];         // in turn as well
    uint64_t lane_weight[kBlocks == 1 ? 1 : kSampleLanes];  // the block's part
    uint64_t picked;
    uint32_t picked_by;  // rank
  };

  static int64_t blocks(const Params& p) { return p.args.logits.size(0) * kBlocks; }
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
    int block_turn = 0;

    Q1M_DEVICE int64_t vocab() const { return args.logits.size(1); }
    /// Runs of a lane that belong to one block, the incomplete one at the end of the row included.
    Q1M_DEVICE int part_runs() const {
      const auto runs = static_cast<int>(vocab() / kLaneRun) / kThreads + 1;
      return (runs + kBlocks - 1) / kBlocks;
    }
    static Q1M_DEVICE void cluster_sync() {
      arch::cluster_arrive();
      arch::cluster_wait();
    }

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
    /// The same of a value of each block of the row.
    Q1M_DEVICE uint64_t exchange_blocks(uint64_t of_block) {
      const auto place = Q1M_SHARED_MEMBER(smem, of_block)[block_turn];
      block_turn ^= 1;
      if (arch::thread_index() == 0) arch::shared_store(place, of_block);
      cluster_sync();
      const int rank = arch::lane_index();
      if (rank >= kBlocks) return 0;
      return arch::shared_load_remote(arch::map_to_rank(place, static_cast<uint32_t>(rank)));
    }
    /// Of all threads of the row. 0 changes no result of `operation`.
    template <typename Operation>
    Q1M_DEVICE uint64_t reduce(uint64_t value, const Operation& operation) {
      uint64_t result = reduce_warp(exchange(reduce_warp(value, operation)), operation);
      if constexpr (kBlocks > 1) result = reduce_warp(exchange_blocks(result), operation);
      return result;
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
    /// Calls f(id, logit, adjusted) for the block's tokens of this lane, by ascending id, until it
    /// returns false.
    template <typename F>
    Q1M_DEVICE void for_each(const F& f) const {
      const auto whole = static_cast<int>(vocab() / kLaneRun);
      const int of_block = part_runs() * kThreads;
      int run = static_cast<int>(arch::cluster_rank()) * of_block;
      const int end = run + of_block;
      for (run += arch::thread_index(); run < whole && run < end; run += kThreads) {
        const int64_t first = int64_t{run} * kLaneRun;
        float logits[kLaneRun];
        int32_t history[kLaneRun] = {};
        load_run(first, logits);
        if (args.history) load_history(first, history);
        Q1M_UNROLL
        for (int i = 0; i < kLaneRun; ++i) {
          if (!f(first + i, logits[i], adjust(settings, logits[i], history[i]))) return;
        }
      }
      if (run != whole || run >= end) return;
      Q1M_NO_UNROLL
      for (int64_t id = int64_t{whole} * kLaneRun; id < vocab(); ++id) {
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
      const auto run = static_cast<int>(id_of(order) / kLaneRun);
      const bool own = run % kSampleLanes == arch::thread_index() &&
                       run / kSampleLanes / part_runs() == static_cast<int>(arch::cluster_rank());
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
    /// part: the block's of the lane's weight.
    Q1M_DEVICE uint64_t pick(uint64_t part, uint64_t x, uint64_t lower, uint64_t upper) {
      const int lane = arch::lane_index();
      uint64_t parts[kBlocks] = {part}, lane_weight = part;
      if constexpr (kBlocks > 1) {
        const auto place = Q1M_SHARED_MEMBER(smem, lane_weight)[arch::thread_index()];
        arch::shared_store(place, part);
        cluster_sync();
        lane_weight = 0;
        Q1M_UNROLL
        for (int rank = 0; rank < kBlocks; ++rank) {
          parts[rank] =
              arch::shared_load_remote(arch::map_to_rank(place, static_cast<uint32_t>(rank)));
          lane_weight += parts[rank];
        }
      }
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
        uint32_t by = 0;  // the block whose part holds x
        Q1M_UNROLL
        for (int rank = 0; rank + 1 < kBlocks; ++rank) {
          if (by != static_cast<uint32_t>(rank) || left < parts[rank]) continue;
          left -= parts[rank];
          ++by;
        }
        if constexpr (kBlocks > 1) arch::shared_store(Q1M_SHARED_MEMBER(smem, picked_by), by);
        if (by == arch::cluster_rank()) pick_own(left, lower, upper);
      }
      const auto picked = Q1M_SHARED_MEMBER(smem, picked);
      if constexpr (kBlocks > 1) {
        cluster_sync();
        const uint32_t by = arch::shared_load(Q1M_SHARED_MEMBER(smem, picked_by));
        return arch::shared_load_remote(arch::map_to_rank(picked, by));
      } else {
        arch::block_sync();
        return arch::shared_load(picked);
      }
    }
    /// The token of the thread at which the cumulative weight exceeds x, for everybody.
    Q1M_DEVICE void pick_own(uint64_t x, uint64_t lower, uint64_t upper) {
      for_each([&](int64_t id, float, float a) {
        const uint64_t order = order_of(a, id);
        if (order <= lower || order >= upper) return true;
        const uint64_t own = weight_of(settings, a, largest);
        if (x < own) {
          arch::shared_store(Q1M_SHARED_MEMBER(smem, picked), order);
          return false;
        }
        x -= own;
        return true;
      });
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
    const int64_t index = arch::block_index() / kBlocks;
    Row row = {p.args, arch::shared_memory<Smem>(), index, settings_of(p.args, index)};
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
    const bool writes = arch::thread_index() == 0 && arch::cluster_rank() == 0;
    if (p.args.logprobs) {
      const float value = numbers ? logprob(row, row.load_logit(id)) : NAN;
      if (writes) arch::global_store(p.args.logprobs.at(row.index), value);
    }
    if constexpr (kBlocks > 1) Row::cluster_sync();  // no block reads another's memory any more
    // Behind the last barrier: nobody reads the history any more.
    if (writes) {
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
