#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>

#include "bell.hpp"
#include "lom_client/control_loop.hpp"

namespace lom_client {

/// Calls the hook in a thread of its own, and watches that the loop goes on.
///
/// Threads: one reports and notes its steps, without waiting; any other may close.
class EventReporter {
 public:
  EventReporter(std::function<void(const LoopEvent&)> hook, std::int64_t stall_ns);
  ~EventReporter() { close(); }

  /// Ends the thread, unless the hook holds it up for longer than 0.05 s: then the thread ends by itself, after the hook.
  void close();

  /// Has it told; it is lost where too many wait already.
  void report(const LoopEvent& event) noexcept;

  /// `step` was called, for this tick.
  void note_step(std::int64_t tick, std::int64_t at_ns) noexcept;

  std::int64_t lost() const noexcept;

 private:
  struct Shared;
  std::shared_ptr<Shared> shared_;
};

}  // namespace lom_client
