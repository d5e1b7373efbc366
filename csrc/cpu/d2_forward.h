// The D2 block forward: a sequence of tile passes, one a link, in one parallel region.
#pragma once

#include <limits>
#include <vector>

#include "d2_links.h"
#include "packed_weights.h"

namespace d3net::cpu::D3NET_ISA {

template <class T>
class D2Forward : D2Block<T> {
  using Base = D2Block<T>;
  using Base::p;
  using typename Base::A;
  using Pass = TilePass<T, T, A>;

 public:
  using Base::Base;

  /// `mean` and `variance` hold those of x_0, where a norm wants them; the others are added.
  void run() {
    static thread_local Scratch sums_memory;
    const bool needs_sums = !Base::kWide && p.layers > 1;
    const Borrowed<A> sums(sums_memory, needs_sums ? this->pixels() * p.row() : 0);
    const std::vector<A> bias = this->layer_biases();
    std::vector<Pass> passes;
    std::vector<std::vector<Moments>> moments(this->links_.size());
    std::vector<std::vector<double>> counts(this->links_.size());
    passes.reserve(this->links_.size());
    for (size_t i = 0; i < this->links_.size(); ++i) {
      const Link& link = this->links_[i];
      Pass& pass = passes.emplace_back();
      pass.shape = this->shape_of(link);
      pass.plan = this->plan_of(pass.shape);
      pass.input = {this->source(link.source), true, this->psi_of(link)};
      pass.weight = this->weight_of(link);
      pass.wide_weights = this->wide_weights();
      pass.output.to = destination(sums.get());
      pass.output.to.begin = p.in_row(link.first_layer);
      pass.output.to.end = p.in_row(link.last_layer + 1);
      pass.output.accumulate = !link.opens;
      if (link.opens) pass.output.bias = bias.data() + (link.first_layer - 1) * p.growth;
      if (!Base::kWide && link.finishes)
        pass.output.completed = {this->layer(link.finishes), p.growth};
      if (this->measures(link.finishes)) {
        moments[i].resize(static_cast<size_t>(pass.runs() * p.growth));
        counts[i].resize(static_cast<size_t>(pass.runs()));
        pass.output.measure = {p.growth, moments[i].data(), counts[i].data()};
      }
    }
    PackedWeights<Pass> packed(passes, p.weights_recur);

    auto program = [&](Crew::Worker& worker) {
      packed.prepare(worker);
      worker.once([&] {  // what is known already
        for (int64_t j = 0; j < p.layers; ++j)
          if (j == 0 || !p.norms[j].use_batch) this->fold_norm(j);
      });
      for (size_t i = 0; i < passes.size(); ++i) {
        worker.each(passes[i].tasks(),
                    [&](int64_t task, int64_t next) { passes[i].run(task, next, packed.of(i)); });
        const int64_t layer = this->links_[i].finishes;
        if (this->measures(layer))
          worker.once([&] {
            merge(layer, moments[i], counts[i]);
            this->fold_norm(layer);
          });
      }
    };
    Crew::run(program, p.multiplications());
  }

 private:
  Destination<A> destination(A* sums) const {
    Destination<A> to;
    if constexpr (Base::kWide) {
      to.cut = p.in_row(p.hidden_layers() + 1);
      to.low = this->slab(static_cast<A*>(this->kept_.features), this->kept_.pitch);
      to.high = this->slab(static_cast<A*>(this->kept_.out), p.out_layers * p.growth);
    } else {
      to.cut = std::numeric_limits<int64_t>::max();
      to.low = this->slab(sums, p.row());
    }
    return to;
  }

  void merge(int64_t layer, const std::vector<Moments>& moments,
             const std::vector<double>& counts) {
    for (int64_t c = 0; c < p.growth; ++c) {
      Moments total = moments[static_cast<size_t>(c)];
      double count = counts[0];
      for (size_t run = 1; run < counts.size(); count += counts[run++])
        total.merge(count, moments[run * static_cast<size_t>(p.growth) + static_cast<size_t>(c)],
                    counts[run]);
      this->mean_[p.first_channel(layer) + c] = static_cast<A>(total.mean);
      this->variance_[p.first_channel(layer) + c] = static_cast<A>(total.squares / count);
    }
  }
};

}  // namespace d3net::cpu::D3NET_ISA
