#include "guarded_fallback.hpp"

#include <algorithm>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "clock.hpp"

namespace lom_client {
namespace {

constexpr std::int64_t kLongestAnswerNs = 200'000;
constexpr int kTrials = 5;

}  // namespace

GuardedFallback::GuardedFallback(FallbackFunction function, const LevelRules& rules)
    : function_(std::move(function)), longest_ns_(rules.period_ns) {
  std::int64_t shortest_ns = std::numeric_limits<std::int64_t>::max();
  std::vector<double> said(rules.width());
  for (int trial = 0; trial < kTrials; ++trial) {
    std::fill(said.begin(), said.end(), std::numeric_limits<double>::quiet_NaN());
    const std::int64_t began_ns = now_ns();
    const bool has_answered = answer(rules.safe_action, said);
    shortest_ns = std::min(shortest_ns, now_ns() - began_ns);
    if (!has_answered) {
      throw std::invalid_argument("fallback must answer the safe action, it failed");
    }
    for (std::size_t i = 0; i < said.size(); ++i) {
      if (!(rules.low[i] <= said[i] && said[i] <= rules.high[i])) {
        std::ostringstream message;
        message << "fallback must answer between " << rules.low[i] << " and " << rules.high[i] << " in [" << i
                << "], got " << said[i];
        throw std::invalid_argument(message.str());
      }
    }
  }
  // The machine may have been busy; not every time.
  if (shortest_ns > kLongestAnswerNs) {
    throw std::invalid_argument("fallback must answer within 200 µs, took " + std::to_string(shortest_ns / 1000));
  }
}

bool GuardedFallback::answer(Span<const double> command, Span<double> answer) {
  const std::int64_t began_ns = now_ns();
  try {
    return function_(command, measured_, answer) && now_ns() - began_ns <= longest_ns_;
  } catch (...) {
    return false;
  }
}

}  // namespace lom_client
