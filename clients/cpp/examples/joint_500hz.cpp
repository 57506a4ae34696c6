// Two joints at 500 Hz, driven by a served policy: what a robot's own program looks like.
//
//   joint_500hz TARGET [SECONDS [take|wait]]
//
// Each joint is of second order, x'' = w^2 (u - x) - 2 d w x', with u the commanded position, w = 30 rad/s and d = 1, and
// is integrated by itself at the tick's period. The policy's observation is (x1, x2, 0) in R^3, its action two positions.
// `take` uses the newest answer of at most 10 ms, and never waits; `wait` waits for the answer to each tick's own observation,
// for 80 % of the period at most. A bare sleep loop of the same period runs before and after, so that lateness can be compared
// with what this machine can do at best.

#include <sched.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string_view>
#include <thread>
#include <vector>

#include "lom_client/control_loop.hpp"

namespace {

using Clock = std::chrono::steady_clock;

constexpr double kPeriodS = 0.002;
constexpr auto kPeriod = std::chrono::microseconds(2000);

class Joint {
 public:
  explicit Joint(double position) : position_(position) {}

  void drive_to(double command) {
    constexpr double kFrequency = 30.0;
    constexpr double kDamping = 1.0;
    velocity_ += kPeriodS * (kFrequency * kFrequency * (command - position_) - 2 * kDamping * kFrequency * velocity_);
    position_ += kPeriodS * velocity_;
  }

  double position() const { return position_; }

 private:
  double position_;
  double velocity_ = 0.0;
};

/// Calls `body` at 500 Hz, and says how late each call began, in ms. What is over is not caught up.
template <typename Body>
void at_500_hz(int ticks, std::vector<double>& late_ms, Body body) {
  auto due = Clock::now() + kPeriod;
  for (int tick = 0; tick < ticks; ++tick) {
    std::this_thread::sleep_until(due);
    const auto now = Clock::now();
    late_ms.push_back(std::chrono::duration<double, std::milli>(now - due).count());
    body();
    due += kPeriod * std::max<std::int64_t>(1, (Clock::now() - due) / kPeriod);
  }
}

void print(const char* what, std::vector<double> values_ms) {
  std::sort(values_ms.begin(), values_ms.end());
  const auto quantile = [&](double share) {
    return values_ms[static_cast<std::size_t>(share * static_cast<double>(values_ms.size() - 1))];
  };
  std::printf("%-28s p50 %.3f  p99 %.3f  p99.9 %.3f  max %.3f ms\n", what, quantile(0.5), quantile(0.99),
              quantile(0.999), values_ms.back());
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 2 ? std::atof(argv[2]) : 10.0;
  const std::string_view mode = argc > 3 ? argv[3] : "take";
  if (argc < 2 || argc > 4 || !(seconds > 0 && seconds <= 86400) || (mode != "take" && mode != "wait")) {
    std::fprintf(stderr, "usage: joint_500hz TARGET [SECONDS [take|wait]], for example joint_500hz grpc://127.0.0.1:8001 10\n");
    return 2;
  }
  try {
    lom_client::ClientConfig connection;
    connection.use_stream = true;
    lom_client::PolicyClient client(argv[1], connection);
    lom_client::LoopConfig config;
    config.period_s = kPeriodS;
    config.kinds = {lom_client::Kind::kPosition};
    config.safe_action = {0.0};
    config.slew_per_s = {4.0};
    if (mode == "take") {
      config.deadline_s = 0.0;
      config.max_age_s = 0.01;
    }
    lom_client::ControlLoop loop(client, config, [](const lom_client::LoopEvent& event) {
      const auto* changed = std::get_if<lom_client::LevelChanged>(&event);
      if (changed != nullptr && changed->after >= lom_client::Level::kFallback) {
        std::printf("tick %lld: %s, for %s\n", static_cast<long long>(changed->tick),
                    lom_client::name_of(changed->after).data(), changed->reason.str().c_str());
      }
    });

    // The control thread alone, where it is allowed: else it takes turns with the threads that ask, and with everybody else.
    const sched_param priority{50};
    const bool is_real_time = sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK, &priority) == 0;
    std::printf("%s, %s priority\n", mode.data(), is_real_time ? "real-time" : "ordinary");

    const int ticks = static_cast<int>(seconds / kPeriodS);
    std::vector<double> bare_ms;
    std::vector<double> late_ms;
    std::vector<double> step_ms;
    for (auto* values : {&bare_ms, &late_ms, &step_ms}) {
      values->reserve(static_cast<std::size_t>(ticks) + 2);
    }
    std::array<Joint, 2> joints{Joint(0.2), Joint(-0.2)};
    at_500_hz(ticks / 2, bare_ms, [] {});
    at_500_hz(ticks, late_ms, [&] {
      const auto began = Clock::now();
      const std::array<double, 2> measured{joints[0].position(), joints[1].position()};
      const std::array<float, 3> observation{static_cast<float>(measured[0]), static_cast<float>(measured[1]), 0.0f};
      const lom_client::LoopAction& action = loop.step(observation, measured);
      for (std::size_t i = 0; i < joints.size(); ++i) {
        joints[i].drive_to(action.values[i]);
      }
      step_ms.push_back(std::chrono::duration<double, std::milli>(Clock::now() - began).count());
    });
    at_500_hz(ticks / 2, bare_ms, [] {});
    loop.close();

    const lom_client::LoopCounters counters = loop.counters();
    std::printf("%lld ticks, %.2f %% fresh, at most %lld in a row without the policy\n",
                static_cast<long long>(counters.ticks), 100 * counters.fresh_share(),
                static_cast<long long>(counters.longest_miss_run));
    for (const auto& [reason, number] : counters.misses) {
      std::printf("  %lld %s\n", static_cast<long long>(number), reason.c_str());
    }
    print("late, bare sleep loop", bare_ms);
    print("late, control loop", late_ms);
    print("step", step_ms);
    std::printf("joints at %.3f and %.3f\n", joints[0].position(), joints[1].position());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "joint_500hz: %s\n", error.what());
    return 1;
  }
}
