#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

namespace lom_client {

/// What kind of failure brought no action.
enum class Failure {
  kInvalidRequest,     ///< The request contradicts the policy's contract; found here before sending, or by the server.
  kNotPermitted,       ///< The server does not know who asks, or does not allow it.
  kPolicyNotFound,     ///< The server does not serve the policy, or the version of it, that was asked for.
  kContractMismatch,   ///< The policy has other spaces than the ones that this client agreed on.
  kOverloaded,         ///< The server refused at once because it could not have answered in time.
  kSuperseded,         ///< A later call on the same stream took this one's place.
  kDeadlineExceeded,   ///< No answer before the deadline.
  kServerUnavailable,  ///< There is no connection, or the server is shutting down. It is renewed in the background.
  kServerFault,        ///< The server failed while it worked on a sound request, or is no policy server.
  kBadReply,           ///< The server answered something that must not reach a robot.
  kClientClosed,       ///< `close()` was called, before or during this call.
};

/// `invalid_request`, `not_permitted`, ...
std::string_view name_of(Failure failure);

/// A policy call that brought no action.
struct Error {
  Failure failure = Failure::kServerFault;
  /// A code of the wire, the name of a gRPC status where the server gave none, or a code of this client.
  std::string reason;
  /// One printable line: what was wrong, what was expected, what was got.
  std::string detail;
  /// How long the server asks to be left alone, in seconds.
  std::optional<double> retry_after_s;

  /// Whether the same request may succeed later without anybody changing anything. It is never permission to repeat the
  /// call within one control tick: a retried action is a stale one.
  bool is_retryable() const;
};

/// A value, or why there is none. A control path has no use for exceptions.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : held_(std::in_place_index<0>, std::move(value)) {}
  Result(Error error) : held_(std::in_place_index<1>, std::move(error)) {}

  explicit operator bool() const { return held_.index() == 0; }

  /// Only where there is one; std::bad_variant_access otherwise.
  const T& value() const& { return std::get<0>(held_); }
  T&& value() && { return std::get<0>(std::move(held_)); }
  const T& operator*() const& { return value(); }
  const T* operator->() const { return &value(); }

  /// Only where there is no value.
  const Error& error() const { return std::get<1>(held_); }

 private:
  std::variant<T, Error> held_;
};

}  // namespace lom_client
