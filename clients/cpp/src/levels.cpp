#include "lom_client/levels.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace lom_client {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr std::size_t kBreaches = 3;

constexpr std::string_view kBadShape = "BAD_SHAPE";
constexpr std::string_view kContractMismatch = "CONTRACT_MISMATCH";
constexpr std::string_view kNonFiniteAction = "NON_FINITE_ACTION";
constexpr std::string_view kActionOutOfBounds = "ACTION_OUT_OF_BOUNDS";

std::string_view identity_fault(const LoopState& state, const Reply& reply) {
  if (reply.generation != state.generation) {
    return "WRONG_GENERATION";
  }
  if (reply.sequence > state.sequence + 1 || reply.observed_ns > state.now_ns) {
    return "WRONG_SEQUENCE";
  }
  if (reply.sequence == state.judged) {
    return "DUPLICATE";
  }
  return reply.sequence < state.judged ? "REORDERED" : "";
}

bool is_finite(Span<const double> values) {
  return std::all_of(values.begin(), values.end(), [](double value) { return std::isfinite(value); });
}

double as_double(std::int64_t number) { return static_cast<double>(number); }

}  // namespace

std::string_view name_of(Level level) {
  constexpr std::string_view kNames[] = {"nominal", "degraded", "fallback", "safe_stop"};
  return kNames[static_cast<int>(level)];
}

std::string_view name_of(Source source) {
  constexpr std::string_view kNames[] = {"fresh", "hold", "fallback", "safe_stop"};
  return kNames[static_cast<int>(source)];
}

Levels::Levels(LevelRules rules) : rules_(std::move(rules)) {
  rules_.check();
  const std::size_t width = rules_.width();
  const double period_s = as_double(rules_.period_ns) / 1e9;
  for (std::size_t i = 0; i < width; ++i) {
    const double range = rules_.high[i] - rules_.low[i];
    tolerance_.push_back(std::isfinite(range) ? rules_.bounds_tolerance * range : 0.0);
    max_step_.push_back(rules_.slew_per_s.empty() ? kInfinity : rules_.slew_per_s[i] * period_s);
    max_step_change_.push_back(
        rules_.acceleration_per_s2.empty() ? kInfinity : rules_.acceleration_per_s2[i] * period_s * period_s);
  }
}

LoopState Levels::begin(const Hash& contract_hash) const {
  LoopState state;
  state.contract_hash = contract_hash;
  for (auto* values : {&state.waiting_action, &state.command, &state.step, &state.held, &state.blend_from,
                       &state.stop_from, &state.stop_step, &state.target}) {
    values->assign(rules_.width(), 0.0);
  }
  return state;
}

Output Levels::advance(LoopState& state, const Event& event, std::int64_t now_ns) const noexcept {
  state.now_ns = std::max(now_ns, state.now_ns);
  return std::visit([&](const auto& what) { return on(what, state); }, event);
}

std::string_view Levels::may_rearm(const LoopState& state) const noexcept {
  if (state.level != Level::kSafeStop) {
    return "NOT_STOPPED";
  }
  return state.good >= rules_.recovery_ticks ? "" : "NOT_HEALTHY";
}

Output Levels::on(const Reply& reply, LoopState& state) const noexcept {
  std::string_view reason = identity_fault(state, reply);
  if (!reason.empty()) {
    state.explanation = reason;
    return Rejected{reason};
  }
  state.judged = reply.sequence;
  reason = content_fault(state, reply);
  if (reason.empty()) {
    state.has_waiting = true;
    state.waiting = reply;
    std::copy(reply.action.begin(), reply.action.end(), state.waiting_action.begin());
    state.waiting.action = {};
    if (state.contract_hash.empty()) {
      state.contract_hash = reply.contract_hash;
    }
    return {};
  }
  state.explanation = reason;
  if (reason == kContractMismatch) {
    state.demotion = reason;
  } else if (reason == kNonFiniteAction || reason == kActionOutOfBounds) {
    if (state.num_breaches == kBreaches) {
      std::rotate(state.breaches_ns.begin(), state.breaches_ns.begin() + 1, state.breaches_ns.end());
      --state.num_breaches;
    }
    state.breaches_ns[state.num_breaches++] = state.now_ns;
    if (state.num_breaches == kBreaches && state.now_ns - state.breaches_ns[0] <= kNsPerS) {
      state.demotion = reason;
      state.num_breaches = 0;
    }
  }
  return Rejected{reason};
}

