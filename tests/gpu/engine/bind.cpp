// The machine as a Python module. tests/gpu/ptx decodes the text, this executes it.
#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "machine.h"
#include "operations.h"

namespace py = pybind11;

namespace {

using gpu::Dim3;

struct DecodedInstruction {
  std::string operation;
  int guard;
  bool negated;
  std::vector<uint32_t> operands;
  std::vector<int64_t> constants;
  int line;
  std::string text;
};

Dim3 dim3(const std::array<uint32_t, 3>& d) { return {d[0], d[1], d[2]}; }

gpu::Program make_program(const std::string& name, const std::vector<DecodedInstruction>& code,
                          const std::vector<std::tuple<uint32_t, int, uint64_t>>& constants,
                          const std::vector<std::pair<uint32_t, int>>& specials,
                          uint32_t register_bytes, uint32_t shared_bytes, uint32_t local_bytes,
                          int finest_store) {
  gpu::Program program;
  program.name = name;
  for (const auto& from : code) {
    const gpu::Operation* operation = gpu::find_operation(from.operation);
    if (!operation) throw gpu::Error("unknown operation " + from.operation);
    program.code.push_back({operation->run, operation->kind, from.guard, from.negated,
                            from.operands, from.constants, from.line,
                            static_cast<int>(program.code.size()), from.text});
  }
  for (const auto& [place, bytes, value] : constants)
    program.constants.push_back({place, bytes, value});
  program.specials = specials;
  program.register_bytes = register_bytes;
  program.shared_bytes = shared_bytes;
  program.local_bytes = local_bytes;
  program.finest_store = finest_store;
  return program;
}

/// Counts by instruction, and by buffer the distinct bytes read and written.
py::tuple launch(const gpu::Program& program, std::array<uint32_t, 3> grid,
                 std::array<uint32_t, 3> block, uint32_t dynamic_shared, const py::bytes& params,
                 const std::vector<std::tuple<std::string, uint64_t, uint64_t, bool>>& buffers,
                 const gpu::Options& options) {
  const std::string_view bytes = params;
  std::vector<gpu::Buffer> memory;
  for (const auto& [name, address, size, writable] : buffers)
    memory.push_back({address, address + size, writable, name, {}, {}});
  gpu::Launch run(program, dim3(grid), dim3(block), dynamic_shared, {bytes.begin(), bytes.end()},
                  std::move(memory), options);
  {
    const py::gil_scoped_release release;
    run.run();
  }
  py::list counts, distinct;
  const auto traffic = [](const gpu::Traffic& t) {
    return py::make_tuple(t.requests, t.units, t.ideal, t.bytes);
  };
  for (const gpu::Count& c : run.counts)
    counts.append(py::make_tuple(c.issued, traffic(c.global), traffic(c.shared)));
  for (const gpu::Buffer& b : run.memory.buffers())
    distinct.append(py::make_tuple(b.name, b.distinct_bytes(b.read), b.distinct_bytes(b.written)));
  return py::make_tuple(counts, distinct);
}

/// The C++ name of a symbol, or the symbol itself.
std::string demangle(const std::string& symbol) {
  int status = 0;
  char* name = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  const std::string result = name ? name : symbol;
  std::free(name);
  return result;
}

}  // namespace

PYBIND11_MODULE(_engine, m) {
  gpu::register_integer_operations();
  gpu::register_float_operations();
  gpu::register_convert_operations();
  gpu::register_memory_operations();
  gpu::register_warp_operations();
  gpu::register_matrix_operations();

  py::register_exception<gpu::Error>(m, "KernelError");
  py::enum_<gpu::Order>(m, "Order")
      .value("forward", gpu::Order::forward)
      .value("reverse", gpu::Order::reverse)
      .value("random", gpu::Order::random);
  py::enum_<gpu::LaneMode>(m, "LaneMode")
      .value("lockstep", gpu::LaneMode::lockstep)
      .value("forward", gpu::LaneMode::forward)
      .value("reverse", gpu::LaneMode::reverse)
      .value("random", gpu::LaneMode::random);
  py::enum_<gpu::CopyMode>(m, "CopyMode")
      .value("late", gpu::CopyMode::late)
      .value("early", gpu::CopyMode::early)
      .value("random", gpu::CopyMode::random);
  py::class_<gpu::Options>(m, "Options")
      .def(py::init([](gpu::Order warps, gpu::Order blocks, gpu::LaneMode lanes,
                       gpu::CopyMode copies, bool check_races, uint64_t seed) {
             return gpu::Options{warps, blocks, lanes, copies, check_races, seed};
           }),
           py::kw_only(), py::arg("warps"), py::arg("blocks"), py::arg("lanes"), py::arg("copies"),
           py::arg("check_races"), py::arg("seed"));
  py::class_<DecodedInstruction>(m, "Instruction")
      .def(py::init<std::string, int, bool, std::vector<uint32_t>, std::vector<int64_t>, int,
                    std::string>());
  py::class_<gpu::Program>(m, "Program").def(py::init(&make_program));
  m.def("launch", &launch);
  m.def("operation_names", &gpu::operation_names);
  m.def("demangle", &demangle);
}
