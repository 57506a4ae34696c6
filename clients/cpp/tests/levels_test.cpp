// The golden traces, replayed to the bit, and the promise that a tick allocates nothing.

#include "lom_client/levels.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "counting_new.hpp"

namespace lom_client {
namespace {

using Json = nlohmann::json;

double number(const Json& said) { return std::strtod(said.get<std::string>().c_str(), nullptr); }

std::vector<double> numbers(const Json& said) {
  std::vector<double> values;
  for (const Json& value : said) {
    values.push_back(number(value));
  }
  return values;
}

template <typename Choice>
Choice choice(const Json& said, const std::vector<std::pair<std::string, Choice>>& choices) {
  for (const auto& [name, value] : choices) {
    if (said == name) {
      return value;
    }
  }
  throw std::invalid_argument("unknown: " + said.dump());
}

LevelRules rules_of(const Json& said) {
  LevelRules rules;
  rules.period_ns = said.at("period_ns");
  for (const Json& kind : said.at("kinds")) {
    rules.kinds.push_back(choice<Kind>(
        kind, {{"position", Kind::kPosition}, {"velocity", Kind::kVelocity}, {"torque", Kind::kTorque}}));
  }
  rules.low = numbers(said.at("low"));
  rules.high = numbers(said.at("high"));
  rules.safe_action = numbers(said.at("safe_action"));
  rules.waits = said.at("waits");
  rules.has_fallback = said.at("has_fallback");
  rules.bounds_tolerance = number(said.at("bounds_tolerance"));
  rules.slew_per_s = numbers(said.at("slew_per_s"));
  rules.acceleration_per_s2 = numbers(said.at("acceleration_per_s2"));
  rules.max_age_ns = said.at("max_age_ns");
  rules.hold_ticks = said.at("hold_ticks");
  rules.stop_ticks = said.at("stop_ticks");
  rules.recovery_ticks = said.at("recovery_ticks");
  rules.velocity_decay_ns = said.at("velocity_decay_ns");
  rules.torque_hold_ns = said.at("torque_hold_ns");
  rules.stop_ns = said.at("stop_ns");
  rules.on_warning = choice<OnWarning>(said.at("on_warning"), {{"ignore", OnWarning::kIgnore},
                                                               {"flag", OnWarning::kFlag},
                                                               {"fallback", OnWarning::kFallback}});
  rules.warning_ticks = said.at("warning_ticks");
  rules.frozen_ticks = said.at("frozen_ticks");
  rules.blend_ticks = said.at("blend_ticks");
  rules.pins_bundle = said.at("pins_bundle");
  return rules;
}

/// Answers what it was made with, or fails where that is of another length.
class Recorded : public Fallback {
 public:
  explicit Recorded(std::vector<double> said) : said_(std::move(said)) {}
  bool answer(Span<const double>, Span<double> answer) override {
    if (said_.size() != answer.size()) {
      return false;
    }
    std::copy(said_.begin(), said_.end(), answer.begin());
    return true;
  }

 private:
  std::vector<double> said_;
};

/// An event, and the numbers that it points to.
struct Played {
  std::vector<double> values;
  Recorded fallback{{}};
  Event event;

