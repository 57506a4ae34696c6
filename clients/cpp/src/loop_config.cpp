#include "lom_client/loop_config.hpp"

#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string_view>

namespace lom_client {
namespace {

constexpr double kWaitShare = 0.8;
constexpr double kLongestS = 3600.0;

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

std::int64_t nanoseconds(std::string_view name, double seconds, bool may_be_zero) {
  // Written so that NaN fails as well.
  if (!(0 <= seconds && seconds <= kLongestS)) {
    refuse(name, " must be between 0 and ", kLongestS, ", got ", seconds);
  }
  if (seconds == 0 && !may_be_zero) {
    refuse(name, " must be above 0, got 0");
  }
  return std::llround(seconds * 1e9);
}

template <typename Value>
std::vector<Value> for_each(const std::vector<Value>& values, std::size_t width) {
  return values.size() == 1 ? std::vector<Value>(width, values[0]) : values;
}

/// Bounds that float32 can say, none of them wider: commands are float32.
std::vector<double> inward(std::vector<double> bounds, float towards) {
  for (double& bound : bounds) {
    float rounded = static_cast<float>(bound);
    const bool is_outside = towards > 0 ? rounded < bound : rounded > bound;
    bound = is_outside ? std::nextafter(rounded, towards) : rounded;
  }
  return bounds;
}

}  // namespace

std::int64_t LoopConfig::wait_ns() const { return std::llround(deadline_s.value_or(kWaitShare * period_s) * 1e9); }

LevelRules LoopConfig::rules(const Bounds& bounds) const {
  LevelRules rules;
  rules.period_ns = nanoseconds("period_s", period_s, false);
  if (rules.period_ns < 1) {
    refuse("period_s must be 1e-9 or more, got ", period_s);
  }
  if (deadline_s && !(0 <= *deadline_s && *deadline_s <= period_s)) {
    refuse("deadline_s must be between 0 and the period ", period_s, ", got ", *deadline_s);
  }
  if (!(std::isfinite(hysteresis_width) && hysteresis_width >= 0)) {
    refuse("hysteresis_width must be 0 or more, got ", hysteresis_width);
  }
  if (!(0 < connect_deadline_s && connect_deadline_s <= kLongestS)) {
    refuse("connect_deadline_s must be above 0 and at most ", kLongestS, ", got ", connect_deadline_s);
  }
  // The bounds know best how many elements there are.
  std::size_t width = 1;
  for (const std::size_t size : {bounds.low.size(), bounds.high.size(), kinds.size(), safe_action.size()}) {
    if (size > 1) {
      width = size;
      break;
    }
  }
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  rules.kinds = for_each(kinds, width);
  if (rules.kinds.size() != width) {
    refuse("kinds must be one, or one for each of ", width, " elements, got ", kinds.size());
  }
  rules.low = inward(for_each(bounds.low, width), kInfinity);
  rules.high = inward(for_each(bounds.high, width), -kInfinity);
  rules.safe_action = for_each(safe_action, width);
  rules.slew_per_s = for_each(slew_per_s, width);
  rules.acceleration_per_s2 = for_each(acceleration_per_s2, width);
  rules.waits = wait_ns() > 0;
  rules.has_fallback = static_cast<bool>(fallback);
  rules.bounds_tolerance = bounds_tolerance;
  rules.max_age_ns = max_age_s ? nanoseconds("max_age_s", *max_age_s, false) : 2 * rules.period_ns;
  rules.hold_ticks = hold_limit.value_or(default_hold_ticks(rules.period_ns));
  rules.stop_ticks = stop_limit.value_or(default_stop_ticks(rules.period_ns, rules.hold_ticks));
  rules.recovery_ticks = recovery_ticks.value_or(default_recovery_ticks(rules.period_ns));
  rules.velocity_decay_ns = nanoseconds("velocity_decay_s", velocity_decay_s, false);
  rules.torque_hold_ns = nanoseconds("torque_hold_s", torque_hold_s, true);
  rules.stop_ns = nanoseconds("stop_s", stop_s, true);
  rules.on_warning = on_warning;
  rules.frozen_ticks = frozen_ticks;
  rules.blend_ticks = blend_ticks;
  rules.pins_bundle = pins_bundle;
  rules.check();
  return rules;
}

}  // namespace lom_client
