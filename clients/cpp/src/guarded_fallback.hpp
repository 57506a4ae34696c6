#pragma once

#include <cstdint>
#include <vector>

#include "lom_client/levels.hpp"
#include "lom_client/loop_config.hpp"

namespace lom_client {

/// A user's fallback, kept from doing harm: tried before it is needed, watched when it is. Threads: one.
class GuardedFallback : public Fallback {
 public:
  /// Tries the function with the safe action as the command before. Throws std::invalid_argument where it fails, is slow in
  /// each of several trials, or answers what must not be put out.
  GuardedFallback(FallbackFunction function, const LevelRules& rules);

  /// What the next answer may go by.
  void note_measured(Span<const double> measured) { measured_ = measured; }

  /// False where the function throws, says so, or takes longer than a period.
  bool answer(Span<const double> command, Span<double> answer) override;

 private:
  FallbackFunction function_;
  std::int64_t longest_ns_;
  Span<const double> measured_;
};

}  // namespace lom_client
