#include "lom_client/control_loop.hpp"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>
#include <utility>

#include "bell.hpp"
#include "clock.hpp"
#include "connection.hpp"
#include "event_reporter.hpp"
#include "guarded_fallback.hpp"
#include "loop_tally.hpp"
#include "newest.hpp"
#include "throttle.hpp"

namespace lom_client {
namespace {

constexpr std::int64_t kStalledPeriods = 5;
constexpr std::int64_t kLookAroundNs = 100'000'000;
constexpr std::size_t kMostInputs = 16;
constexpr std::size_t kLongestName = 64;
constexpr std::size_t kUsualNumbers = 4096;
constexpr std::size_t kMostNumbers = 1024 * 1024;

double seconds(std::int64_t ns) { return static_cast<double>(ns) * 1e-9; }

/// What a generation of questions and answers goes by.
struct Regime {
  Regime(std::int64_t number, LoopConfig from, const Bounds& bounds, std::shared_ptr<Connection> to)
      : generation(number), config(std::move(from)), levels(config.rules(bounds)), connection(std::move(to)) {
    if (config.fallback) {
      fallback = std::make_unique<GuardedFallback>(config.fallback, levels.rules());
    }
    wait_ns = config.wait_ns();
    budget_ns = wait_ns != 0 ? wait_ns : levels.rules().max_age_ns;
  }

  std::int64_t generation;
  LoopConfig config;
  Levels levels;
  std::unique_ptr<GuardedFallback> fallback;
  std::shared_ptr<Connection> connection;
  std::int64_t wait_ns;
  /// How long an answer is worth waiting for, from its observation.
  std::int64_t budget_ns;
};

/// The observation of tick `sequence`, to be answered until `over_ns`.
struct Question {
  std::int64_t sequence = 0;
  std::int64_t observed_ns = 0;
  std::int64_t over_ns = 0;
  const Regime* regime = nullptr;
  std::int32_t previous_mode = -1;
  std::size_t num_inputs = 0;
  std::array<Text<kLongestName>, kMostInputs> names;
  std::array<std::size_t, kMostInputs> sizes{};
  std::vector<float> values;
};

/// A reply with the numbers that it points to.
struct Answer {
  Reply reply;
  std::vector<double> action;
};

struct Explained {
  Refusal refusal;
  Detail detail;
};

}  // namespace

class ControlLoop::Impl {
 public:
  Impl(std::shared_ptr<Connection> connection, LoopConfig config, std::function<void(const LoopEvent&)> on_event) {
    Hash contract_hash;
    Bounds bounds;
    if (config.action_bounds) {
      bounds = *config.action_bounds;
    } else {
      config.rules({{-INFINITY}, {INFINITY}});  // finds whatever is wrong with any bounds
      const auto spec =
          connection->get_spec(now_ns() + std::llround(config.connect_deadline_s * 1e9), &calls_);
      if (!spec) {
        throw std::runtime_error("the server did not give the bounds of the action: " + spec.error().reason + ": " +
                                 spec.error().detail);
      }
      bounds.low.assign(spec->action.low.begin(), spec->action.low.end());
      bounds.high.assign(spec->action.high.begin(), spec->action.high.end());
      contract_hash = spec->contract_hash;
    }
    regimes_.push_back(std::make_unique<Regime>(0, std::move(config), bounds, std::move(connection)));
    regime_ = regimes_.back().get();
    state_ = regime_->levels.begin(contract_hash);
    action_.values.resize(regime_->levels.rules().width());
    questions_.prepare_each([](Question& question) { question.values.reserve(kUsualNumbers); });
    observation_.reserve(kUsualNumbers);
    if (on_event) {
      reporter_ = std::make_unique<EventReporter>(std::move(on_event),
                                                  kStalledPeriods * regime_->levels.rules().period_ns);
    }
    thread_ = std::thread([this] { answer_questions(); });
  }

  ~Impl() { close(); }

  const LoopAction& step(Span<const Input> inputs, Span<const double> measured) noexcept {
    const std::int64_t observed_ns = now_ns();
    grant_wishes();
    const std::int64_t sequence = state_.sequence + 1;
    bool repeats = false;
    Reason fault = own_fault();
    if (fault.empty()) {
      fault = ask(inputs, sequence, observed_ns, repeats);
      take_outcomes(sequence, fault.empty() ? observed_ns + regime_->wait_ns : observed_ns);
    }
    return tick(fault, repeats, measured);
  }

