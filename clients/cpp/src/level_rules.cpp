#include "lom_client/level_rules.hpp"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <stdexcept>
#include <string>

namespace lom_client {
namespace {

constexpr std::int64_t kLongestPeriodNs = 3600 * kNsPerS;
// Below, the arithmetic of braking could overflow.
constexpr double kSmallestLimit = 1e-9;

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

template <typename Number>
void require_range(const char* name, Number value, Number low, Number high) {
  // Written so that NaN fails as well.
  if (!(low <= value && value <= high)) {
    refuse(name, " must be between ", low, " and ", high, ", got ", value);
  }
}

void require_width(const char* name, const std::vector<double>& values, std::size_t width) {
  if (values.size() != width) {
    refuse(name, " must have ", width, " numbers, one for each element, got ", values.size());
  }
}

void require_limits(const char* name, const std::vector<double>& limits, std::size_t width) {
  if (limits.empty()) {
    return;
  }
  require_width(name, limits, width);
  for (std::size_t i = 0; i < width; ++i) {
    if (!(limits[i] >= kSmallestLimit)) {
      refuse(name, "[", i, "] must be ", kSmallestLimit, " or more, got ", limits[i]);
    }
  }
}

}  // namespace

void LevelRules::check() const {
  require_range<std::int64_t>("period_ns", period_ns, 1, kLongestPeriodNs);
  if (kinds.empty()) {
    refuse("kinds must name position, velocity or torque for each element, got none");
  }
  require_width("low", low, width());
  require_width("high", high, width());
  require_width("safe_action", safe_action, width());
  for (std::size_t i = 0; i < width(); ++i) {
    if (!(low[i] <= high[i]) || (std::isinf(low[i]) && low[i] == high[i])) {
      refuse("low[", i, "] must be a number at or below high[", i, "], got ", low[i], " and ", high[i]);
    }
    if (!std::isfinite(safe_action[i]) || safe_action[i] < low[i] || safe_action[i] > high[i]) {
      refuse("safe_action[", i, "] must be between ", low[i], " and ", high[i], ", got ", safe_action[i]);
    }
  }
  require_limits("slew_per_s", slew_per_s, width());
  require_limits("acceleration_per_s2", acceleration_per_s2, width());
  require_range("bounds_tolerance", bounds_tolerance, 0.0, 1.0);
  require_range<std::int64_t>("max_age_ns", max_age_ns, 1, 10 * kLongestPeriodNs);
  require_range<std::int64_t>("hold_ticks", hold_ticks, 0, 1000);
  require_range<std::int64_t>("stop_ticks", stop_ticks, hold_ticks + 1, 100'000);
  require_range<std::int64_t>("recovery_ticks", recovery_ticks, 1, 100'000);
  require_range<std::int64_t>("velocity_decay_ns", velocity_decay_ns, 1, 100'000'000);
  require_range<std::int64_t>("torque_hold_ns", torque_hold_ns, 0, 20'000'000);
  require_range<std::int64_t>("stop_ns", stop_ns, 0, 10 * kNsPerS);
  require_range<std::int64_t>("warning_ticks", warning_ticks, 1, 100'000);
  require_range<std::int64_t>("frozen_ticks", frozen_ticks, 0, 100'000);
  require_range<std::int64_t>("blend_ticks", blend_ticks, 0, 100'000);
}

std::int64_t default_hold_ticks(std::int64_t period_ns) { return std::min<std::int64_t>(5, 100'000'000 / period_ns); }

std::int64_t default_stop_ticks(std::int64_t period_ns, std::int64_t hold_ticks) {
  return std::max(hold_ticks + 1, std::min<std::int64_t>(20, 500'000'000 / period_ns));
}

std::int64_t default_recovery_ticks(std::int64_t period_ns) {
  return std::max<std::int64_t>(5, (50'000'000 + period_ns - 1) / period_ns);
}

}  // namespace lom_client
