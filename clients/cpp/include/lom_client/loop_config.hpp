#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "lom_client/level_rules.hpp"
#include "lom_client/span.hpp"

namespace lom_client {

/// Of the command before and of what was measured (empty where the loop is not told), as many numbers as an action has.
/// False where there is no answer.
using FallbackFunction =
    std::function<bool(Span<const double> command, Span<const double> measured, Span<double> answer)>;

/// Lower and upper bound of each element of an action.
struct Bounds {
  std::vector<double> low;
  std::vector<double> high;
};

/// What each element of an action is, what may be put out, and when the loop gives up on the policy.
///
/// One number in a vector stands for every element. What each level puts out, to the bit, is the specification of
/// `lom_client/levels.hpp`.
struct LoopConfig {
  /// From tick to tick, above 0 and at most 3600.
  double period_s = 0.0;
  /// For all elements or for each: what may be held, and for how long, when no answer comes. There is no default: the wrong
  /// one moves a robot.
  std::vector<Kind> kinds;
  /// What is put out before anything is known, and what torques return to. Inside the bounds.
  std::vector<double> safe_action;
  /// None asks the server when the loop is made; give them to start before the server.
  std::optional<Bounds> action_bounds;
  /// An answer that is outside by at most this share of the range is cut to the bounds; beyond, it is a miss.
  double bounds_tolerance = 0.1;
  /// Largest change of the command per second, whatever it comes from. Empty: no limit.
  std::vector<double> slew_per_s;
  /// Largest change of that change. Empty: no limit.
  std::vector<double> acceleration_per_s2;
  /// Longest wait of a step for the answer to its own observation; none for 80 % of the period. 0 does not wait: a step
  /// takes the newest answer there is, usually that to the observation before.
  std::optional<double> deadline_s;
  /// Longest time from an observation to the use of its answer; none for two periods.
  std::optional<double> max_age_s;
  /// Misses in a row that are bridged by holding; none for 5, but not above 100 ms.
  std::optional<std::int64_t> hold_limit;
  /// Misses in a row that stop the robot; none for 20, but not above 500 ms.
  std::optional<std::int64_t> stop_limit;
  /// Good answers in a row that end the fallback or allow a rearm; none for 5, and at least 50 ms.
  std::optional<std::int64_t> recovery_ticks;
  /// A held velocity is zero after this time; at most 0.1.
  double velocity_decay_s = 0.1;
  /// A torque is held for this time; at most 0.02.
  double torque_hold_s = 0.02;
  /// How long a stop takes; 0 for at once.
  double stop_s = 0.1;
  /// Acts under FALLBACK. A pure function that answers within 200 µs and allocates nothing; it is tried when the loop is
  /// made, and stops the robot where it fails later. None: positions stay, velocities go to zero, torques to the safe
  /// action.
  FallbackFunction fallback;
  /// What becomes of answers whose scores warn.
  OnWarning on_warning = OnWarning::kFlag;
  /// Identical observations in a row that are flagged; 0 for never.
  std::int64_t frozen_ticks = 10;
  /// Ticks over which the policy takes over again, from a fallback or another bundle; 0 for at once.
  std::int64_t blend_ticks = 5;
  /// Refuse every bundle but the first one that answers.
  bool pins_bundle = false;
  /// As for `PolicyClient::act`; empty for the policy's default.
  std::string variant;
  /// As for `PolicyClient::act`, with the mode that acted last as the previous one; 0 for none.
  float hysteresis_width = 0.0f;
  /// Longest wait for the bounds, where the server is asked for them.
  double connect_deadline_s = 5.0;

  /// The deadline in nanoseconds, none resolved.
  std::int64_t wait_ns() const;

  /// What the levels go by, for a robot with these bounds. Throws std::invalid_argument where a field is out of range,
  /// contradicts another one, or does not go with the bounds; names it.
  LevelRules rules(const Bounds& bounds) const;
};

}  // namespace lom_client
