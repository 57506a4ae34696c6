#include "loop_tally.hpp"

#include <algorithm>
#include <cmath>
#include <thread>

namespace lom_client {
namespace {

constexpr std::int64_t kNsPerSixteenthMs = 62'500;
constexpr std::size_t kLargestExponent = 46;  // 140 years, and no overflow

void add_one(std::atomic<std::int64_t>& number) {
  number.store(number.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
}

/// The power of two of 1/16 ms at or above the age, by its exponent.
std::size_t exponent_of(std::int64_t age_ns) {
  std::size_t exponent = 0;
  while (exponent < kLargestExponent && (kNsPerSixteenthMs << exponent) < age_ns) {
    ++exponent;
  }
  return exponent;
}

}  // namespace

/// While it lives, whoever looks will look again.
class LoopTally::Writing {
 public:
  explicit Writing(std::atomic<std::uint64_t>& version) : version_(version) {
    version_.store(version_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_release);
  }
  ~Writing() { version_.store(version_.load(std::memory_order_relaxed) + 1, std::memory_order_release); }

 private:
  std::atomic<std::uint64_t>& version_;
};

void LoopTally::count(const Rejected& rejected) noexcept {
  const Writing writing(version_);
  add_one(known(rejected.reason).rejected);
}

void LoopTally::count(const Command& command) noexcept {
  const Writing writing(version_);
  add_one(sources_[static_cast<std::size_t>(command.source)]);
  if (command.level != level_) {
    add_one(transitions_[static_cast<std::size_t>(level_)][static_cast<std::size_t>(command.level)]);
    level_ = command.level;
  }
  if (command.source == Source::kFresh) {
    miss_run_ = 0;
    add_one(ages_[exponent_of(command.age_ns.value_or(0))]);
    return;
  }
  add_one(known(command.reason).misses);
  ++miss_run_;
  longest_miss_run_.store(std::max(miss_run_, longest_miss_run_.load(std::memory_order_relaxed)),
                          std::memory_order_relaxed);
}

LoopTally::Counted& LoopTally::known(const Reason& reason) noexcept {
  const std::size_t number = num_reasons_.load(std::memory_order_relaxed);
  for (std::size_t i = 0; i < number; ++i) {
    if (reasons_[i].reason == reason) {
      return reasons_[i];
    }
  }
  if (number == kMostReasons) {
    return reasons_[kMostReasons];
  }
  reasons_[number].reason = reason;
  num_reasons_.store(number + 1, std::memory_order_release);
  return reasons_[number];
}

LoopCounters LoopTally::snapshot() const {
  while (true) {
    const std::uint64_t before = version_.load(std::memory_order_acquire);
    if (before % 2 == 0) {
      LoopCounters counters = read();
      std::atomic_thread_fence(std::memory_order_acquire);
      if (version_.load(std::memory_order_relaxed) == before) {
        return counters;
      }
    }
    std::this_thread::yield();
  }
}

LoopCounters LoopTally::read() const {
  LoopCounters counters;
  const auto put = [](auto& numbers, const auto& key, const Number& number) {
    const std::int64_t value = number.load(std::memory_order_relaxed);
    if (value != 0) {
      numbers[key] = value;
    }
    return value;
  };
  for (std::size_t i = 0; i < sources_.size(); ++i) {
    counters.ticks += put(counters.sources, static_cast<Source>(i), sources_[i]);
  }
  for (std::size_t from = 0; from < transitions_.size(); ++from) {
    for (std::size_t to = 0; to < transitions_.size(); ++to) {
      put(counters.transitions, std::pair(static_cast<Level>(from), static_cast<Level>(to)), transitions_[from][to]);
    }
  }
  for (std::size_t exponent = 0; exponent < ages_.size(); ++exponent) {
    put(counters.ages_ms, std::ldexp(1.0 / 16, static_cast<int>(exponent)), ages_[exponent]);
  }
  for (std::size_t i = 0; i < num_reasons_.load(std::memory_order_acquire); ++i) {
    put(counters.misses, reasons_[i].reason.str(), reasons_[i].misses);
    put(counters.rejected, reasons_[i].reason.str(), reasons_[i].rejected);
  }
  put(counters.misses, "OTHER", reasons_[kMostReasons].misses);
  put(counters.rejected, "OTHER", reasons_[kMostReasons].rejected);
  counters.longest_miss_run = longest_miss_run_.load(std::memory_order_relaxed);
  return counters;
}

std::int64_t LoopCounters::fresh() const {
  const auto found = sources.find(Source::kFresh);
  return found == sources.end() ? 0 : found->second;
}

double LoopCounters::fresh_share() const {
  return ticks == 0 ? 0.0 : static_cast<double>(fresh()) / static_cast<double>(ticks);
}

}  // namespace lom_client
