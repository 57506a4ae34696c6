#include "event_reporter.hpp"

#include <cstdio>
#include <exception>
#include <thread>
#include <utility>

#include "clock.hpp"

namespace lom_client {
namespace {

constexpr std::size_t kMostWaiting = 256;
constexpr std::int64_t kLongestGoodbyeNs = 50'000'000;

}  // namespace

/// What outlives the reporter where the hook does.
struct EventReporter::Shared {
  std::function<void(const LoopEvent&)> hook;
  std::int64_t stall_ns = 0;
  std::array<LoopEvent, kMostWaiting> events{};
  std::atomic<std::uint64_t> written{0};
  std::atomic<std::uint64_t> read{0};
  std::atomic<std::int64_t> lost{0};
  std::atomic<std::int64_t> tick{0};
  std::atomic<std::int64_t> stepped_ns{0};
  std::atomic<bool> is_over{false};
  std::atomic<std::thread::id> thread{};
  Bell news;
  Bell goodbye;

  void run() {
    thread = std::this_thread::get_id();
    std::int64_t stalled_at = 0;
    while (!is_over) {
      const std::uint64_t next = read.load(std::memory_order_relaxed);
      if (next != written.load(std::memory_order_acquire)) {
        const LoopEvent event = events[next % kMostWaiting];
        read.store(next + 1, std::memory_order_release);
        tell(event);
        continue;
      }
      const std::int64_t now = now_ns();
      const std::int64_t last_tick = tick.load(std::memory_order_acquire);
      const std::int64_t since_ns = stepped_ns.load(std::memory_order_relaxed);
      const bool is_due = last_tick > 0 && last_tick != stalled_at;
      if (is_due && now - since_ns >= stall_ns) {
        stalled_at = last_tick;
        tell(LoopStalled{last_tick, static_cast<double>(now - since_ns) * 1e-9});
        continue;
      }
      news.wait_until((is_due ? since_ns : now) + stall_ns);
    }
    goodbye.ring();
  }

  void tell(const LoopEvent& event) noexcept {
    try {
      hook(event);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "lom_client: the hook of a control loop threw: %s\n", error.what());
    } catch (...) {
      std::fprintf(stderr, "lom_client: the hook of a control loop threw\n");
    }
  }
};

EventReporter::EventReporter(std::function<void(const LoopEvent&)> hook, std::int64_t stall_ns)
    : shared_(std::make_shared<Shared>()) {
  shared_->hook = std::move(hook);
  shared_->stall_ns = stall_ns;
  std::thread([shared = shared_] { shared->run(); }).detach();
}

void EventReporter::close() {
  if (shared_->is_over.exchange(true)) {
    return;
  }
  shared_->news.ring();
  if (shared_->thread.load() != std::this_thread::get_id()) {
    shared_->goodbye.wait_until(now_ns() + kLongestGoodbyeNs);
  }
}

void EventReporter::report(const LoopEvent& event) noexcept {
  const std::uint64_t next = shared_->written.load(std::memory_order_relaxed);
  if (next - shared_->read.load(std::memory_order_acquire) >= kMostWaiting) {
    shared_->lost.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  shared_->events[next % kMostWaiting] = event;
  shared_->written.store(next + 1, std::memory_order_release);
  shared_->news.ring();
}

void EventReporter::note_step(std::int64_t tick, std::int64_t at_ns) noexcept {
  shared_->stepped_ns.store(at_ns, std::memory_order_relaxed);
  shared_->tick.store(tick, std::memory_order_release);
}

std::int64_t EventReporter::lost() const noexcept { return shared_->lost.load(std::memory_order_relaxed); }

}  // namespace lom_client