  explicit Played(const Json& said) {
    const std::string type = said.at("type");
    if (type == "tick") {
      Tick tick;
      tick.fault = said.at("fault").get<std::string>();
      tick.repeats = said.at("repeats");
      if (!said.at("measured").is_null()) {
        values = numbers(said.at("measured"));
        tick.measured = values;
      }
      if (!said.at("fallback").is_null()) {
        fallback = Recorded(numbers(said.at("fallback")));
        tick.fallback = &fallback;
      }
      event = tick;
    } else if (type == "reply") {
      values = numbers(said.at("action"));
      Reply reply;
      reply.sequence = said.at("sequence");
      reply.observed_ns = said.at("observed_ns");
      reply.generation = said.at("generation");
      reply.action = values;
      reply.bundle_digest = said.at("bundle_digest").get<std::string>();
      reply.contract_hash = said.at("contract_hash").get<std::string>();
      reply.warns = said.at("warns");
      reply.version = said.at("version");
      reply.mode = said.at("mode");
      event = reply;
    } else if (type == "refusal") {
      event = Refusal{said.at("sequence"), said.at("generation"), said.at("reason").get<std::string>()};
    } else if (type == "switch") {
      event = Switch{said.at("generation"), said.at("keeps_command")};
    } else if (type == "stop") {
      event = Stop{said.at("reason").get<std::string>()};
    } else if (type == "rearm") {
      event = Rearm{};
    } else {
      throw std::invalid_argument("unknown event " + type);
    }
  }
};

std::vector<std::string> names_of(unsigned flags) {
  constexpr const char* kNames[] = {"CLAMPED",           "SLEW_LIMITED",        "BLENDED",
                                    "OBSERVATION_FROZEN", "OUT_OF_DISTRIBUTION", "BUNDLE_CHANGED"};
  std::vector<std::string> names;
  for (int bit = 0; bit < 6; ++bit) {
    if (flags & (1u << bit)) {
      names.emplace_back(kNames[bit]);
    }
  }
  return names;
}

void expect_output(const Output& output, const Json& said) {
  if (said.is_null()) {
    EXPECT_TRUE(std::holds_alternative<std::monostate>(output));
    return;
  }
  if (said.at("type") == "rejected") {
    ASSERT_TRUE(std::holds_alternative<Rejected>(output));
    EXPECT_EQ(std::get<Rejected>(output).reason.str(), said.at("reason"));
    return;
  }
  ASSERT_TRUE(std::holds_alternative<Command>(output));
  const Command& command = std::get<Command>(output);
  EXPECT_EQ(command.sequence, said.at("sequence"));
  EXPECT_EQ(name_of(command.level), said.at("level").get<std::string>());
  EXPECT_EQ(name_of(command.source), said.at("source").get<std::string>());
  EXPECT_EQ(command.reason.str(), said.at("reason"));
  EXPECT_EQ(Json(names_of(command.flags)), said.at("flags"));
  EXPECT_EQ(command.age_ns ? Json(*command.age_ns) : Json(), said.at("age_ns"));
  EXPECT_EQ(command.reply != nullptr, command.level == Level::kNominal);
  const std::vector<double> expected = numbers(said.at("values"));
  ASSERT_EQ(command.values.size(), expected.size());
  // The bits, not the values: -0.0 is not 0.0.
  EXPECT_EQ(std::memcmp(command.values.data(), expected.data(), expected.size() * sizeof(double)), 0);
}

std::vector<Json> scenarios() {
  std::ifstream file(LOM_CLIENT_TRACES);
  std::vector<Json> read;
  for (std::string line; std::getline(file, line);) {
    read.push_back(Json::parse(line));
  }
  return read;
}

class GoldenTrace : public testing::TestWithParam<Json> {};

TEST_P(GoldenTrace, IsReplayedToTheBit) {
  const Json& scenario = GetParam();
  const Levels levels(rules_of(scenario.at("rules")));
  LoopState state = levels.begin(scenario.at("contract_hash").get<std::string>());
  ASSERT_FALSE(scenario.at("steps").empty());
  for (std::size_t i = 0; i < scenario.at("steps").size(); ++i) {
    SCOPED_TRACE("step " + std::to_string(i));
    const Json& step = scenario.at("steps")[i];
    const Played played(step.at("event"));
    expect_output(levels.advance(state, played.event, step.at("now_ns")), step.at("output"));
    if (HasFailure()) {
      return;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, GoldenTrace, testing::ValuesIn(scenarios()),
                         [](const auto& info) { return info.param.at("name").template get<std::string>(); });

TEST(GoldenTraces, AreAllThere) { EXPECT_GE(scenarios().size(), 50u); }

TEST(Levels, AdvanceAllocatesNothing) {
  const std::vector<Json> all = scenarios();
  std::int64_t events = 0;
  std::int64_t ticks = 0;
  std::int64_t allocated = 0;
  while (ticks < 100'000) {
    for (const Json& scenario : all) {
      const Levels levels(rules_of(scenario.at("rules")));
      LoopState state = levels.begin();
      std::vector<Played> played;
      std::vector<std::int64_t> at_ns;
      for (const Json& step : scenario.at("steps")) {
        played.emplace_back(step.at("event"));
        at_ns.push_back(step.at("now_ns"));
      }
      // A moved vector keeps its numbers where they are, a moved fallback does not: point to it again.
      for (Played& one : played) {
        if (Tick* tick = std::get_if<Tick>(&one.event); tick != nullptr && tick->fallback != nullptr) {
          tick->fallback = &one.fallback;
        }
      }
      // Time goes on over the rounds, so that each one is as good as a new scenario.
      for (std::int64_t round = 0; round < 40; ++round) {
        const std::int64_t before = allocations_of_this_thread();
        for (std::size_t i = 0; i < played.size(); ++i) {
          levels.advance(state, played[i].event, at_ns[i] + round * 1000 * kNsPerS);
        }
        allocated += allocations_of_this_thread() - before;
        events += static_cast<std::int64_t>(played.size());
      }
      ticks += state.sequence;
    }
  }
  EXPECT_GE(events, ticks);
  EXPECT_EQ(allocated, 0);
}

TEST(CountingNew, Counts) {
  const std::int64_t before = allocations_of_this_thread();
  const std::vector<double> values(3);
  EXPECT_EQ(allocations_of_this_thread() - before, 1);
}

LevelRules sound_rules() {
  LevelRules rules;
  rules.period_ns = 20'000'000;
  rules.kinds = {Kind::kPosition, Kind::kVelocity};
  rules.low = {-1, -1};
  rules.high = {1, 1};
  rules.safe_action = {0.25, 0.25};
  rules.max_age_ns = 40'000'000;
  rules.hold_ticks = default_hold_ticks(rules.period_ns);
  rules.stop_ticks = default_stop_ticks(rules.period_ns, rules.hold_ticks);
  rules.recovery_ticks = default_recovery_ticks(rules.period_ns);
  return rules;
}

TEST(LevelRules, DefaultsAreThoseOfTheTable) {
  EXPECT_EQ(default_hold_ticks(20'000'000), 5);
  EXPECT_EQ(default_hold_ticks(50'000'000), 2);
  EXPECT_EQ(default_stop_ticks(1'000'000, 5), 20);
  EXPECT_EQ(default_stop_ticks(100'000'000, 1), 5);
  EXPECT_EQ(default_stop_ticks(1'000'000'000, 0), 1);
  EXPECT_EQ(default_recovery_ticks(1'000'000), 50);
  EXPECT_EQ(default_recovery_ticks(20'000'000), 5);
}

struct Wrong {
  const char* names;
  void (*change)(LevelRules&);
};

class WrongRules : public testing::TestWithParam<Wrong> {};

TEST_P(WrongRules, AreRefusedByName) {
  LevelRules rules = sound_rules();
  EXPECT_NO_THROW(rules.check());
  GetParam().change(rules);
  try {
    rules.check();
    FAIL() << "nothing was refused";
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find(GetParam().names), std::string::npos) << error.what();
  }
}

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

INSTANTIATE_TEST_SUITE_P(
    LevelRules, WrongRules,
    testing::Values(Wrong{"period_ns", [](LevelRules& rules) { rules.period_ns = 0; }},
                    Wrong{"kinds", [](LevelRules& rules) { rules.kinds = {}; }},
                    Wrong{"low must have 2", [](LevelRules& rules) { rules.low = {0}; }},
                    Wrong{"low[1]", [](LevelRules& rules) { rules.low[1] = 2; }},
                    Wrong{"low[0]", [](LevelRules& rules) { rules.low[0] = kNan; }},
                    Wrong{"low[0]", [](LevelRules& rules) { rules.low[0] = rules.high[0] = kInfinity; }},
                    Wrong{"safe_action[0]", [](LevelRules& rules) { rules.safe_action[0] = kNan; }},
                    Wrong{"safe_action[1]", [](LevelRules& rules) { rules.safe_action[1] = 1.5; }},
                    Wrong{"slew_per_s must", [](LevelRules& rules) { rules.slew_per_s = {1}; }},
                    Wrong{"slew_per_s[1]", [](LevelRules& rules) { rules.slew_per_s = {1, kNan}; }},
                    Wrong{"acceleration_per_s2[0]", [](LevelRules& rules) { rules.acceleration_per_s2 = {0, 1}; }},
                    Wrong{"bounds_tolerance", [](LevelRules& rules) { rules.bounds_tolerance = kNan; }},
                    Wrong{"max_age_ns", [](LevelRules& rules) { rules.max_age_ns = 0; }},
                    Wrong{"hold_ticks", [](LevelRules& rules) { rules.hold_ticks = -1; }},
                    Wrong{"stop_ticks", [](LevelRules& rules) { rules.stop_ticks = rules.hold_ticks; }},
                    Wrong{"recovery_ticks", [](LevelRules& rules) { rules.recovery_ticks = 0; }},
                    Wrong{"velocity_decay_ns", [](LevelRules& rules) { rules.velocity_decay_ns = 100'000'001; }},
                    Wrong{"torque_hold_ns", [](LevelRules& rules) { rules.torque_hold_ns = 20'000'001; }},
                    Wrong{"stop_ns", [](LevelRules& rules) { rules.stop_ns = -1; }}));

}  // namespace
}  // namespace lom_client
