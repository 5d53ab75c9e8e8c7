// The Python module _host: C++ that is no tensor op. Build facts, and rules of positions and sparse
// tiles for plans and tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "common/cpu_features.h"
#include "common/sparse/public_tiles.h"
#include "qwen1m/decode_attention.h"
#include "qwen1m/dual_chunk.h"

namespace py = pybind11;

namespace qwen1m {
namespace {

/// {"<op>": ["sm_80", "sm_90a"]} from "<op>: sm_80 sm_90a <op>: ...".
py::dict cuda_kernels() {
  py::dict kernels;
  py::list architectures;
  std::istringstream words(Q1M_CUDA_KERNELS);
  for (std::string word; words >> word;) {
    if (word.back() == ':') {
      architectures = py::list();
      kernels[py::str(word.substr(0, word.size() - 1))] = architectures;
    } else {
      architectures.append(word);
    }
  }
  return kernels;
}

py::dict build_info() {
  std::vector<std::string> isas;
  for (int isa = 0; isa <= static_cast<int>(compiled_cpu_isa()); ++isa) {
    isas.emplace_back(cpu_isa_name(static_cast<CpuIsa>(isa)));
  }
  py::dict info;
  info["version"] = Q1M_VERSION;
  info["git"] = Q1M_GIT_DESCRIBE;
  info["compiler"] = Q1M_COMPILER;
  info["build_type"] = Q1M_BUILD_TYPE;
  info["cuda"] = Q1M_CUDA != 0;
  info["cuda_compiler"] = Q1M_CUDA_COMPILER;
  info["cuda_kernels"] = cuda_kernels();
  info["torch_headers"] = Q1M_TORCH_VERSION;
  info["torch_target"] = Q1M_TORCH_TARGET;
  info["cpu_isas_compiled"] = isas;
  info["cpu_isa_machine"] = cpu_isa_name(machine_cpu_isa());
  info["cpu_isa"] = cpu_isa_name(cpu_isa());
  return info;
}

DualChunk make_dual_chunk(int64_t chunk_size, int64_t local_size) {
  if (local_size < 0 || local_size >= chunk_size) {
    throw py::value_error("DualChunk: local_size: expected 0 <= local_size < chunk_size = " +
                          std::to_string(chunk_size) + ", got " + std::to_string(local_size));
  }
  return {.chunk_size = chunk_size, .local_size = local_size};
}

py::tuple describe_public_tile(const std::vector<int64_t>& diagonals, int64_t first_row,
                               int64_t kv_len, int64_t shift, bool causal) {
  const PublicTile tile = public_tile(diagonals, first_row, kv_len, shift, causal);
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (const KeyRange& range : tile.ranges) ranges.emplace_back(range.begin, range.end);
  return py::make_tuple(ranges, tile.column_end);
}

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build facts and the Dual Chunk position rules (include/qwen1m/dual_chunk.h).";
  m.attr("PAGE_SIZE") = kPageSize;
  m.attr("INFINITE_CHUNK") = kInfiniteChunk;
  m.def("build_info", &build_info,
        "What this binary is, as a dict. cpu_isa is what the kernels use in this process; raises "
        "RuntimeError if QWEN1M_CPU_ISA asks for something that is not there.");

  m.def("public_tile", &describe_public_tile, py::arg("diagonals"), py::arg("first_row"),
        py::arg("kv_len"), py::arg("shift"), py::arg("causal"),
        "What public implementations load for 64 rows: ([(begin, end)] of keys, the end of the "
        "columns); csrc/common/sparse/public_tiles.h.");
  m.def(
      "decode_attention_scratch_bytes",
      [](int64_t batch, int64_t q_tokens, int64_t q_heads, int64_t kv_heads, int64_t head_dim,
         int64_t max_tokens, int64_t chunk_size, int64_t local_size, int num_sms) {
        return decode_attention_scratch_bytes(
            {.batch = batch,
             .q_tokens = q_tokens,
             .q_heads = q_heads,
             .kv_heads = kv_heads,
             .head_dim = head_dim,
             .max_tokens = max_tokens,
             .dual_chunk = make_dual_chunk(chunk_size, local_size)},
            num_sms);
      },
      py::arg("batch"), py::arg("q_tokens"), py::arg("q_heads"), py::arg("kv_heads"),
      py::arg("head_dim"), py::arg("max_tokens"), py::arg("chunk_size"), py::arg("local_size"),
      py::arg("num_sms"),
      "Bytes of scratch that decode_attention needs on a GPU of num_sms multiprocessors.");

  py::class_<DualChunk>(m, "DualChunk", "Positions in tokens; see include/qwen1m/dual_chunk.h.")
      .def(py::init(&make_dual_chunk), py::arg("chunk_size") = kInfiniteChunk,
           py::arg("local_size") = 0)
      .def_readonly("chunk_size", &DualChunk::chunk_size)
      .def_readonly("local_size", &DualChunk::local_size)
      .def_property_readonly("chunk_len", &DualChunk::chunk_len)
      .def("chunk", &DualChunk::chunk, py::arg("token"))
      .def("key_position", &DualChunk::key_position, py::arg("token"))
      .def("intra_position", &DualChunk::intra_position, py::arg("token"))
      .def("successive_position", &DualChunk::successive_position, py::arg("token"))
      .def("inter_position", &DualChunk::inter_position)
      .def("intra_begin", &DualChunk::intra_begin, py::arg("token"))
      .def("successive_begin", &DualChunk::successive_begin, py::arg("token"))
      .def("table_rows", &DualChunk::table_rows, py::arg("num_tokens"));
}

}  // namespace
}  // namespace qwen1m