std::string_view Levels::content_fault(const LoopState& state, const Reply& reply) const noexcept {
  if (rules_.waits && reply.sequence != state.sequence + 1) {
    return "LATE";
  }
  if (!state.contract_hash.empty() && reply.contract_hash != state.contract_hash) {
    return kContractMismatch;
  }
  if (reply.action.size() != rules_.width()) {
    return kBadShape;
  }
  if (!is_finite(reply.action)) {
    return kNonFiniteAction;
  }
  for (std::size_t i = 0; i < rules_.width(); ++i) {
    const double value = reply.action[i];
    if (value < rules_.low[i] - tolerance_[i] || value > rules_.high[i] + tolerance_[i]) {
      return kActionOutOfBounds;
    }
  }
  if (rules_.pins_bundle && !state.bundle_digest.empty() && reply.bundle_digest != state.bundle_digest) {
    return "WRONG_BUNDLE";
  }
  return "";
}

Output Levels::on(const Refusal& refusal, LoopState& state) const noexcept {
  if (refusal.generation != state.generation) {
    state.explanation = "WRONG_GENERATION";
    return Rejected{state.explanation};
  }
  state.explanation = refusal.reason;
  if (refusal.reason.view() == kContractMismatch) {
    state.demotion = refusal.reason;
  }
  return {};
}

Output Levels::on(const Switch& to, LoopState& state) const noexcept {
  state.generation = to.generation;
  if (state.level == Level::kNominal) {
    state.level = Level::kDegraded;
  }
  state.has_waiting = false;
  state.judged = 0;
  state.contract_hash = {};
  state.bundle_digest = {};
  state.explanation = {};
  state.demotion = {};
  state.num_breaches = 0;
  state.misses = 0;
  state.good = 0;
  state.warnings = 0;
  state.blends = true;
  if (!to.keeps_command) {
    state.is_commanded = false;
    state.is_stopping = false;
  }
  return {};
}

Output Levels::on(const Stop& stop, LoopState& state) const noexcept {
  state.level = Level::kSafeStop;
  state.explanation = stop.reason;
  state.demotion = stop.reason;
  return {};
}

Output Levels::on(const Rearm&, LoopState& state) const noexcept {
  const std::string_view refused = may_rearm(state);
  if (!refused.empty()) {
    return Rejected{refused};
  }
  state.level = Level::kDegraded;
  state.misses = 0;
  state.good = 0;
  state.num_breaches = 0;
  state.demotion = {};
  state.seeds = true;
  state.blends = true;
  state.is_stopping = false;
  return {};
}

