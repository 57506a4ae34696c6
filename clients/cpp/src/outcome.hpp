#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "failures.hpp"

namespace lom_client {

/// Something that may end early. Threads: any.
class Endable {
 public:
  virtual ~Endable() = default;
  virtual void fail(const Error& error) = 0;
};

/// What somebody waits for; the first to settle it wins. Threads: any.
template <typename Reply>
class Outcome : public Endable {
 public:
  void settle(Result<Reply> result) {
    const std::lock_guard lock(mutex_);
    if (!result_) {
      result_.emplace(std::move(result));
      settled_.notify_all();
    }
  }

  void fail(const Error& error) override { settle(error); }

  /// The result, once it is there; none at `over_ns` of the monotonic clock.
  std::optional<Result<Reply>> wait_until(std::int64_t over_ns) {
    const std::chrono::steady_clock::time_point over{std::chrono::nanoseconds(over_ns)};
    std::unique_lock lock(mutex_);
    settled_.wait_until(lock, over, [&] { return result_.has_value(); });
    return result_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable settled_;
  std::optional<Result<Reply>> result_;
};

/// What ends together. Threads: any.
class Group {
 public:
  /// False where the group has ended already.
  bool add(const std::shared_ptr<Endable>& member) {
    const std::lock_guard lock(mutex_);
    if (!has_ended_) {
      members_.push_back(member);
    }
    return !has_ended_;
  }

  void remove(const std::shared_ptr<Endable>& member) {
    const std::lock_guard lock(mutex_);
    members_.erase(std::remove(members_.begin(), members_.end(), member), members_.end());
  }

  /// Has every member, and every later one, fail with CLIENT_CLOSED.
  void end() {
    const std::lock_guard lock(mutex_);
    has_ended_ = true;
    for (const auto& member : members_) {
      member->fail(client_closed());
    }
  }

 private:
  std::mutex mutex_;
  bool has_ended_ = false;
  std::vector<std::shared_ptr<Endable>> members_;
};

}  // namespace lom_client
