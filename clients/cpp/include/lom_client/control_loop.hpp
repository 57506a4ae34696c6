#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "lom_client/levels.hpp"
#include "lom_client/loop_config.hpp"
#include "lom_client/policy_client.hpp"

namespace lom_client {

/// The output of one tick.
struct LoopAction {
  /// Finite and inside the bounds.
  std::vector<float> values;
  Source source = Source::kHold;
  Level level = Level::kDegraded;
  /// Time since the observation that the values go back to; none where they go back to none.
  std::optional<double> age_s;
  /// Why the policy does not act; empty when it does.
  Reason reason;
  /// More of the reason, for a person; may be empty.
  Detail detail;
  /// Bits of `Flag`: what else there is to know.
  unsigned flags = 0;
  /// Count of this tick, from 1.
  std::int64_t tick = 0;
  /// The component that acts; none where the variant chooses none, and without the policy.
  std::optional<std::int32_t> mode;
  /// The policy's; 0 without the policy.
  std::uint32_t version = 0;
  /// Of the bundle that acts; empty without the policy.
  Hash bundle_digest;
};

/// A tick is of another level than the one before, for `reason`; empty where the policy acts again.
struct LevelChanged {
  std::int64_t tick = 0;
  Level before = Level::kDegraded;
  Level after = Level::kDegraded;
  Reason reason;
};

/// From this tick on another bundle answers.
struct BundleChanged {
  std::int64_t tick = 0;
  Hash bundle_digest;
  std::uint32_t version = 0;
};

/// At this tick the answers' scores begin to warn.
struct OutOfDistribution {
  std::int64_t tick = 0;
};

/// Nobody has called `step` since this tick, for so many seconds.
struct LoopStalled {
  std::int64_t tick = 0;
  double stalled_s = 0.0;
};

using LoopEvent = std::variant<LevelChanged, BundleChanged, OutOfDistribution, LoopStalled>;

/// A snapshot of what happened since the loop began. The numbers of `sources` add up to `ticks`, those of `misses` to the
/// ticks whose source is not `kFresh`.
struct LoopCounters {
  std::int64_t ticks = 0;
  std::map<Source, std::int64_t> sources;
  /// Ticks without the policy's action, by reason; `OTHER` stands for the reasons beyond the first hundred.
  std::map<std::string, std::int64_t> misses;
  /// Answers that were not used, and rearms that were refused, by reason.
  std::map<std::string, std::int64_t> rejected;
  std::map<std::pair<Level, Level>, std::int64_t> transitions;
  /// Fresh commands by the age of their observation: at most the key's milliseconds, and above half of it.
  std::map<double, std::int64_t> ages_ms;
  std::int64_t longest_miss_run = 0;
  /// Events that were not told, because the hook took too long over those before.
  std::int64_t events_lost = 0;

  std::int64_t fresh() const;
  /// Share of the ticks that the policy's action was put out; 0 before the first tick.
  double fresh_share() const;
};

/// Turns one observation per tick into one action per tick: in time, finite, inside the bounds and the limits.
///
/// Each tick leaves its observation for the thread that asks, takes what was answered, and goes down as far as it must: the
/// policy's action, what was commanded before as long as its kind allows, the fallback, a stop that only `rearm` ends. At
/// most one request is under way; none is repeated.
///
/// This library is not a certified safety function: the robot's own limits and its emergency stop stay in force.
///
/// Threads: `step` belongs to one control thread, which does no I/O, takes no lock, and allocates nothing where the
/// observation has at most 4096 numbers; slots for longer ones grow once. Everything else may be called from any other thread. `step` in a process that was forked off stops: its reason is
/// `FORKED`.
class ControlLoop {
 public:
  /// Everything that can be wrong with the configuration is found here; `step` never throws.
  ///
  /// `on_event` is told, in a thread of its own, when the level, the bundle or the distribution changes, and when `step`
  /// was not called for five periods. The client may be shared, and is not closed with the loop.
  ///
  /// Throws std::invalid_argument where the configuration does not go with the bounds, or the fallback fails its trial;
  /// std::runtime_error where the bounds were asked of the server, and it did not give them.
  ControlLoop(const PolicyClient& client, LoopConfig config, std::function<void(const LoopEvent&)> on_event = {});
  ~ControlLoop();
  ControlLoop(const ControlLoop&) = delete;
  ControlLoop& operator=(const ControlLoop&) = delete;

  /// The action of this tick, after at most `LoopConfig::deadline_s`; valid until the next step.
  ///
  /// `observation` is one row of the policy's only input. `measured` is what the robot really does, in units of the
  /// action, NaN where it is not measured: taken for the command so far before the first one, and after `rearm`.
  const LoopAction& step(Span<const float> observation, Span<const double> measured = {}) noexcept;

  /// As above, of a policy with inputs by name, at most 16, names of at most 64 characters.
  const LoopAction& step(Span<const Input> inputs, Span<const double> measured = {}) noexcept;

  /// From the next step on, another policy acts, or by another configuration (variant, kinds, limits, ...). Answers to
  /// earlier questions are dropped. Where the kinds change, nothing that was commanded is held: give the next step
  /// `measured`. A configuration without bounds leaves the bounds as they are.
  ///
  /// Throws std::invalid_argument where the configuration has another period or another number of elements, does not go
  /// with the bounds, or its fallback fails.
  void switch_to(const PolicyClient& client, LoopConfig config);

  /// SAFE_STOP, from the next step on, until `rearm`.
  void operator_stop() noexcept;

  /// Ends SAFE_STOP with the next step. For an operator, never for a program. Returns why not: `NOT_STOPPED`, or
  /// `NOT_HEALTHY` while there are not several good answers in a row. Empty where it does.
  std::string_view rearm() noexcept;

  Level level() const noexcept;
  LoopCounters counters() const;

  /// Ends the asking, within 0.2 s; every later `step` is a miss. May be called twice.
  void close();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lom_client
