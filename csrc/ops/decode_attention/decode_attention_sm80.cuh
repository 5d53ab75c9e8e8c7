#pragma once
/// decode_attention's ring of copies on sm_80 and later: cp.async, 16 bytes a lane. Two stages of
/// 8 KB for each of the 4 warps: 64 KB a block, two blocks on an A100's multiprocessor, one on a
/// consumer card's.

#include "ops/decode_attention/decode_attention_kernel.h"

namespace qwen1m {

struct DecodeParamsSm80 {
  DecodeLaunch launch;
};

template <int kHeadDim>
class CpAsyncRing {
 public:
  static constexpr int kStages = 2;
  static constexpr int kKeys = kStepKeys<kHeadDim>;
  using Stage = DecodeStage<kHeadDim>;
  using Stages = Stage[kDecodeWarps * kStages];
  struct Barriers {};
  using Params = DecodeParamsSm80;

  /// The calling warp's ring for its steps.
  Q1M_DEVICE CpAsyncRing(const Params& p, const DecodeWork& work, const WarpSteps<kHeadDim>& steps,
                         arch::Shared<Stages> stages, arch::Shared<Barriers>)
      : p_(p.launch.args), work_(work), steps_(steps), stages_(stages) {
    if (steps_.count > 0) page_ = load_page(0);
  }

  /// Starts the copies of a step into the stage that it shares with step - kStages; none behind the
  /// last step.
  Q1M_DEVICE void start(int step) {
    if (step < steps_.count) {
      const int key = steps_.key(step);
      const auto to = at(step % kStages);
      load_rows(p_.k_cache, key, {Q1M_SHARED_MEMBER(to, k)});
      load_rows(p_.v_cache, key, {Q1M_SHARED_MEMBER(to, v)});
      if (step + 1 < steps_.count) page_ = load_page(step + 1);
    }
    arch::cp_async_commit();
  }
  /// Until the current stage, that of step `step`, has landed.
  Q1M_DEVICE void wait(int /*step*/) {
    arch::cp_async_wait<kStages - 1>();
    arch::warp_sync();
  }
  Q1M_DEVICE arch::Shared<Stage> stage() const { return at(stage_); }
  Q1M_DEVICE void next() { stage_ = stage_ + 1 == kStages ? 0 : stage_ + 1; }
  /// Nothing is on its way any more.
  Q1M_DEVICE void finish() { arch::cp_async_wait<0>(); }

 private:
  Q1M_DEVICE arch::Shared<Stage> at(int stage) const {
    return stages_[arch::warp_index() * kStages + stage];
  }
  Q1M_DEVICE int32_t load_page(int step) const {
    return arch::global_load(
        p_.block_table.at(work_.batch, steps_.key(step) / static_cast<int>(kPageSize)));
  }
  /// Rows behind the end of the sequence become zero: they may be NaN, and 0 * NaN is NaN.
  Q1M_DEVICE void load_rows(const AnyView<4>& cache, int key, typename Stage::Rows to) const {
    const bf16* from =
        cache.as<const bf16>().at(page_, work_.kv_head, key % static_cast<int>(kPageSize));
    constexpr int kChunks = kHeadDim / 8;
    const int lane = arch::opaque(arch::lane_index());  // no addresses in registers across the step
    Q1M_UNROLL
    for (int i = 0; i < kKeys * kChunks / 32; ++i) {
      const int chunk = i * 32 + lane;
      arch::cp_async_16(to.at(chunk / kChunks, chunk % kChunks).template as<void>(),
                        from + chunk * 8, key + chunk / kChunks < work_.kv_len);
    }
  }

  const DecodeAttentionParams& p_;
  const DecodeWork& work_;
  const WarpSteps<kHeadDim>& steps_;
  arch::Shared<Stages> stages_;
  int32_t page_ = 0;  // of the step that is started next
  int stage_ = 0;
};

/// kRowTiles 1 or 2: up to 16 or 32 rows (query heads of a KV head times query tokens) a block.
/// Cache: bf16, or e4m3, seen by the copies as rows of D / 2 numbers of two bytes.
template <int kHeadDim, int kRowTiles, typename Cache = bf16>
struct DecodeAttentionSm80 : DecodeAttention<kHeadDim, kRowTiles, Cache, CpAsyncRing> {
  static_assert(sizeof(typename DecodeAttentionSm80::Smem) <= arch::kMaxSharedBytesSm80);
};

}  // namespace qwen1m