Output Levels::on(const Tick& tick, LoopState& state) const noexcept {
  seed(state, tick.measured);
  ++state.sequence;
  unsigned flags = 0;
  state.repeats = tick.repeats ? state.repeats + 1 : 0;
  if (rules_.frozen_ticks != 0 && state.repeats + 1 >= rules_.frozen_ticks) {
    flags |= kObservationFrozen;
  }

  Reason miss;
  if (!tick.fault.empty()) {
    miss = tick.fault;
  } else if (!state.has_waiting) {
    miss = state.explanation.empty() ? Reason("DEADLINE_EXCEEDED") : state.explanation;
  } else if (state.now_ns - state.waiting.observed_ns > rules_.max_age_ns) {
    miss = "STALE";
  }
  const bool is_fresh = miss.empty();
  const Reply& reply = state.waiting;
  state.misses = is_fresh ? 0 : state.misses + 1;
  if (state.misses == 1) {
    state.first_miss_ns = state.now_ns;
  }
  const bool is_other_bundle =
      is_fresh && !state.bundle_digest.empty() && state.bundle_digest != reply.bundle_digest;
  if (is_other_bundle) {
    flags |= kBundleChanged;
  }

  const bool warns = is_fresh && reply.warns && rules_.on_warning != OnWarning::kIgnore;
  if (is_fresh) {
    state.warnings = warns ? state.warnings + 1 : 0;
  }
  if (warns) {
    flags |= kOutOfDistribution;
  }
  const bool heeds = rules_.on_warning == OnWarning::kFallback;
  const bool is_refused = is_fresh && heeds && state.warnings >= rules_.warning_ticks;
  state.good = is_fresh && !(warns && heeds) && state.demotion.empty() ? state.good + 1 : 0;

  Level level = level_after(state, is_fresh, is_refused);
  Reason reason;
  if (level != Level::kNominal) {
    if (!state.demotion.empty()) {
      reason = state.demotion;
    } else if (!miss.empty()) {
      reason = miss;
    } else {
      reason = is_refused ? "OUT_OF_DISTRIBUTION" : level == Level::kFallback ? "RECOVERING" : "STOPPED";
    }
  }

  bool has_target = false;
  if (level == Level::kFallback && rules_.has_fallback) {
    has_target = ask_fallback(state, tick.fallback);
    if (!has_target) {
      level = Level::kSafeStop;
      reason = "FALLBACK_INVALID";
    }
  }

  const bool acts = level == Level::kNominal;
  if (acts) {
    flags |= aim_at_action(state, is_other_bundle);
    state.rests = false;
  } else {
    state.is_blending = false;
    if (level == Level::kSafeStop) {
      aim_at_stop(state);
    } else if (has_target) {
      state.rests = false;
    } else {
      aim_at_rest(state, level);
      state.rests = true;
    }
  }
  if (limit(state)) {
    flags |= kSlewLimited;
  }

  state.level = level;
  if (is_fresh) {
    state.bundle_digest = reply.bundle_digest;
  }
  if (acts) {
    state.has_acted = true;
    state.held = state.command;
    state.held_ns = state.now_ns;
    state.acted_on_ns = reply.observed_ns;
    state.blends = false;
    state.acting = reply;
  }
  state.has_waiting = false;
  state.explanation = {};
  state.demotion = {};

  Command command;
  command.sequence = state.sequence;
  command.level = level;
  command.source = static_cast<Source>(level);
  command.values = state.command;
  command.reason = reason;
  command.flags = flags;
  if (state.acted_on_ns && (acts || level == Level::kDegraded)) {
    command.age_ns = state.now_ns - *state.acted_on_ns;
  }
  command.reply = acts ? &state.acting : nullptr;
  return command;
}

void Levels::seed(LoopState& state, Span<const double> measured) const noexcept {
  const bool is_due = !state.is_commanded || (state.seeds && !measured.empty());
  state.seeds = false;
  if (!is_due) {
    return;
  }
  if (!state.is_commanded) {
    state.command = rules_.safe_action;
    state.is_commanded = true;
  }
  if (measured.size() == rules_.width()) {
    for (std::size_t i = 0; i < rules_.width(); ++i) {
      if (std::isfinite(measured[i])) {
        state.command[i] = within(measured[i], i);
      }
    }
  }
  std::fill(state.step.begin(), state.step.end(), 0.0);
  state.held = state.command;
  state.held_ns = state.now_ns;
}

Level Levels::level_after(const LoopState& state, bool is_fresh, bool is_refused) const noexcept {
  const auto is_overdue = [&](std::int64_t ticks) {
    return state.misses > 0 && 2 * (state.now_ns - state.first_miss_ns) >= (2 * ticks - 1) * rules_.period_ns;
  };
  if (state.level == Level::kSafeStop) {
    return Level::kSafeStop;
  }
  if (state.has_acted && (state.misses >= rules_.stop_ticks || is_overdue(rules_.stop_ticks))) {
    return Level::kSafeStop;
  }
  if (!state.demotion.empty() || is_refused || state.misses > rules_.hold_ticks ||
      is_overdue(rules_.hold_ticks + 1)) {
    return Level::kFallback;
  }
  if (state.level == Level::kFallback && state.good < rules_.recovery_ticks) {
    return Level::kFallback;
  }
  return is_fresh ? Level::kNominal : Level::kDegraded;
}

bool Levels::ask_fallback(LoopState& state, Fallback* fallback) const noexcept {
  if (fallback == nullptr || !fallback->answer(state.command, state.target) || !is_finite(state.target)) {
    return false;
  }
  for (std::size_t i = 0; i < rules_.width(); ++i) {
    if (state.target[i] < rules_.low[i] || state.target[i] > rules_.high[i]) {
      return false;
    }
  }
  return true;
}

