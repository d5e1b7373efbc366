// Runs the launches of a job file: buffers, pointers to relocate, kernels and their arguments.
//
// The job and result files are written and read by source.py. Buffers lie at other addresses here;
// whatever in a buffer or an argument is the address of a byte of a buffer is replaced.
#pragma once

#include <fstream>
#include <stdexcept>
#include <tuple>

#include "runtime.h"

namespace gpu {

struct JobBuffer {
  uint64_t old_address = 0, size = 0;
  char* data = nullptr;
};

/// Pointers stand at multiples of 4 bytes: tables travel as 32-bit words.
inline void relocate(char* bytes, size_t size, const std::vector<JobBuffer>& buffers) {
  for (size_t at = 0; at + 8 <= size; at += 4) {
    uint64_t value;
    std::memcpy(&value, bytes + at, 8);
    for (const auto& buffer : buffers)
      if (value >= buffer.old_address && value < buffer.old_address + buffer.size) {
        value = reinterpret_cast<uint64_t>(buffer.data) + (value - buffer.old_address);
        std::memcpy(bytes + at, &value, 8);
        at += 4;
        break;
      }
  }
}

/// The kernels of this program by name; each takes one struct by value.
class KernelTable {
 public:
  template <class Params>
  void add(const std::string& name, void (*kernel)(Params)) {
    entries_[name] = [kernel](const std::vector<char>& bytes) -> std::function<void()> {
      if (bytes.size() != sizeof(Params)) die("the arguments do not have the size of the struct");
      Params params;
      std::memcpy(static_cast<void*>(&params), bytes.data(), sizeof params);
      return [kernel, params] { kernel(params); };
    };
  }
  std::function<void()> bind(const std::string& name, const std::vector<char>& arguments) const {
    const auto found = entries_.find(name);
    if (found == entries_.end()) die("this program has no kernel " + name);
    return found->second(arguments);
  }

 private:
  std::map<std::string, std::function<std::function<void()>(const std::vector<char>&)>> entries_;
};

class JobFile {
 public:
  explicit JobFile(const char* path) : stream_(path, std::ios::binary) {}
  uint64_t number() {
    uint64_t value = 0;
    stream_.read(reinterpret_cast<char*>(&value), sizeof value);
    return value;
  }
  std::vector<char> bytes() {
    std::vector<char> data(number());
    stream_.read(data.data(), static_cast<std::streamsize>(data.size()));
    if (!stream_) throw std::runtime_error("the job file ends too early");
    return data;
  }
  std::string text() {
    const auto data = bytes();
    return {data.begin(), data.end()};
  }

 private:
  std::ifstream stream_;
};

inline int run_job(const KernelTable& kernels, int count, char** arguments) {
  if (count != 3) throw std::runtime_error("usage: program job result");
  JobFile job(arguments[1]);
  machine.order = job.text();
  machine.early_copies = job.number();
  const std::string kernel = job.text();
  const Uint3 grid{static_cast<unsigned>(job.number()), static_cast<unsigned>(job.number()),
                   static_cast<unsigned>(job.number())};
  const Uint3 block{static_cast<unsigned>(job.number()), static_cast<unsigned>(job.number()),
                    static_cast<unsigned>(job.number())};
  const size_t shared = job.number();
  std::vector<char> parameters = job.bytes();
  std::vector<JobBuffer> buffers(job.number());
  for (auto& buffer : buffers) {
    buffer.old_address = job.number();
    const auto content = job.bytes();
    buffer.size = content.size();
    // As cudaMalloc aligns it, and with a red zone right behind its last byte.
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, buffer.size)) throw std::bad_alloc();
    buffer.data = static_cast<char*>(memory);
    std::copy(content.begin(), content.end(), buffer.data);
  }
  relocate(parameters.data(), parameters.size(), buffers);
  for (auto& buffer : buffers) relocate(buffer.data, buffer.size, buffers);
  launch(grid, block, shared, kernels.bind(kernel, parameters));
  for (auto& buffer : buffers) {  // pointers go back as they came
    std::vector<JobBuffer> back;
    for (const auto& other : buffers)
      back.push_back({reinterpret_cast<uint64_t>(other.data), other.size,
                      reinterpret_cast<char*>(other.old_address)});
    relocate(buffer.data, buffer.size, back);
  }
  std::ofstream result(arguments[2], std::ios::binary);
  for (const auto& buffer : buffers)
    result.write(buffer.data, static_cast<std::streamsize>(buffer.size));
  return 0;
}

}  // namespace gpu