  void switch_to(std::shared_ptr<Connection> connection, LoopConfig config) {
    const std::lock_guard lock(switching_);
    const Regime& before = *regimes_.back();
    const LevelRules& rules = before.levels.rules();
    if (config.period_s != before.config.period_s) {
      throw std::invalid_argument("period_s must stay " + std::to_string(before.config.period_s) + ", got " +
                                  std::to_string(config.period_s));
    }
    const Bounds bounds = config.action_bounds.value_or(Bounds{rules.low, rules.high});
    auto regime = std::make_unique<Regime>(before.generation + 1, std::move(config), bounds, std::move(connection));
    if (regime->levels.rules().width() != rules.width()) {
      throw std::invalid_argument("an action must keep its " + std::to_string(rules.width()) + " elements, got " +
                                  std::to_string(regime->levels.rules().width()));
    }
    // Neither thread will look at a regime of an earlier generation than its own again.
    const std::int64_t needed = std::min(control_generation_.load(), io_generation_.load());
    regimes_.erase(std::remove_if(regimes_.begin(), regimes_.end(),
                                  [&](const auto& old) { return old->generation < needed; }),
                   regimes_.end());
    regimes_.push_back(std::move(regime));
    wished_regime_ = regimes_.back().get();
  }

  void operator_stop() noexcept { wishes_stop_ = true; }

  std::string_view rearm() noexcept {
    const std::string_view refused = refusals_to_rearm_[rearm_refusal_.load()];
    if (refused.empty()) {
      wishes_rearm_ = true;
    }
    return refused;
  }

  Level level() const noexcept { return level_.load(); }

  LoopCounters counters() const {
    LoopCounters counters = tally_.snapshot();
    counters.events_lost = reporter_ ? reporter_->lost() : 0;
    return counters;
  }

  void close() {
    is_closed_ = true;
    if (getpid() != pid_) {
      thread_.detach();  // the parent's
      return;
    }
    const std::lock_guard lock(closing_);
    calls_.end();
    question_bell_.ring();
    if (thread_.joinable()) {
      thread_.join();
    }
    if (reporter_ != nullptr) {
      reporter_->close();
    }
  }

 private:
  // -- the control thread

  void grant_wishes() noexcept {
    if (const Regime* wished = wished_regime_.exchange(nullptr)) {
      const bool keeps_command = wished->levels.rules().kinds == regime_->levels.rules().kinds;
      regime_ = wished;
      mode_ = -1;
      advance(Switch{wished->generation, keeps_command});
      control_generation_ = wished->generation;
    }
    if (wishes_rearm_.exchange(false)) {
      advance(Rearm{});
    }
    if (wishes_stop_.exchange(false)) {  // the last word, whatever else was wished for
      advance(Stop{"OPERATOR_STOP"});
    }
  }

  Reason own_fault() noexcept {
    if (getpid() != pid_) {
      if (state_.level != Level::kSafeStop) {
        advance(Stop{"FORKED"});
      }
      return "FORKED";
    }
    return is_closed_.load(std::memory_order_relaxed) ? "LOOP_CLOSED" : "";
  }

  /// Leaves the observation for the thread that asks. Returns why it could not be sent; empty where it was.
  Reason ask(Span<const Input> inputs, std::int64_t sequence, std::int64_t observed_ns, bool& repeats) noexcept {
    const Reason fault = unusable(inputs);
    if (!fault.empty()) {
      return fault;
    }
    Question& question = questions_.draft();
    question.sequence = sequence;
    question.observed_ns = observed_ns;
    question.over_ns = observed_ns + regime_->budget_ns;
    question.regime = regime_;
    question.previous_mode = mode_;
    question.num_inputs = inputs.size();
    try {
      question.values.clear();
      for (std::size_t i = 0; i < inputs.size(); ++i) {
        question.names[i] = inputs[i].name;
        question.sizes[i] = inputs[i].values.size();
        question.values.insert(question.values.end(), inputs[i].values.begin(), inputs[i].values.end());
      }
      repeats = !observation_.empty() && observation_.size() == question.values.size() &&
                std::memcmp(observation_.data(), question.values.data(), observation_.size() * sizeof(float)) == 0;
      observation_ = question.values;
    } catch (const std::bad_alloc&) {
      return explain("MESSAGE_TOO_LARGE", "there is no memory for the observation");
    }
    questions_.publish();
    question_bell_.ring();
    return {};
  }

  Reason unusable(Span<const Input> inputs) noexcept {
    if (inputs.empty() || inputs.size() > kMostInputs) {
      return explain("BAD_SHAPE", "observation: expected 1 to 16 inputs");
    }
    std::size_t numbers = 0;
    for (const Input& input : inputs) {
      if (input.name.size() > kLongestName) {
        return explain("UNKNOWN_INPUT", "observation: expected names of at most 64 characters");
      }
      numbers += input.values.size();
      if (numbers > kMostNumbers) {
        return explain("MESSAGE_TOO_LARGE", "observation: expected at most 1048576 numbers");
      }
      for (std::size_t i = 0; i < input.values.size(); ++i) {
        if (!std::isfinite(input.values[i])) {
          char detail[100];
          const std::string_view name = input.name.empty() ? "observation" : input.name;
          std::snprintf(detail, sizeof detail, "%.*s[%zu]", static_cast<int>(name.size()), name.data(), i);
          return explain("NON_FINITE", detail);
        }
      }
    }
    return {};
  }

