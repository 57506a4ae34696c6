#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <variant>
#include <vector>

#include "lom_client/level_rules.hpp"
#include "lom_client/span.hpp"
#include "lom_client/text.hpp"

/// What the robot is told each tick: a pure function of rules, state, event and time. No clock, no I/O, no threads, and
/// no allocation once a state exists.
///
/// The specification is the docstring of the Python client's `lom_client/levels.py`; `clients/traces/levels.jsonl` proves
/// that both give the same bits.
namespace lom_client {

/// How much of the policy is left.
enum class Level { kNominal, kDegraded, kFallback, kSafeStop };

/// Where a command comes from.
enum class Source {
  kFresh,     ///< The policy's answer to this observation, or to the newest one that is answered.
  kHold,      ///< What was commanded last, as long as its kind allows.
  kFallback,  ///< The user's function, or each element's rest.
  kSafeStop,  ///< The way to a standstill, and the standstill.
};

/// What else there is to know about a command: bits of `Command::flags`.
enum Flag : unsigned {
  kClamped = 1,             ///< The policy's action was outside the bounds, within the tolerance.
  kSlewLimited = 2,         ///< The command is on its way to what was meant.
  kBlended = 4,             ///< The policy takes over from another command.
  kObservationFrozen = 8,   ///< The observation has not changed for a while.
  kOutOfDistribution = 16,  ///< A score of the answer warns.
  kBundleChanged = 32,      ///< Another bundle answers than before.
};

std::string_view name_of(Level level);
std::string_view name_of(Source source);

/// The policy answered the observation of tick `sequence`. `mode` is -1 where the variant chooses none.
struct Reply {
  std::int64_t sequence = 0;
  std::int64_t observed_ns = 0;
  std::int64_t generation = 0;
  Span<const double> action;
  Hash bundle_digest;
  Hash contract_hash;
  bool warns = false;
  std::uint32_t version = 0;
  std::int32_t mode = -1;
};

/// The observation of tick `sequence` has no answer.
struct Refusal {
  std::int64_t sequence = 0;
  std::int64_t generation = 0;
  Reason reason;
};

/// The user's fallback: of the command before it makes an answer of as many numbers. False where it fails.
class Fallback {
 public:
  virtual ~Fallback() = default;
  virtual bool answer(Span<const double> command, Span<double> answer) = 0;
};

/// A command is due.
struct Tick {
  /// Why there is no observation; empty where there is one.
  Reason fault;
  /// The observation is identical to the one before.
  bool repeats = false;
  /// What the robot really does, in units of the action; NaN where an element is not measured, empty where none is.
  Span<const double> measured;
  Fallback* fallback = nullptr;
};

/// From now on another policy, variant or meaning of the action is in force.
struct Switch {
  std::int64_t generation = 0;
  bool keeps_command = true;
};

/// Stop now, for `reason`.
struct Stop {
  Reason reason;
};

/// An operator allows the robot to move again.
struct Rearm {};

using Event = std::variant<Tick, Reply, Refusal, Switch, Stop, Rearm>;

/// The output of a tick. `values` and `reply` belong to the state, until its next event; `reply` is the answer that acts,
/// under NOMINAL, else null.
struct Command {
  std::int64_t sequence = 0;
  Level level = Level::kDegraded;
  Source source = Source::kHold;
  Span<const double> values;
  Reason reason;
  unsigned flags = 0;
  std::optional<std::int64_t> age_ns;
  const Reply* reply = nullptr;
};

/// The output of an event that changes nothing that moves.
struct Rejected {
  Reason reason;
};

using Output = std::variant<std::monostate, Command, Rejected>;

/// What one event leaves to the next; the words are those of the specification. Made by `Levels::begin`.
struct LoopState {
  std::int64_t now_ns = 0;
  Level level = Level::kDegraded;
  std::int64_t sequence = 0;
  std::int64_t generation = 0;
  Hash contract_hash;
  Hash bundle_digest;
  bool has_acted = false;

  bool has_waiting = false;
  Reply waiting;  ///< Its action is `waiting_action`.
  std::vector<double> waiting_action;
  Reply acting;  ///< Its action is not kept.
  std::int64_t judged = 0;
  Reason explanation;
  Reason demotion;
  std::array<std::int64_t, 3> breaches_ns{};
  std::size_t num_breaches = 0;

  std::int64_t misses = 0;
  std::int64_t first_miss_ns = 0;
  std::int64_t good = 0;
  std::int64_t warnings = 0;
  std::int64_t repeats = 0;

  bool is_commanded = false;
  std::vector<double> command;
  std::vector<double> step;
  bool seeds = false;
  std::vector<double> held;
  std::int64_t held_ns = 0;
  std::optional<std::int64_t> acted_on_ns;  ///< Time of the observation whose action is held.

  bool blends = false;
  bool is_blending = false;
  std::vector<double> blend_from;
  std::int64_t blend_tick = 0;

  bool rests = false;  ///< The last target outside SAFE_STOP was a rest's.
  bool is_stopping = false;
  std::int64_t stop_since_ns = 0;
  std::vector<double> stop_from;
  std::vector<double> stop_step;

  std::vector<double> target;  ///< Of the tick at hand.
};

/// Rules that were checked, and what follows from them.
class Levels {
 public:
  /// Throws std::invalid_argument as `LevelRules::check`.
  explicit Levels(LevelRules rules);

  const LevelRules& rules() const { return rules_; }

  /// The state before the first event.
  LoopState begin(const Hash& contract_hash = {}) const;

  /// What `event` makes of `state`, which must have been begun by rules of the same width. A tick gives a command; a
  /// rejected event says why; anything else gives nothing.
  Output advance(LoopState& state, const Event& event, std::int64_t now_ns) const noexcept;

  /// Why a rearm would be rejected; empty where it would not.
  std::string_view may_rearm(const LoopState& state) const noexcept;

 private:
  Output on(const Reply& reply, LoopState& state) const noexcept;
  Output on(const Refusal& refusal, LoopState& state) const noexcept;
  Output on(const Switch& to, LoopState& state) const noexcept;
  Output on(const Stop& stop, LoopState& state) const noexcept;
  Output on(const Rearm& rearm, LoopState& state) const noexcept;
  Output on(const Tick& tick, LoopState& state) const noexcept;

  std::string_view content_fault(const LoopState& state, const Reply& reply) const noexcept;
  void seed(LoopState& state, Span<const double> measured) const noexcept;
  Level level_after(const LoopState& state, bool is_fresh, bool is_refused) const noexcept;
  bool ask_fallback(LoopState& state, Fallback* fallback) const noexcept;
  unsigned aim_at_action(LoopState& state, bool is_other_bundle) const noexcept;
  void aim_at_rest(LoopState& state, Level level) const noexcept;
  void aim_at_stop(LoopState& state) const noexcept;
  double velocity_left(const LoopState& state) const noexcept;
  bool limit(LoopState& state) const noexcept;
  double within(double value, std::size_t index) const noexcept;

  LevelRules rules_;
  std::vector<double> tolerance_;
  std::vector<double> max_step_;
  std::vector<double> max_step_change_;
};

}  // namespace lom_client
