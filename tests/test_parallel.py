"""The sharing out of work among threads (csrc/cpu/parallel.h), compiled by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
COMPILER = os.environ.get("CXX", "c++")

pytestmark = [
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler {COMPILER}"),
    pytest.mark.skipif(not CSRC.is_dir(), reason="no sources, an installed package"),
]

_PROGRAM = """
#include "cpu/parallel.h"

#include <cstdio>
#include <exception>
#include <stdexcept>

using namespace d3net::cpu;
constexpr int64_t kThreads = 3, kItems = 50;

int64_t d3net::cpu::num_threads() { return kThreads; }
/// As torch's: all threads are joined, then the first exception goes on.
void d3net::cpu::run_on_all_threads(void (*body)(void*, int64_t), void* context) {
  std::vector<std::thread> threads;
  std::exception_ptr thrown;
  std::mutex mutex;
  for (int64_t t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      try {
        body(context, t);
      } catch (...) {
        const std::lock_guard lock(mutex);
        thrown = std::current_exception();
      }
    });
  for (std::thread& thread : threads) thread.join();
  if (thrown) std::rethrow_exception(thrown);
}

/// Two phases; item `bad` of the first throws. Returns how often items of the second were done.
int64_t run(int64_t bad) {
  std::atomic<int64_t> done{0};
  auto program = [&](Crew::Worker& worker) {
    worker.each(kItems, [&](int64_t i, int64_t) {
      if (i == bad) throw std::runtime_error("bad item");
    });
    worker.each(kItems, [&](int64_t, int64_t) { done++; });
  };
  Crew::run(program, Crew::kWorthSharing);
  return done;
}

int main() {
  for (int repeat = 0; repeat < 200; ++repeat) {
    if (run(-1) != kItems) return std::puts("items were lost"), 1;
    for (const int64_t bad : {int64_t{0}, kItems / 2, kItems - 1}) {
      try {
        run(bad);
        return std::puts("the exception was lost"), 1;
      } catch (const std::runtime_error&) {
      }
    }
  }
}
"""


def test_an_item_that_throws_keeps_nobody_waiting(tmp_path: Path) -> None:
    source, program = tmp_path / "program.cpp", tmp_path / "program"
    source.write_text(_PROGRAM)
    command = [COMPILER, "-std=c++20", "-O1", "-pthread", "-I", CSRC, source, "-o", program]
    subprocess.run(command, check=True, timeout=120)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