  Reason explain(std::string_view reason, std::string_view detail) noexcept {
    explained_reason_ = reason;
    explained_detail_ = detail;
    return reason;
  }

  /// Takes answers and refusals, until there is one of tick `sequence` or it is `until_ns`.
  void take_outcomes(std::int64_t sequence, std::int64_t until_ns) noexcept {
    while (true) {
      bool is_settled = false;
      if (const Answer* answer = answers_.take()) {
        Reply reply = answer->reply;
        reply.action = answer->action;
        advance(reply);
        is_settled = reply.sequence == sequence;
      }
      if (const Explained* refused = refusals_.take()) {
        explain(refused->refusal.reason, refused->detail);
        advance(refused->refusal);
        is_settled = is_settled || refused->refusal.sequence == sequence;
      }
      if (is_settled || now_ns() >= until_ns) {
        return;
      }
      outcome_bell_.wait_until(until_ns);
    }
  }

  const LoopAction& tick(const Reason& fault, bool repeats, Span<const double> measured) noexcept {
    Tick tick;
    tick.fault = fault;
    tick.repeats = repeats;
    tick.measured = measured;
    tick.fallback = regime_->fallback.get();
    if (regime_->fallback != nullptr) {
      regime_->fallback->note_measured(measured);
    }
    const Output output = advance(tick);
    const Command& command = *std::get_if<Command>(&output);
    report(command);
    std::transform(command.values.begin(), command.values.end(), action_.values.begin(),
                   [](double value) { return static_cast<float>(value); });
    action_.source = command.source;
    action_.level = command.level;
    action_.age_s = command.age_ns ? std::optional(seconds(*command.age_ns)) : std::nullopt;
    action_.reason = command.reason;
    action_.detail = explained_reason_ == command.reason ? explained_detail_ : Detail();
    action_.flags = command.flags;
    action_.tick = command.sequence;
    action_.mode = std::nullopt;
    action_.version = 0;
    action_.bundle_digest = {};
    if (command.reply != nullptr) {
      mode_ = command.reply->mode;
      if (mode_ >= 0) {
        action_.mode = mode_;
      }
      action_.version = command.reply->version;
      action_.bundle_digest = command.reply->bundle_digest;
    }
    return action_;
  }

  void report(const Command& command) noexcept {
    const unsigned begins = command.flags & ~action_.flags;
    level_.store(command.level, std::memory_order_relaxed);
    const std::string_view refused = regime_->levels.may_rearm(state_);
    rearm_refusal_.store(refused.empty() ? 0 : refused == refusals_to_rearm_[1] ? 1 : 2, std::memory_order_relaxed);
    if (reporter_ == nullptr) {
      return;
    }
    reporter_->note_step(command.sequence, state_.now_ns);
    if (command.level != action_.level) {
      reporter_->report(LevelChanged{command.sequence, action_.level, command.level, command.reason});
    }
    if (command.flags & kBundleChanged) {
      reporter_->report(BundleChanged{command.sequence, state_.bundle_digest,
                                      command.reply != nullptr ? command.reply->version : 0});
    }
    if (begins & kOutOfDistribution) {
      reporter_->report(OutOfDistribution{command.sequence});
    }
  }

  Output advance(const Event& event) noexcept {
    Output output = regime_->levels.advance(state_, event, now_ns());
    if (const auto* command = std::get_if<Command>(&output)) {
      tally_.count(*command);
    } else if (const auto* rejected = std::get_if<Rejected>(&output)) {
      tally_.count(*rejected);
    }
    return output;
  }

  // -- the thread that asks

  /// Asks for the newest question there is, one at a time, each once. What became too old while another one was asked is
  /// left out: the newest wins.
  void answer_questions() {
    Throttle throttle;
    while (!is_closed_) {
      const Question* question = questions_.take();
      if (question == nullptr) {
        question_bell_.wait_until(now_ns() + kLookAroundNs);
        continue;
      }
      io_generation_ = question->regime->generation;
      try {
        answer(*question, throttle);
      } catch (...) {  // a defect of ours must cost one tick, not the thread that feeds the robot
        refuse(*question, "CLIENT_DEFECT", "");
      }
      outcome_bell_.ring();
    }
  }

