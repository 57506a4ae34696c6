#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <random>

namespace lom_client {

/// Asks no more than about twice as often as is answered, and not before the server wishes.
///
/// With more refusals than answers of late, a request is left out with probability
/// (requests - 2 * answers) / (requests + 1), where the past counts less by a factor e every second. Threads: one.
class Throttle {
 public:
  Throttle() : Throttle([engine = std::minstd_rand(std::random_device()())]() mutable {
    return std::uniform_real_distribution<double>(0.0, 1.0)(engine);
  }) {}
  /// `chance` draws from [0, 1).
  explicit Throttle(std::function<double()> chance) : chance_(std::move(chance)) {}

  /// Whether to ask at `now`, in monotonic seconds; counts the wish.
  bool lets_ask(double now) {
    const double fading = std::exp(std::min(0.0, counted_at_ - now));
    requests_ *= fading;
    accepted_ *= fading;
    counted_at_ = now;
    if (now < not_before_) {
      return false;
    }
    const double left_out = (requests_ - 2.0 * accepted_) / (requests_ + 1.0);
    requests_ += 1.0;
    return chance_() >= left_out;
  }

  /// The server did not refuse for want of capacity.
  void was_answered() { accepted_ += 1.0; }

  /// The server refused, and asks to be left alone for so long.
  void was_refused(double now, std::optional<double> retry_after_s) {
    if (retry_after_s) {
      not_before_ = now + *retry_after_s;
    }
  }

 private:
  std::function<double()> chance_;
  double requests_ = 0.0;
  double accepted_ = 0.0;
  double counted_at_ = 0.0;
  double not_before_ = -std::numeric_limits<double>::infinity();
};

}  // namespace lom_client
