// A ControlLoop that a test drives and watches; every line of stdout is JSON: ticks, events, and the sum at the end.
//
//   loop_probe TARGET CONFIG
//
// Tick n observes (n * 1e-5, 0.9 sin(n / 7), 0), so that an action tells which observation it answers. Lines of stdin:
// "rearm", "stop", "switch VARIANT", "pause SECONDS", "nan TICKS"; their end closes the loop.

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <iostream>
#include <limits>
#include <mutex>
#include <nlohmann/json.hpp>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "counting_new.hpp"
#include "lom_client/control_loop.hpp"

namespace {

using Json = nlohmann::json;
using Clock = std::chrono::steady_clock;

std::mutex printing;

void print(const Json& line) {
  const std::lock_guard lock(printing);
  std::cout << line.dump() << std::endl;
}

lom_client::Kind kind_of(const std::string& name) {
  return name == "position"   ? lom_client::Kind::kPosition
         : name == "velocity" ? lom_client::Kind::kVelocity
                              : lom_client::Kind::kTorque;
}

lom_client::LoopConfig config_of(const Json& said) {
  lom_client::LoopConfig config;
  config.period_s = said.value("period_s", 0.01);
  config.kinds = {kind_of(said.value("kinds", "position"))};
  config.safe_action = {said.value("safe_action", 0.0)};
  if (!said.value("asks_bounds", false)) {
    config.action_bounds = lom_client::Bounds{{-1.0, -1.0}, {1.0, 1.0}};
  }
  if (said.contains("slew_per_s")) {
    config.slew_per_s = {said["slew_per_s"].get<double>()};
  }
  if (said.contains("deadline_s")) {
    config.deadline_s = said["deadline_s"].get<double>();
  }
  if (said.contains("max_age_s")) {
    config.max_age_s = said["max_age_s"].get<double>();
  }
  config.blend_ticks = said.value("blend_ticks", 0);
  config.connect_deadline_s = said.value("connect_deadline_s", config.connect_deadline_s);
  config.variant = said.value("variant", "actor");
  config.hysteresis_width = said.value("hysteresis_width", 0.0f);
  if (said.value("fallback", "") == "half") {
    config.fallback = [](auto, auto, auto answer) {
      std::fill(answer.begin(), answer.end(), 0.5);
      return true;
    };
  }
  return config;
}

Json said(const lom_client::LoopAction& action) {
  return {{"tick", action.tick},
          {"values", action.values},
          {"source", lom_client::name_of(action.source)},
          {"level", lom_client::name_of(action.level)},
          {"age_s", action.age_s ? Json(*action.age_s) : Json()},
          {"reason", action.reason.str()},
          {"detail", action.detail.str()},
          {"flags", action.flags},
          {"mode", action.mode ? Json(*action.mode) : Json()},
          {"bundle_digest", action.bundle_digest.str()}};
}

struct Teller {
  void operator()(const lom_client::LevelChanged& event) const {
    print({{"event", "level"},
           {"tick", event.tick},
           {"before", lom_client::name_of(event.before)},
           {"after", lom_client::name_of(event.after)},
           {"reason", event.reason.str()}});
  }
  void operator()(const lom_client::BundleChanged& event) const {
    print({{"event", "bundle"}, {"tick", event.tick}, {"bundle_digest", event.bundle_digest.str()}});
  }
  void operator()(const lom_client::OutOfDistribution& event) const {
    print({{"event", "out_of_distribution"}, {"tick", event.tick}});
  }
  void operator()(const lom_client::LoopStalled& event) const {
    print({{"event", "stalled"}, {"tick", event.tick}, {"stalled_s", event.stalled_s}});
  }
};

Json said(const lom_client::LoopCounters& counters) {
  Json sources = Json::object();
  for (const auto& [source, number] : counters.sources) {
    sources[std::string(lom_client::name_of(source))] = number;
  }
  Json transitions = Json::array();
  for (const auto& [levels, number] : counters.transitions) {
    transitions.push_back({lom_client::name_of(levels.first), lom_client::name_of(levels.second), number});
  }
  std::int64_t aged = 0;
  for (const auto& [edge, number] : counters.ages_ms) {
    aged += number;
  }
  return {{"ticks", counters.ticks},       {"sources", sources},   {"misses", counters.misses},
          {"rejected", counters.rejected}, {"transitions", transitions}, {"aged", aged},
          {"fresh", counters.fresh()},     {"longest_miss_run", counters.longest_miss_run}};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: loop_probe TARGET CONFIG\n";
    return 2;
  }
  try {
    const Json options = Json::parse(argv[2]);
    const bool is_quiet = options.value("quiet", false);
    const std::int64_t warm_up = options.value("warm_up", 0);
    lom_client::ClientConfig client_config;
    client_config.use_stream = options.value("use_stream", false);
    lom_client::PolicyClient client(argv[1], client_config);
    lom_client::LoopConfig config = config_of(options);
    lom_client::ControlLoop loop(client, config, [](const lom_client::LoopEvent& event) { std::visit(Teller(), event); });

    std::atomic<bool> is_over{false};
    std::atomic<std::int64_t> nan_ticks{0};
    std::atomic<double> pause_s{0.0};
    std::atomic<double> close_s{0.0};
    std::thread operator_thread([&] {
      for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        std::string wish;
        words >> wish;
        if (wish == "rearm") {
          print({{"rearm", loop.rearm()}});
        } else if (wish == "stop") {
          loop.operator_stop();
        } else if (wish == "switch") {
          words >> config.variant;
          loop.switch_to(client, config);
        } else if (wish == "pause") {
          double seconds = 0;
          words >> seconds;
          pause_s = seconds;
        } else if (wish == "nan") {
          std::int64_t ticks = 0;
          words >> ticks;
          nan_ticks = ticks;
        }
      }
      const auto began = Clock::now();
      loop.close();
      close_s = std::chrono::duration<double>(Clock::now() - began).count();
      is_over = true;
    });

