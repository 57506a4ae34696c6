#pragma once

#include <semaphore.h>
#include <time.h>

#include <cstdint>

#include "lom_client/level_rules.hpp"

namespace lom_client {

/// Wakes whoever waits. Threads: any ring, without a lock; one waits.
class Bell {
 public:
  Bell() { sem_init(&rings_, 0, 0); }
  ~Bell() { sem_destroy(&rings_); }
  Bell(const Bell&) = delete;
  Bell& operator=(const Bell&) = delete;

  void ring() { sem_post(&rings_); }

  /// Returns once it was rung since the last wait, at the latest at `until_ns` of the monotonic clock; or earlier, for a
  /// signal.
  void wait_until(std::int64_t until_ns) {
    const timespec until{static_cast<time_t>(until_ns / kNsPerS), static_cast<long>(until_ns % kNsPerS)};
    sem_clockwait(&rings_, CLOCK_MONOTONIC, &until);
    while (sem_trywait(&rings_) == 0) {
    }
  }

 private:
  sem_t rings_;
};

}  // namespace lom_client
