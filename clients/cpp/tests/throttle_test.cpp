#include "throttle.hpp"

#include <gtest/gtest.h>

#include <random>

namespace lom_client {
namespace {

std::function<double()> chance(unsigned seed) {
  return [engine = std::mt19937(seed)]() mutable { return std::uniform_real_distribution<double>(0.0, 1.0)(engine); };
}

TEST(Throttle, AlwaysAsksAServerThatAnswers) {
  Throttle throttle(chance(1));
  for (int tick = 0; tick < 2000; ++tick) {
    ASSERT_TRUE(throttle.lets_ask(tick * 0.01));
    throttle.was_answered();
  }
}

TEST(Throttle, AsksAnOverloadedServerAboutTwiceAsOftenAsItAnswers) {
  Throttle throttle(chance(2));
  int asked = 0;
  int answered = 0;
  double capacity = 0.0;  // 10 of 100 wishes a second
  for (int tick = 0; tick < 6000; ++tick) {
    capacity = std::min(1.0, capacity + 0.1);
    if (throttle.lets_ask(tick * 0.01)) {
      ++asked;
      if (capacity >= 1.0) {
        capacity -= 1.0;
        ++answered;
        throttle.was_answered();
      } else {
        throttle.was_refused(tick * 0.01, std::nullopt);
      }
    }
  }
  EXPECT_GT(answered, 200);
  EXPECT_LE(asked, 2.3 * answered);
}

TEST(Throttle, LeavesAServerAloneForAsLongAsItAsks) {
  Throttle throttle(chance(3));
  ASSERT_TRUE(throttle.lets_ask(10.0));
  throttle.was_refused(10.0, 0.5);
  EXPECT_FALSE(throttle.lets_ask(10.49));
  // The past counts for less: a draw of 0 is left out only where more was refused than answered.
  for (int i = 0; i < 10; ++i) {
    throttle.was_answered();
  }
  EXPECT_TRUE(throttle.lets_ask(10.51));
}

}  // namespace
}  // namespace lom_client
