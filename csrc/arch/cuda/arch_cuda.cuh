#pragma once
/// The primitives of arch/arch.h as PTX. Inline assembly lives in this folder and nowhere else.
///
/// What an architecture does not have is not guarded here: a kernel for sm_80 that calls tma_load
/// does not assemble, and ptxas names the instruction. Functions that nobody calls emit nothing.

#include "arch/arch.h"
#include "arch/cuda/mbarrier.cuh"
#include "arch/cuda/memory.cuh"
#include "arch/cuda/tma.cuh"
#include "arch/cuda/warp.cuh"
#include "arch/cuda/wgmma.cuh"
