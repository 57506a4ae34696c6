#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <utility>

namespace lom_client {

/// What gRPC still works on for a connection. A channel must not end on gRPC's own thread, which would wait for itself, nor
/// after `main`: so every call's context, which keeps the channel alive, has to be gone before the connection goes.
/// Threads: any.
class InFlight {
 public:
  /// Something that gRPC works on, as long as it lives.
  class Token {
   public:
    explicit Token(std::shared_ptr<InFlight> all) : all_(std::move(all)) {
      const std::lock_guard lock(all_->mutex_);
      ++all_->number_;
    }
    ~Token() {
      const std::lock_guard lock(all_->mutex_);  // released before `all_`
      if (--all_->number_ == 0) {
        all_->none_.notify_all();
      }
    }
    Token(const Token&) = delete;
    Token& operator=(const Token&) = delete;

   private:
    const std::shared_ptr<InFlight> all_;
  };

  void wait_until_none() {
    std::unique_lock lock(mutex_);
    none_.wait(lock, [this] { return number_ == 0; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable none_;
  int number_ = 0;
};

}  // namespace lom_client
