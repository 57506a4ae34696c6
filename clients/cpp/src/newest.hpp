#pragma once

#include <array>
#include <atomic>
#include <cstdint>

namespace lom_client {

/// A slot in which the newest message takes the place of the one before. Nobody waits for anybody: of three messages one is
/// being written, one is being read, and one is handed over by an atomic exchange.
///
/// Threads: one that writes, one that reads.
template <typename Message>
class Newest {
 public:
  /// Has `prepare` see every message, before there are two threads.
  template <typename Prepare>
  void prepare_each(Prepare prepare) {
    for (Message& message : messages_) {
      prepare(message);
    }
  }

  /// To be filled by the writer, then published. It holds what was written three messages ago.
  Message& draft() { return messages_[written_]; }

  void publish() {
    written_ = between_.exchange(written_ | kIsNew, std::memory_order_acq_rel) & kIndex;
  }

  /// The newest message, valid until the next call; null where it was taken before.
  const Message* take() {
    if ((between_.load(std::memory_order_relaxed) & kIsNew) == 0) {
      return nullptr;
    }
    read_ = between_.exchange(read_, std::memory_order_acq_rel) & kIndex;
    return &messages_[read_];
  }

 private:
  static constexpr std::uint8_t kIndex = 3;
  static constexpr std::uint8_t kIsNew = 4;

  std::array<Message, 3> messages_{};
  std::uint8_t written_ = 0;
  std::uint8_t read_ = 1;
  std::atomic<std::uint8_t> between_{2};
};

}  // namespace lom_client
