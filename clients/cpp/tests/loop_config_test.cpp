#include "lom_client/loop_config.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <stdexcept>

#include "guarded_fallback.hpp"

namespace lom_client {
namespace {

LoopConfig fifty_hertz() {
  LoopConfig config;
  config.period_s = 0.02;
  config.kinds = {Kind::kVelocity};
  config.safe_action = {0.0};
  return config;
}

const Bounds kThree{{-1, -1, -1}, {1, 1, 1}};

TEST(LoopConfig, GivesEveryElementItsRules) {
  LoopConfig config = fifty_hertz();
  config.slew_per_s = {2.0};
  const LevelRules rules = config.rules(kThree);
  EXPECT_EQ(rules.width(), 3u);
  EXPECT_EQ(rules.kinds, std::vector<Kind>(3, Kind::kVelocity));
  EXPECT_EQ(rules.slew_per_s, std::vector<double>(3, 2.0));
  EXPECT_EQ(rules.period_ns, 20'000'000);
  EXPECT_EQ(rules.max_age_ns, 40'000'000);
  EXPECT_EQ(rules.hold_ticks, 5);
  EXPECT_EQ(rules.stop_ticks, 20);
  EXPECT_TRUE(rules.waits);
  EXPECT_EQ(config.wait_ns(), 16'000'000);
  config.deadline_s = 0.0;
  EXPECT_FALSE(config.rules(kThree).waits);
}

TEST(LoopConfig, BoundsAreThoseThatFloat32CanSay) {
  const LevelRules rules = fifty_hertz().rules({{-0.1}, {0.1}});
  EXPECT_GE(rules.low[0], -0.1);
  EXPECT_LE(rules.high[0], 0.1);
  EXPECT_EQ(rules.high[0], static_cast<double>(static_cast<float>(rules.high[0])));
  EXPECT_NEAR(rules.high[0], 0.1, 1e-8);
}

struct Wrong {
  const char* names;
  void (*change)(LoopConfig&);
};

class WrongConfig : public testing::TestWithParam<Wrong> {};

TEST_P(WrongConfig, IsRefusedByName) {
  LoopConfig config = fifty_hertz();
  EXPECT_NO_THROW(config.rules(kThree));
  GetParam().change(config);
  try {
    config.rules(kThree);
    FAIL() << "nothing was refused";
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find(GetParam().names), std::string::npos) << error.what();
  }
}

INSTANTIATE_TEST_SUITE_P(
    LoopConfig, WrongConfig,
    testing::Values(Wrong{"period_s", [](LoopConfig& config) { config.period_s = 0; }},
                    Wrong{"period_s", [](LoopConfig& config) { config.period_s = -1; }},
                    Wrong{"period_s", [](LoopConfig& config) { config.period_s = NAN; }},
                    Wrong{"period_s", [](LoopConfig& config) { config.period_s = 1e12; }},
                    Wrong{"kinds", [](LoopConfig& config) { config.kinds = {}; }},
                    Wrong{"kinds", [](LoopConfig& config) { config.kinds = {Kind::kTorque, Kind::kTorque}; }},
                    Wrong{"safe_action", [](LoopConfig& config) { config.safe_action = {}; }},
                    Wrong{"safe_action[0]", [](LoopConfig& config) { config.safe_action = {2.0}; }},
                    Wrong{"deadline_s", [](LoopConfig& config) { config.deadline_s = -1; }},
                    Wrong{"deadline_s", [](LoopConfig& config) { config.deadline_s = NAN; }},
                    Wrong{"deadline_s", [](LoopConfig& config) { config.deadline_s = 0.021; }},
                    Wrong{"max_age_s", [](LoopConfig& config) { config.max_age_s = 0; }},
                    Wrong{"hold_ticks", [](LoopConfig& config) { config.hold_limit = -1; }},
                    Wrong{"velocity_decay_s", [](LoopConfig& config) { config.velocity_decay_s = 0; }},
                    Wrong{"hysteresis_width", [](LoopConfig& config) { config.hysteresis_width = -1; }},
                    Wrong{"connect_deadline_s", [](LoopConfig& config) { config.connect_deadline_s = 0; }}));

bool fills(Span<double> answer, double value) {
  std::fill(answer.begin(), answer.end(), value);
  return true;
}

TEST(GuardedFallback, IsTriedWhenItIsMade) {
  const LevelRules rules = fifty_hertz().rules(kThree);
  EXPECT_NO_THROW(GuardedFallback([](auto, auto, auto answer) { return fills(answer, 0.5); }, rules));
  EXPECT_THROW(GuardedFallback([](auto, auto, auto answer) { return fills(answer, 1.5); }, rules),
               std::invalid_argument);
  EXPECT_THROW(GuardedFallback([](auto, auto, auto answer) { return fills(answer, NAN); }, rules),
               std::invalid_argument);
  EXPECT_THROW(GuardedFallback([](auto, auto, auto) { return true; }, rules), std::invalid_argument);
  EXPECT_THROW(GuardedFallback([](auto, auto, auto) { return false; }, rules), std::invalid_argument);
  EXPECT_THROW(GuardedFallback([](auto, auto, auto) -> bool { throw std::runtime_error("no"); }, rules),
               std::invalid_argument);
}

}  // namespace
}  // namespace lom_client
