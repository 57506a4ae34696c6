#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <thread>

#include "bell.hpp"
#include "clock.hpp"
#include "event_reporter.hpp"
#include "loop_tally.hpp"
#include "newest.hpp"

namespace lom_client {
namespace {

TEST(Newest, GivesEachMessageOnceAndTheNewestOnly) {
  Newest<int> slot;
  EXPECT_EQ(slot.take(), nullptr);
  slot.draft() = 1;
  slot.publish();
  slot.draft() = 2;
  slot.publish();
  const int* taken = slot.take();
  ASSERT_NE(taken, nullptr);
  EXPECT_EQ(*taken, 2);
  slot.draft() = 3;  // must not be what is being read
  EXPECT_EQ(*taken, 2);
  EXPECT_EQ(slot.take(), nullptr);
}

TEST(Newest, IsNeverTornAndNeverGoesBack) {
  constexpr std::int64_t kMessages = 200'000;
  Newest<std::array<std::int64_t, 64>> slot;
  std::thread writer([&] {
    for (std::int64_t number = 1; number <= kMessages; ++number) {
      slot.draft().fill(number);
      slot.publish();
    }
  });
  std::int64_t last = 0;
  while (last < kMessages) {
    if (const auto* message = slot.take()) {
      for (const std::int64_t number : *message) {
        ASSERT_EQ(number, message->front());
      }
      ASSERT_GT(message->front(), last);
      last = message->front();
    }
  }
  writer.join();
}

TEST(Bell, WakesWhoeverWaitsAndIsForgottenThen) {
  Bell bell;
  bell.ring();
  bell.ring();
  const std::int64_t began_ns = now_ns();
  bell.wait_until(began_ns + 10 * kNsPerS);
  EXPECT_LT(now_ns() - began_ns, 5 * kNsPerS);
  const std::int64_t again_ns = now_ns();
  bell.wait_until(again_ns + 20'000'000);
  EXPECT_GE(now_ns() - again_ns, 20'000'000);
  bell.wait_until(0);  // over already
}

Command command_of(Source source, const char* reason = "") {
  Command command;
  command.source = source;
  command.level = static_cast<Level>(source);
  command.reason = reason;
  command.age_ns = 1'000'000;
  return command;
}

TEST(LoopTally, AddsUpWhoeverLooks) {
  LoopTally tally;
  std::atomic<bool> is_over{false};
  std::thread looker([&] {
    while (!is_over) {
      const LoopCounters counters = tally.snapshot();
      std::int64_t missed = 0;
      for (const auto& [reason, number] : counters.misses) {
        missed += number;
      }
      ASSERT_EQ(counters.fresh() + missed, counters.ticks);
    }
  });
  for (int i = 0; i < 50'000; ++i) {
    tally.count(command_of(Source::kFresh));
    tally.count(command_of(Source::kHold, "STALE"));
  }
  is_over = true;
  looker.join();
  tally.count(Rejected{"LATE"});
  const LoopCounters counters = tally.snapshot();
  EXPECT_EQ(counters.ticks, 100'000);
  EXPECT_EQ(counters.misses.at("STALE"), 50'000);
  EXPECT_EQ(counters.rejected.at("LATE"), 1);
  EXPECT_EQ(counters.longest_miss_run, 1);
  EXPECT_EQ(counters.ages_ms.at(1.0), 50'000);
  EXPECT_EQ(counters.transitions.at({Level::kNominal, Level::kDegraded}), 50'000);
  EXPECT_EQ(counters.fresh_share(), 0.5);
}

TEST(LoopTally, HasRoomForAHundredReasons) {
  LoopTally tally;
  for (int i = 0; i < 150; ++i) {
    tally.count(Rejected{"REASON_" + std::to_string(i)});
  }
  const LoopCounters counters = tally.snapshot();
  EXPECT_EQ(counters.rejected.size(), 101u);
  EXPECT_EQ(counters.rejected.at("OTHER"), 50);
}

TEST(EventReporter, TellsInOrderAndNoticesThatTheLoopStopped) {
  std::atomic<int> told{0};
  std::atomic<std::int64_t> stalled_at{0};
  EventReporter reporter(
      [&](const LoopEvent& event) {
        if (const auto* changed = std::get_if<OutOfDistribution>(&event)) {
          EXPECT_EQ(changed->tick, ++told);
        } else if (const auto* stalled = std::get_if<LoopStalled>(&event)) {
          stalled_at = stalled->tick;
        }
      },
      20'000'000);
  for (int tick = 1; tick <= 100; ++tick) {
    reporter.report(OutOfDistribution{tick});
  }
  reporter.note_step(7, now_ns());
  const std::int64_t patience_ns = now_ns() + 20 * kNsPerS;
  while ((told < 100 || stalled_at == 0) && now_ns() < patience_ns) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_EQ(told, 100);
  EXPECT_EQ(stalled_at, 7);
  EXPECT_EQ(reporter.lost(), 0);
}

TEST(EventReporter, DoesNotWaitForAHookThatHangs) {
  std::atomic<bool> may_go{false};
  std::atomic<bool> is_in{false};
  {
    EventReporter reporter(
        [&](const LoopEvent&) {
          is_in = true;
          while (!may_go) {
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
          }
          is_in = false;
        },
        kNsPerS);
    for (int tick = 0; tick < 1000; ++tick) {
      reporter.report(OutOfDistribution{tick});
    }
    EXPECT_GE(reporter.lost(), 700);
    while (!is_in) {
      std::this_thread::yield();
    }
  }
  may_go = true;
  while (is_in) {
    std::this_thread::yield();
  }
}

}  // namespace
}  // namespace lom_client