  void answer(const Question& question, Throttle& throttle) {
    const Regime& regime = *question.regime;
    if (now_ns() >= question.over_ns) {
      return refuse(question, "DEADLINE_EXCEEDED", "");
    }
    if (!throttle.lets_ask(seconds(now_ns()))) {
      return refuse(question, "THROTTLED", "");
    }
    std::array<Input, kMostInputs> inputs;
    const float* next = question.values.data();
    for (std::size_t i = 0; i < question.num_inputs; ++i) {
      inputs[i] = Input(question.names[i], {next, question.sizes[i]});
      next += question.sizes[i];
    }
    ActOptions options;
    options.variant = regime.config.variant;
    if (regime.config.hysteresis_width != 0.0f) {
      options.previous_mode = {&question.previous_mode, 1};
      options.hysteresis_width = regime.config.hysteresis_width;
    }
    const auto actions = regime.connection->act({inputs.data(), question.num_inputs}, question.over_ns, options, &calls_);
    if (!actions) {
      const Error& error = actions.error();
      if (error.failure == Failure::kOverloaded) {
        throttle.was_refused(seconds(now_ns()), error.retry_after_s);
      } else {
        throttle.was_answered();
      }
      return refuse(question, error.reason, error.detail);
    }
    throttle.was_answered();
    if (actions->rows != 1) {
      return refuse(question, "BAD_SHAPE", "observation: expected one row");
    }
    Answer& answer = answers_.draft();
    answer.action.assign(actions->actions.begin(), actions->actions.end());
    answer.reply.sequence = question.sequence;
    answer.reply.observed_ns = question.observed_ns;
    answer.reply.generation = regime.generation;
    answer.reply.bundle_digest = actions->bundle_digest;
    answer.reply.contract_hash = regime.connection->contract_hash();
    answer.reply.warns = std::any_of(actions->scores.begin(), actions->scores.end(),
                                     [](const Score& score) { return score.warns(0); });
    answer.reply.version = actions->version;
    answer.reply.mode = actions->mode.empty() ? -1 : actions->mode[0];
    answers_.publish();
  }

  void refuse(const Question& question, std::string_view reason, std::string_view detail) {
    Explained& explained = refusals_.draft();
    explained.refusal = {question.sequence, question.regime->generation, reason};
    explained.detail = detail;
    refusals_.publish();
  }

  static constexpr std::string_view refusals_to_rearm_[] = {"", "NOT_STOPPED", "NOT_HEALTHY"};

  const pid_t pid_ = getpid();
  std::atomic<bool> is_closed_{false};
  std::mutex closing_;
  Group calls_;

  // Between the threads; none of them ever waits for another one here.
  Newest<Question> questions_;
  Newest<Answer> answers_;
  Newest<Explained> refusals_;
  Bell question_bell_;
  Bell outcome_bell_;
  LoopTally tally_;
  std::unique_ptr<EventReporter> reporter_;
  std::atomic<Level> level_{Level::kDegraded};
  std::atomic<int> rearm_refusal_{1};
  std::atomic<bool> wishes_rearm_{false};
  std::atomic<bool> wishes_stop_{false};
  std::atomic<const Regime*> wished_regime_{nullptr};
  std::atomic<std::int64_t> control_generation_{0};
  std::atomic<std::int64_t> io_generation_{0};

  // Of whoever switches.
  std::mutex switching_;
  std::vector<std::unique_ptr<Regime>> regimes_;

  // Of the control thread.
  const Regime* regime_ = nullptr;
  LoopState state_;
  std::int32_t mode_ = -1;
  std::vector<float> observation_;
  Reason explained_reason_;
  Detail explained_detail_;
  LoopAction action_;

  std::thread thread_;
};

ControlLoop::ControlLoop(const PolicyClient& client, LoopConfig config, std::function<void(const LoopEvent&)> on_event)
    : impl_(std::make_unique<Impl>(client.connection_, std::move(config), std::move(on_event))) {}

ControlLoop::~ControlLoop() = default;

const LoopAction& ControlLoop::step(Span<const float> observation, Span<const double> measured) noexcept {
  const Input input(observation);
  return impl_->step({&input, 1}, measured);
}

const LoopAction& ControlLoop::step(Span<const Input> inputs, Span<const double> measured) noexcept {
  return impl_->step(inputs, measured);
}

void ControlLoop::switch_to(const PolicyClient& client, LoopConfig config) {
  impl_->switch_to(client.connection_, std::move(config));
}

void ControlLoop::operator_stop() noexcept { impl_->operator_stop(); }

std::string_view ControlLoop::rearm() noexcept { return impl_->rearm(); }

Level ControlLoop::level() const noexcept { return impl_->level(); }

LoopCounters ControlLoop::counters() const { return impl_->counters(); }

void ControlLoop::close() { impl_->close(); }

}  // namespace lom_client
