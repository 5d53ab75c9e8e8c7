#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "arch/cuda/host.h"
#include "qwen1m/error.h"

namespace qwen1m::arch {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

/// The driver's own function, looked up at run time: nothing here links against libcuda.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    Q1M_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                    cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess || entry == nullptr) {
      throw Error(
          "cuTensorMapEncodeTiled: expected a driver of CUDA 12.0 or newer, got one without it");
    }
    return reinterpret_cast<EncodeTiled>(entry);
  }();
  return function;
}

void require(bool ok, const char* field, const char* expected, uint64_t got) {
  if (ok) return;
  throw Error(std::string("tensor map: ") + field + ": expected " + expected + ", got " +
              std::to_string(got));
}

CUtensorMapSwizzle swizzle_code(Swizzle swizzle) {
  switch (swizzle) {
    case Swizzle::k32:
      return CU_TENSOR_MAP_SWIZZLE_32B;
    case Swizzle::k64:
      return CU_TENSOR_MAP_SWIZZLE_64B;
    case Swizzle::k128:
      return CU_TENSOR_MAP_SWIZZLE_128B;
    default:
      return CU_TENSOR_MAP_SWIZZLE_NONE;
  }
}

void check_spec(const TensorMapSpec& spec) {
  const auto base = reinterpret_cast<uint64_t>(spec.base);
  require(base != 0 && base % 16 == 0, "base", "an address that is a multiple of 16", base);
  require(spec.element_bytes == 2 || spec.element_bytes == 4, "element_bytes", "2 or 4",
          static_cast<uint64_t>(spec.element_bytes));
  for (int i = 0; i < 5; ++i) {
    require(spec.sizes[i] >= 1 && spec.sizes[i] <= uint64_t{1} << 32, "sizes", "1 to 2^32",
            spec.sizes[i]);
    require(spec.box[i] >= 1 && spec.box[i] <= 256, "box", "1 to 256", spec.box[i]);
  }
  for (const uint64_t stride : spec.stride_bytes) {
    require(stride % 16 == 0 && stride < uint64_t{1} << 40, "stride_bytes",
            "a multiple of 16 below 2^40", stride);
  }
  const uint64_t row = uint64_t{spec.box[0]} * static_cast<uint64_t>(spec.element_bytes);
  const auto width = static_cast<uint64_t>(spec.swizzle);
  require(row % 16 == 0 && (width == 0 || row <= width), "box[0]",
          "a multiple of 16 bytes, at most the width of the swizzle", row);
}

}  // namespace

void check_cuda(int code, const char* call) {
  if (code == cudaSuccess) return;
  const auto error = static_cast<cudaError_t>(code);
  // Clears the error unless it is one that the context does not survive.
  cudaGetLastError();
  throw Error(std::string(call) + ": " + cudaGetErrorName(error) + ": " +
              cudaGetErrorString(error));
}

DeviceFacts device_facts() {
  DeviceFacts facts;
  Q1M_CUDA_CHECK(cudaGetDevice(&facts.device));
  const auto attribute = [&](cudaDeviceAttr what) {
    int value = 0;
    Q1M_CUDA_CHECK(cudaDeviceGetAttribute(&value, what, facts.device));
    return value;
  };
  facts.num_sms = attribute(cudaDevAttrMultiProcessorCount);
  facts.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                     attribute(cudaDevAttrComputeCapabilityMinor);
  facts.l2_bytes = attribute(cudaDevAttrL2CacheSize);
  return facts;
}

int require_sm80(const char* name) {
  const int capability = device_facts().capability;
  if (capability >= 80) return capability;
  throw Error(std::string(name) + ": expected a GPU of compute capability 8.0 or later, got " +
              std::to_string(capability / 10) + "." + std::to_string(capability % 10));
}

int kernel_architecture(const char* name) {
  static const bool own = [] {
    const char* value = std::getenv("QWEN1M_CUDA_KERNELS");
    const std::string text = value == nullptr ? "" : value;
    if (text.empty() || text == "auto") return true;
    if (text == "sm80") return false;
    throw Error("QWEN1M_CUDA_KERNELS: expected auto or sm80, got '" + text + "'");
  }();
  return require_sm80(name) == 90 && own ? 90 : 80;
}

TensorMap make_tensor_map(const TensorMapSpec& spec) {
  check_spec(spec);
  const cuuint32_t element_strides[5] = {1, 1, 1, 1, 1};
  CUtensorMap encoded;  // its own type: CUDA 13 aligns it to 128 bytes, kernels need 64
  const CUresult result = encode_tiled()(
      &encoded,
      spec.element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
      5, spec.base, reinterpret_cast<const cuuint64_t*>(spec.sizes),
      reinterpret_cast<const cuuint64_t*>(spec.stride_bytes), spec.box, element_strides,
      CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_code(spec.swizzle), CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw Error("cuTensorMapEncodeTiled: CUresult " + std::to_string(static_cast<int>(result)));
  }
  TensorMap map;
  static_assert(sizeof(map) == sizeof(encoded));
  std::memcpy(&map, &encoded, sizeof(map));
  return map;
}

void launch(const void* kernel, const LaunchConfig& config, const void* params) {
  if (config.blocks == 0) return;
  if (config.blocks < 0 || config.blocks > INT32_MAX || config.blocks % config.cluster != 0) {
    throw Error(std::string(config.name) + ": blocks: expected a multiple of the cluster size " +
                std::to_string(config.cluster) + " in [0, 2^31), got " +
                std::to_string(config.blocks));
  }
  try {
    if (config.shared_bytes > 48 * 1024) {  // more has to be asked for
      Q1M_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(config.shared_bytes)));
    }
    cudaLaunchAttribute attributes[2];
    unsigned count = 0;
    if (config.cluster > 1) {
      attributes[count].id = cudaLaunchAttributeClusterDimension;
      attributes[count].val.clusterDim = {static_cast<unsigned>(config.cluster), 1, 1};
      ++count;
    }
    if (config.dependent) {
      attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[count].val.programmaticStreamSerializationAllowed = 1;
      ++count;
    }
    cudaLaunchConfig_t launch = {};
    launch.gridDim = {static_cast<unsigned>(config.blocks), 1, 1};
    launch.blockDim = {static_cast<unsigned>(config.threads), 1, 1};
    launch.dynamicSmemBytes = config.shared_bytes;
    launch.stream = static_cast<cudaStream_t>(config.stream);
    launch.attrs = attributes;
    launch.numAttrs = count;
    void* arguments[] = {const_cast<void*>(params)};
    Q1M_CUDA_CHECK(cudaLaunchKernelExC(&launch, kernel, arguments));
  } catch (const Error& error) {
    throw Error(std::string(config.name) + ": " + error.what());
  }
}

}  // namespace qwen1m::arch
