// The loop without a server: what is said at construction, and what a step does whatever it is given.

#include "lom_client/control_loop.hpp"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <iterator>
#include <stdexcept>
#include <thread>

#include "counting_new.hpp"

namespace lom_client {
namespace {

LoopConfig thousand_hertz() {
  LoopConfig config;
  config.period_s = 0.001;
  config.kinds = {Kind::kPosition};
  config.safe_action = {0.25};
  config.action_bounds = Bounds{{-1, -1}, {1, 1}};
  return config;
}

class Alone : public testing::Test {
 protected:
  PolicyClient client_{"unix:/nowhere/lom.sock"};
  const std::vector<float> observation_ = {0.1f, 0.2f, 0.3f};
};

TEST_F(Alone, ALoopHoldsWhatIsMeasured) {
  ControlLoop loop(client_, thousand_hertz());
  const LoopAction& action = loop.step(observation_, std::vector<double>{0.5, NAN});
  EXPECT_EQ(action.values, (std::vector<float>{0.5f, 0.25f}));
  EXPECT_EQ(action.source, Source::kHold);
  EXPECT_EQ(action.tick, 1);
  EXPECT_FALSE(action.age_s);
  EXPECT_FALSE(action.reason.empty());
  EXPECT_EQ(loop.level(), Level::kDegraded);
}

TEST_F(Alone, AStepTakesWhateverItIsGiven) {
  ControlLoop loop(client_, thousand_hertz());
  EXPECT_EQ(loop.step(Span<const Input>()).reason, Reason("BAD_SHAPE"));
  const std::vector<Input> many(17, Input(observation_));
  EXPECT_EQ(loop.step(Span<const Input>(many)).reason, Reason("BAD_SHAPE"));
  const std::string long_name(65, 'x');
  const std::vector<Input> named = {Input(long_name, observation_)};
  EXPECT_EQ(loop.step(Span<const Input>(named)).reason, Reason("UNKNOWN_INPUT"));
  EXPECT_EQ(loop.step(std::vector<float>(2'000'000)).reason, Reason("MESSAGE_TOO_LARGE"));
  const LoopAction& action = loop.step(std::vector<float>{0, INFINITY, 0});
  EXPECT_EQ(action.reason, Reason("NON_FINITE"));
  EXPECT_EQ(action.detail, Detail("observation[1]"));
  for (const float value : action.values) {
    EXPECT_EQ(value, 0.25f);
  }
}

TEST_F(Alone, AClosedLoopMissesAndMayBeClosedAgain) {
  ControlLoop loop(client_, thousand_hertz());
  loop.close();
  loop.close();
  EXPECT_EQ(loop.step(observation_).reason, Reason("LOOP_CLOSED"));
  EXPECT_EQ(loop.counters().misses.at("LOOP_CLOSED"), 1);
}

TEST_F(Alone, AnOperatorsStopHasTheLastWord) {
  ControlLoop loop(client_, thousand_hertz());
  EXPECT_EQ(loop.rearm(), "NOT_STOPPED");
  loop.operator_stop();
  EXPECT_EQ(loop.step(observation_).reason, Reason("OPERATOR_STOP"));
  EXPECT_EQ(loop.level(), Level::kSafeStop);
  EXPECT_EQ(loop.rearm(), "NOT_HEALTHY");
}

TEST_F(Alone, WhatIsWrongIsSaidAtConstruction) {
  LoopConfig config = thousand_hertz();
  config.safe_action = {5.0};
  EXPECT_THROW(ControlLoop(client_, config), std::invalid_argument);
  config = thousand_hertz();
  config.fallback = [](auto, auto, auto) { return false; };
  EXPECT_THROW(ControlLoop(client_, config), std::invalid_argument);
  config = thousand_hertz();
  config.action_bounds = std::nullopt;
  config.connect_deadline_s = 0.1;
  EXPECT_THROW(ControlLoop(client_, config), std::runtime_error);
}

TEST_F(Alone, ASwitchKeepsPeriodAndWidth) {
  ControlLoop loop(client_, thousand_hertz());
  LoopConfig config = thousand_hertz();
  config.period_s = 0.002;
  EXPECT_THROW(loop.switch_to(client_, config), std::invalid_argument);
  config = thousand_hertz();
  config.action_bounds = Bounds{{-1, -1, -1}, {1, 1, 1}};
  EXPECT_THROW(loop.switch_to(client_, config), std::invalid_argument);
  config = thousand_hertz();
  config.kinds = {Kind::kVelocity};
  for (int i = 0; i < 100; ++i) {
    loop.switch_to(client_, config);
    loop.step(observation_);
  }
  config.action_bounds = Bounds{{-0.5, -0.5}, {0.5, 0.5}};
  loop.switch_to(client_, config);
  // Of other kinds than before nothing is held: the command begins anew, within the new bounds.
  config.kinds = {Kind::kPosition};
  loop.switch_to(client_, config);
  EXPECT_EQ(loop.step(observation_, std::vector<double>{0.9, -0.9}).values, (std::vector<float>{0.5f, -0.5f}));
}

TEST_F(Alone, AStepAllocatesNothing) {
  LoopConfig config = thousand_hertz();
  config.deadline_s = 0.0;
  config.fallback = [](auto, auto, auto answer) {
    std::fill(answer.begin(), answer.end(), 0.0);
    return true;
  };
  int told = 0;
  ControlLoop loop(client_, config, [&](const LoopEvent&) { ++told; });
  const std::int64_t before = allocations_of_this_thread();
  for (int i = 0; i < 100'000; ++i) {
    loop.step(observation_);
  }
  EXPECT_EQ(allocations_of_this_thread() - before, 0);
  loop.close();
  EXPECT_GT(told, 0);
}

TEST_F(Alone, AForkedLoopStops) {
  ControlLoop loop(client_, thousand_hertz());
  loop.step(observation_);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const LoopAction& action = loop.step(observation_);
    _exit(action.reason == Reason("FORKED") && action.level == Level::kSafeStop ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT_NE(loop.step(observation_).level, Level::kSafeStop);
}

TEST_F(Alone, SignalsDoNotEndAWait) {
  // Whoever connects is let in, and never answered.
  const std::string path = testing::TempDir() + "lom_silent.sock";
  std::remove(path.c_str());
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof address.sun_path - 1);
  const int listener = socket(AF_UNIX, SOCK_STREAM, 0);
  ASSERT_EQ(bind(listener, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  ASSERT_EQ(listen(listener, 8), 0);
  PolicyClient client("unix:" + path);

  struct sigaction action {};
  action.sa_handler = [](int) {};
  struct sigaction before {};
  sigaction(SIGALRM, &action, &before);
  const itimerval storm{{0, 1000}, {0, 1000}};
  setitimer(ITIMER_REAL, &storm, nullptr);
  LoopConfig config = thousand_hertz();
  config.period_s = 0.02;
  ControlLoop loop(client, config);
  int waited = 0;
  for (int i = 0; i < 20; ++i) {
    const auto began = std::chrono::steady_clock::now();
    // The connection is given up now and then: that is known at once.
    if (loop.step(observation_).reason == Reason("DEADLINE_EXCEEDED")) {
      EXPECT_GE(std::chrono::steady_clock::now() - began, std::chrono::milliseconds(16));
      ++waited;
    }
  }
  EXPECT_GT(waited, 2);
  const itimerval silence{};
  setitimer(ITIMER_REAL, &silence, nullptr);
  sigaction(SIGALRM, &before, nullptr);
  ::close(listener);
}

TEST_F(Alone, AHundredLoopsLeaveNoThreadBehind) {
  const auto threads = [] {
    const std::filesystem::directory_iterator tasks("/proc/self/task");
    return std::distance(begin(tasks), end(tasks));
  };
  std::ptrdiff_t before = 0;
  for (int i = 0; i < 100; ++i) {
    ControlLoop loop(client_, thousand_hertz(), [](const LoopEvent&) {});
    loop.step(observation_);
    loop.close();
    if (i == 10) {  // gRPC has its own by now
      before = threads();
    }
  }
  const auto patience = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (threads() > before && std::chrono::steady_clock::now() < patience) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_LE(threads(), before);
}

}  // namespace
}  // namespace lom_client
