#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "lom_client/control_loop.hpp"

namespace lom_client {

/// Counts. Threads: one counts and never waits; any may look, and sees whole ticks.
class LoopTally {
 public:
  void count(const Command& command) noexcept;
  void count(const Rejected& rejected) noexcept;

  LoopCounters snapshot() const;

 private:
  static constexpr std::size_t kMostReasons = 100;
  static constexpr std::size_t kAges = 64;
  using Number = std::atomic<std::int64_t>;

  struct Counted {
    Reason reason;
    Number misses{0};
    Number rejected{0};
  };

  /// The place of `reason`; the last one stands for those that found no place.
  Counted& known(const Reason& reason) noexcept;
  LoopCounters read() const;

  class Writing;

  /// Odd while somebody counts.
  std::atomic<std::uint64_t> version_{0};
  std::array<Number, 4> sources_{};
  std::array<std::array<Number, 4>, 4> transitions_{};
  std::array<Number, kAges> ages_{};
  Number longest_miss_run_{0};
  std::array<Counted, kMostReasons + 1> reasons_{};
  std::atomic<std::size_t> num_reasons_{0};

  Level level_ = Level::kDegraded;
  std::int64_t miss_run_ = 0;
};

}  // namespace lom_client
