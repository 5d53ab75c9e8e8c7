#pragma once
/// decode_attention's ring of copies on sm_90a: TMA, two boxes of 4 KB a step, issued by one lane
/// of the warp that will read them. Three stages of 8 KB for each of the 4 warps, two blocks on a
/// multiprocessor: 192 KB, of which at least 128 KB are on their way.

#include "arch/ring.h"
#include "ops/decode_attention/decode_attention_kernel.h"

namespace qwen1m {

struct DecodeParamsSm90 {
  DecodeLaunch launch;
  arch::TensorMap k_map, v_map;  // boxes of kStepKeys keys
};

template <int kHeadDim>
class TmaRing {
 public:
  static constexpr int kStages = 3;
  static constexpr int kKeys = kStepKeys<kHeadDim>;
  using Stage = DecodeStage<kHeadDim>;
  using Stages = Stage[kDecodeWarps * kStages];
  using WarpBarriers = arch::Mbarrier[kStages];
  struct Barriers {
    WarpBarriers full[kDecodeWarps];
  };
  using Params = DecodeParamsSm90;

  /// The calling warp's ring for its steps.
  Q1M_DEVICE TmaRing(const Params& p, const DecodeWork& work, const WarpSteps<kHeadDim>& steps,
                     arch::Shared<Stages> stages, arch::Shared<Barriers> barriers)
      : p_(p),
        work_(work),
        steps_(steps),
        stages_(stages),
        full_(Q1M_SHARED_MEMBER(barriers, full)[arch::warp_index()]) {
    if (arch::lane_index() == 0) {
      Q1M_UNROLL
      for (int i = 0; i < kStages; ++i) arch::mbarrier_init(full_[i], 1);
      arch::fence_mbarrier_init();
    }  // the other lanes come to these barriers after the block's barrier behind the queries
    if (steps_.count > 0) page_ = load_page(0);
  }

  /// Starts the copies of a step into the stage that it shares with step - kStages; none behind the
  /// last step.
  Q1M_DEVICE void start(int step) {
    if (step >= steps_.count) return;
    const int row = steps_.key(step) % static_cast<int>(kPageSize), stage = step % kStages;
    if (arch::lane_index() == 0) {
      const auto to = at(stage);
      const arch::Coordinates5 from{{0, row, 0, work_.kv_head, page_}};
      arch::mbarrier_arrive_expect_tx(full_[stage], sizeof(Stage));
      arch::tma_load(Q1M_SHARED_MEMBER(to, k).template as<void>(), p_.k_map, full_[stage], from);
      arch::tma_load(Q1M_SHARED_MEMBER(to, v).template as<void>(), p_.v_map, full_[stage], from);
    }
    if (step + 1 < steps_.count) page_ = load_page(step + 1);
  }
  /// Until the current stage, that of step `step`, has landed.
  Q1M_DEVICE void wait(int step) {
    ring_.wait_full(full_);
    const int rows_left = work_.kv_len - steps_.key(step);
    if (rows_left < kKeys) zero_tail(rows_left);
  }
  Q1M_DEVICE arch::Shared<Stage> stage() const { return at(ring_.stage); }
  Q1M_DEVICE void next() { ring_.advance(); }
  Q1M_DEVICE void finish() {}

 private:
  Q1M_DEVICE arch::Shared<Stage> at(int stage) const {
    return stages_[arch::warp_index() * kStages + stage];
  }
  Q1M_DEVICE int32_t load_page(int step) const {
    return arch::global_load(
        p_.launch.args.block_table.at(work_.batch, steps_.key(step) / static_cast<int>(kPageSize)));
  }
  /// Values behind the end of the sequence may be NaN, and 0 * NaN is NaN. The stage of a
  /// sequence's last step is not filled again, so that the copies need no fence after it.
  Q1M_DEVICE void zero_tail(int rows_left) const {
    const auto current = stage();
    const typename Stage::Rows v{Q1M_SHARED_MEMBER(current, v)};
    constexpr int kChunks = kHeadDim / 8;
    for (int i = rows_left * kChunks + arch::lane_index(); i < kKeys * kChunks; i += 32) {
      arch::shared_store(v.at(i / kChunks, i % kChunks), arch::Vec16{});
    }
    arch::warp_sync();
  }

  const Params& p_;
  const DecodeWork& work_;
  const WarpSteps<kHeadDim>& steps_;
  arch::Shared<Stages> stages_;
  arch::Shared<WarpBarriers> full_;
  arch::Ring<kStages> ring_;
  int32_t page_ = 0;  // of the step that is started next
};

/// kRowTiles 1 or 2: up to 16 or 32 rows (query heads of a KV head times query tokens) a block.
/// Cache: bf16, or e4m3, seen by the copies as rows of D / 2 numbers of two bytes.
template <int kHeadDim, int kRowTiles, typename Cache = bf16>
struct DecodeAttentionSm90 : DecodeAttention<kHeadDim, kRowTiles, Cache, TmaRing> {
  static_assert(kDecodeBlocksPerSm * (sizeof(typename DecodeAttentionSm90::Smem) + 1024) <=
                228 * 1024);
};

}  // namespace qwen1m