unsigned Levels::aim_at_action(LoopState& state, bool is_other_bundle) const noexcept {
  unsigned flags = 0;
  for (std::size_t i = 0; i < rules_.width(); ++i) {
    state.target[i] = within(state.waiting_action[i], i);
    if (state.target[i] != state.waiting_action[i]) {
      flags |= kClamped;
    }
  }
  const bool begins = state.blends || is_other_bundle || state.level == Level::kFallback;
  if (begins && rules_.blend_ticks != 0) {
    state.is_blending = true;
    state.blend_tick = 0;
    state.blend_from = state.command;
  }
  if (!state.is_blending) {
    return flags;
  }
  ++state.blend_tick;
  if (state.blend_tick >= rules_.blend_ticks) {
    state.is_blending = false;
    return flags;
  }
  const double share = as_double(state.blend_tick) / as_double(rules_.blend_ticks);
  for (std::size_t i = 0; i < rules_.width(); ++i) {
    const double from = state.blend_from[i];
    state.target[i] = from + (state.target[i] - from) * share;
  }
  return flags | kBlended;
}

void Levels::aim_at_rest(LoopState& state, Level level) const noexcept {
  const bool holds_torque = level == Level::kDegraded &&
                            2 * (state.now_ns - state.held_ns) + rules_.period_ns <= 2 * rules_.torque_hold_ns;
  const double left = velocity_left(state);
  for (std::size_t i = 0; i < rules_.width(); ++i) {
    switch (rules_.kinds[i]) {
      case Kind::kPosition:
        state.target[i] = state.command[i];
        break;
      case Kind::kVelocity:
        state.target[i] = state.held[i] * left;
        break;
      case Kind::kTorque:
        state.target[i] = holds_torque ? state.held[i] : rules_.safe_action[i];
        break;
    }
  }
}

void Levels::aim_at_stop(LoopState& state) const noexcept {
  if (!state.is_stopping) {
    state.is_stopping = true;
    state.stop_since_ns = state.now_ns;
    state.stop_from = state.command;
    state.stop_step = state.step;
  }
  double left = 0.0;
  if (rules_.stop_ns != 0) {
    const std::int64_t left_ns = rules_.stop_ns - (state.now_ns - state.stop_since_ns + rules_.period_ns);
    left = as_double(std::max<std::int64_t>(0, left_ns)) / as_double(rules_.stop_ns);
  }
  const double velocity = velocity_left(state);
  for (std::size_t i = 0; i < rules_.width(); ++i) {
    const double safe = rules_.safe_action[i];
    switch (rules_.kinds[i]) {
      case Kind::kPosition:
        state.target[i] = state.command[i] + left * state.stop_step[i];
        break;
      case Kind::kVelocity:
        state.target[i] = state.rests ? state.held[i] * velocity : left * state.stop_from[i];
        break;
      case Kind::kTorque:
        state.target[i] = safe + (state.stop_from[i] - safe) * left;
        break;
    }
  }
}

double Levels::velocity_left(const LoopState& state) const noexcept {
  const std::int64_t left_ns = rules_.velocity_decay_ns - (state.now_ns - state.held_ns);
  return as_double(std::max<std::int64_t>(0, left_ns)) / as_double(rules_.velocity_decay_ns);
}

bool Levels::limit(LoopState& state) const noexcept {
  bool is_limited = false;
  for (std::size_t i = 0; i < rules_.width(); ++i) {
    const double before = state.command[i];
    const double distance = state.target[i] - before;
    const double max_change = max_step_change_[i];
    const double size = std::min(std::abs(distance), max_step_[i]);
    double step = std::copysign(size, distance);
    if (max_change != kInfinity) {
      const double steps_left = std::floor((std::sqrt(1.0 + 8.0 * std::abs(distance) / max_change) - 1.0) / 2.0);
      const double braking = std::abs(distance) / (steps_left + 1.0) + max_change * steps_left / 2.0;
      const double last = state.step[i];
      step = std::min(std::max(std::copysign(std::min(size, braking), distance), last - max_change),
                      last + max_change);
    }
    const double after = within(step == distance ? state.target[i] : before + step, i);
    state.command[i] = after;
    state.step[i] = after - before;
    is_limited = is_limited || after != state.target[i];
  }
  return is_limited;
}

double Levels::within(double value, std::size_t index) const noexcept {
  return std::min(std::max(value, rules_.low[index]), rules_.high[index]);
}

}  // namespace lom_client
