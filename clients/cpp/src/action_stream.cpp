#include "action_stream.hpp"

#include <deque>
#include <map>
#include <utility>
#include <vector>

#include "clock.hpp"
#include "failures.hpp"
#include "wire_bytes.hpp"

namespace lom_client {
namespace {

// A server ends a stream that is idle, by default after 5 s, and a connection that is old, with 10 s for what is under
// way. A request must not meet either end, so a stream is left before.
constexpr std::int64_t kLongestIdleNs = 2'000'000'000;
constexpr std::int64_t kLongestLifeNs = 8'000'000'000;

using Waiting = std::shared_ptr<Outcome<wire::ActReply>>;

Result<wire::ActReply> reply_in(wire::ActStreamReply& message) {
  if (message.has_reply()) {
    return std::move(*message.mutable_reply());
  }
  if (!message.has_refusal()) {
    return failed(Failure::kBadReply, "EMPTY_REPLY", "expected a reply or a refusal, got neither");
  }
  Error error = error_from_status(static_cast<int>(message.refusal().code()), message.refusal().message());
  if (message.refusal().retry_after_ms() != 0) {
    error.retry_after_s = static_cast<double>(message.refusal().retry_after_ms()) * 1e-3;
  }
  return error;
}

}  // namespace

/// One stream, from its first request to its end; keeps itself alive until gRPC has no more use for it.
class OpenStream : public grpc::ClientBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>,
                   public std::enable_shared_from_this<OpenStream> {
 public:
  explicit OpenStream(std::shared_ptr<InFlight> streams) : token_(std::move(streams)) {}

  void begin(grpc::GenericStub& stub, const std::string& token) {
    self_ = shared_from_this();
    if (!token.empty()) {
      context_.AddMetadata("authorization", "Bearer " + token);
    }
    stub.PrepareBidiStreamingCall(&context_, "/lom_api.v1.PolicyService/ActStream", grpc::StubOptions(), this);
    AddHold();  // writes begin outside of reactions
    StartRead(&read_);
    StartCall();
  }

  /// False where the stream cannot take one more; the next one can.
  bool ask(const wire::ActRequest& request, std::int64_t over_ns, const Waiting& outcome) {
    std::unique_lock lock(mutex_);
    const std::int64_t now = now_ns();
    if (is_over_ || is_left_ || now > began_ns_ + kLongestLifeNs || now > asked_ns_ + kLongestIdleNs) {
      return false;
    }
    asked_ns_ = now;
    waiting_[request.sequence()] = outcome;
    outbox_.push_back({request, over_ns});
    write_next(lock);
    return true;
  }

  void forget(std::uint64_t sequence) {
    const std::lock_guard lock(mutex_);
    waiting_.erase(sequence);
    cancel_if_unneeded();
  }

  /// Ends the stream with the last answer that somebody waits for.
  void leave() {
    const std::lock_guard lock(mutex_);
    is_left_ = true;
    cancel_if_unneeded();
  }

  void cancel() { context_.TryCancel(); }

  void OnReadDone(bool ok) override {
    wire::ActStreamReply message;
    const bool is_readable = ok && from_bytes(read_, message);
    {
      std::unique_lock lock(mutex_);
      if (!is_readable) {
        is_malformed_ = ok;
        is_over_ = true;
        release(lock);
      } else {
        const auto found = waiting_.find(message.sequence());
        if (found != waiting_.end()) {
          found->second->settle(reply_in(message));
          waiting_.erase(found);
        }
        cancel_if_unneeded();
      }
    }
    if (is_readable) {
      StartRead(&read_);
    } else if (ok) {
      context_.TryCancel();
    }
  }

  void OnWriteDone(bool ok) override {
    std::unique_lock lock(mutex_);
    is_writing_ = false;
    if (!ok) {
      is_over_ = true;
    }
    if (is_over_) {
      release(lock);
    } else {
      write_next(lock);
    }
  }

  void OnDone(const grpc::Status& status) override {
    std::shared_ptr<OpenStream> self;  // outlives the lock
    const std::lock_guard lock(mutex_);
    const Error error =
        is_malformed_ ? malformed_reply()
        : status.ok() ? failed(Failure::kServerUnavailable, "STREAM_ENDED",
                               "the server ended the stream before it answered")
                      : error_from_status(status.error_code(), status.error_message());
    for (const auto& [sequence, outcome] : waiting_) {
      outcome->fail(error);
    }
    waiting_.clear();
    self = std::move(self_);
  }

 private:
  struct Question {
    wire::ActRequest request;
    std::int64_t over_ns;
  };

  /// Sends what somebody still waits for. Unlocks `lock` before it calls gRPC.
  void write_next(std::unique_lock<std::mutex>& lock) {
    while (!is_writing_ && !outbox_.empty()) {
      Question question = std::move(outbox_.front());
      outbox_.pop_front();
      const std::int64_t budget_ns = question.over_ns - now_ns();
      if (budget_ns <= 0 || waiting_.count(question.request.sequence()) == 0) {
        continue;
      }
      question.request.set_budget_ns(static_cast<std::uint64_t>(budget_ns));
      write_ = to_bytes(question.request);
      is_writing_ = true;
      lock.unlock();
      StartWrite(&write_);
      return;
    }
  }

  /// Gives up the hold, once nobody will write any more.
  void release(std::unique_lock<std::mutex>& lock) {
    if (is_writing_ || is_released_) {
      return;
    }
    is_released_ = true;
    lock.unlock();
    RemoveHold();
  }

  void cancel_if_unneeded() {
    if (is_left_ && waiting_.empty()) {
      context_.TryCancel();
    }
  }

  const InFlight::Token token_;  // outlives the context
  const std::int64_t began_ns_ = now_ns();
  std::int64_t asked_ns_ = began_ns_;
  grpc::ClientContext context_;
  grpc::ByteBuffer read_;
  grpc::ByteBuffer write_;
  std::mutex mutex_;
  bool is_over_ = false;
  bool is_left_ = false;
  bool is_malformed_ = false;
  bool is_writing_ = false;
  bool is_released_ = false;
  std::deque<Question> outbox_;
  std::map<std::uint64_t, Waiting> waiting_;
  std::shared_ptr<OpenStream> self_;
};

ActionStream::ActionStream(grpc::GenericStub& stub, const std::string& token, std::shared_ptr<InFlight> in_flight)
    : stub_(stub), token_(token), in_flight_(std::move(in_flight)) {}

ActionStream::~ActionStream() { close(); }

std::shared_ptr<OpenStream> ActionStream::act(wire::ActRequest& request, std::int64_t over_ns, const Waiting& outcome) {
  request.set_supersede(true);
  const std::lock_guard lock(mutex_);  // sequence numbers must leave in their order
  if (is_closed_) {
    outcome->fail(client_closed());
    return nullptr;
  }
  request.set_sequence(++sequence_);
  if (open_ == nullptr || !open_->ask(request, over_ns, outcome)) {
    if (open_ != nullptr) {
      open_->leave();
    }
    open_ = std::make_shared<OpenStream>(in_flight_);
    open_->begin(stub_, token_);
    if (!open_->ask(request, over_ns, outcome)) {
      outcome->fail(failed(Failure::kServerUnavailable, "STREAM_ENDED", "the stream ended before it was asked"));
    }
  }
  return open_;
}

void ActionStream::forget(const std::shared_ptr<OpenStream>& stream, std::uint64_t sequence) {
  if (stream != nullptr) {
    stream->forget(sequence);
  }
}

void ActionStream::close() {
  const std::lock_guard lock(mutex_);
  is_closed_ = true;
  if (open_ != nullptr) {
    open_->cancel();
    open_ = nullptr;
  }
}

}  // namespace lom_client