    const auto period = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(config.period_s));
    std::int64_t allocated = 0;
    std::int64_t measured_ticks = 0;
    double longest_s = 0.0;
    auto due = Clock::now();
    for (std::int64_t index = 1; !is_over; ++index) {
      std::this_thread::sleep_until(due);
      float observation[] = {static_cast<float>(1e-5 * static_cast<double>(index)),
                             0.9f * std::sin(static_cast<float>(index) / 7.0f), 0.0f};
      if (nan_ticks > 0) {
        --nan_ticks;
        observation[1] = std::numeric_limits<float>::quiet_NaN();
      }
      const std::int64_t before = allocations_of_this_thread();
      const auto began = Clock::now();
      const lom_client::LoopAction& action = loop.step(observation);
      const double took_s = std::chrono::duration<double>(Clock::now() - began).count();
      if (index > warm_up) {
        allocated += allocations_of_this_thread() - before;
        ++measured_ticks;
        longest_s = std::max(longest_s, took_s);
      }
      if (!is_quiet || index == 1) {
        Json line = said(action);
        line["took_s"] = took_s;
        print(line);
      }
      due += period;
      if (pause_s > 0) {
        std::this_thread::sleep_for(std::chrono::duration<double>(pause_s.exchange(0)));
      }
      if (due < Clock::now()) {
        due = Clock::now();  // a tick that is over is not caught up
      }
    }
    operator_thread.join();
    const lom_client::LoopAction closed = loop.step(std::vector<float>{0.0f, 0.0f, 0.0f});
    print({{"end", said(loop.counters())},
           {"allocated", allocated},
           {"measured_ticks", measured_ticks},
           {"longest_s", longest_s},
           {"close_s", close_s.load()},
           {"after_close", said(closed)}});
  } catch (const std::exception& error) {
    print({{"refused", error.what()}});
    return 1;
  }
}
