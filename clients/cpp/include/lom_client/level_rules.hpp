#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace lom_client {

inline constexpr std::int64_t kNsPerS = 1'000'000'000;

/// What one element of an action commands. There is no default: the wrong one moves a robot.
enum class Kind {
  kPosition,  ///< Repeating it keeps the robot where it is.
  kVelocity,  ///< Repeating it keeps the robot moving, so that it decays to zero instead.
  kTorque,    ///< Repeating it accelerates the robot, so that it is held for an instant only. Also whatever is neither.
};

/// What becomes of answers whose scores warn.
enum class OnWarning {
  kIgnore,
  kFlag,      ///< They are used, and flagged.
  kFallback,  ///< They are used and flagged until several in a row warn; then the fallback acts.
};

/// What a robot may be told, and for how long: the constants of the levels.
///
/// Units: times in nanoseconds; actions in environment units, those per second where the name says so. Vectors have one
/// number for each element of an action; infinity is no limit.
struct LevelRules {
  std::int64_t period_ns = 0;
  std::vector<Kind> kinds;
  std::vector<double> low;
  std::vector<double> high;
  /// What is put out where nothing better is known, and what torques return to; inside the bounds.
  std::vector<double> safe_action;
  /// Only the answer to a tick's own observation is fresh; else any that is new and young enough.
  bool waits = true;
  /// A function of the user's gives the fallback's actions; else each element goes to its rest.
  bool has_fallback = false;
  /// How far outside an answer may be and still be used, cut to the bounds: a share of the range.
  double bounds_tolerance = 0.1;
  /// Largest change of a command; empty for no limit.
  std::vector<double> slew_per_s;
  /// Largest change of that change; empty for no limit.
  std::vector<double> acceleration_per_s2;
  /// Longest time from an observation to the use of its answer.
  std::int64_t max_age_ns = 0;
  /// Misses in a row that are bridged by holding.
  std::int64_t hold_ticks = 0;
  /// Misses in a row that stop the robot.
  std::int64_t stop_ticks = 0;
  /// Good answers in a row that end the fallback, or allow a rearm.
  std::int64_t recovery_ticks = 0;
  std::int64_t velocity_decay_ns = 100'000'000;
  std::int64_t torque_hold_ns = 20'000'000;
  /// How long a stop takes; 0 stops within one tick.
  std::int64_t stop_ns = 100'000'000;
  OnWarning on_warning = OnWarning::kFlag;
  /// Answers in a row whose warning counts under `OnWarning::kFallback`.
  std::int64_t warning_ticks = 3;
  /// Identical observations in a row that are flagged; 0 for never.
  std::int64_t frozen_ticks = 10;
  /// Ticks over which the policy takes over again; 0 for at once.
  std::int64_t blend_ticks = 5;
  /// Use the answers of the first bundle only.
  bool pins_bundle = false;

  std::size_t width() const { return kinds.size(); }

  /// Throws std::invalid_argument where a field is out of range or contradicts another one; names it.
  void check() const;
};

/// 5 ticks, but not above 100 ms.
std::int64_t default_hold_ticks(std::int64_t period_ns);
/// 20 ticks, but not above 500 ms, and more than are held.
std::int64_t default_stop_ticks(std::int64_t period_ns, std::int64_t hold_ticks);
/// 5 ticks, and at least 50 ms.
std::int64_t default_recovery_ticks(std::int64_t period_ns);

}  // namespace lom_client
