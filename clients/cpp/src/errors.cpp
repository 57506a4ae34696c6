#include <algorithm>
#include <cctype>
#include <cstdlib>

#include "failures.hpp"

namespace lom_client {
namespace {

constexpr std::size_t kMostDetailChars = 300;

constexpr std::string_view kStatusNames[] = {
    "OK",           "CANCELLED",         "UNKNOWN",           "INVALID_ARGUMENT",    "DEADLINE_EXCEEDED",
    "NOT_FOUND",    "ALREADY_EXISTS",    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED",  "FAILED_PRECONDITION",
    "ABORTED",      "OUT_OF_RANGE",      "UNIMPLEMENTED",     "INTERNAL",            "UNAVAILABLE",
    "DATA_LOSS",    "UNAUTHENTICATED"};

std::string_view name_of_status(int code) {
  const bool is_known = code >= 0 && static_cast<std::size_t>(code) < std::size(kStatusNames);
  return is_known ? kStatusNames[code] : "UNKNOWN";
}

Failure failure_of(int code, std::string_view reason) {
  switch (code) {
    case grpc::INVALID_ARGUMENT:
    case grpc::OUT_OF_RANGE:
      return Failure::kInvalidRequest;
    case grpc::UNAUTHENTICATED:
    case grpc::PERMISSION_DENIED:
      return Failure::kNotPermitted;
    case grpc::NOT_FOUND:
      return Failure::kPolicyNotFound;
    case grpc::RESOURCE_EXHAUSTED:
      return Failure::kOverloaded;
    case grpc::DEADLINE_EXCEEDED:
      return Failure::kDeadlineExceeded;
    case grpc::UNAVAILABLE:
      return Failure::kServerUnavailable;
    case grpc::FAILED_PRECONDITION:
      return reason == "CONTRACT_MISMATCH" ? Failure::kContractMismatch : Failure::kServerFault;
    case grpc::ABORTED:
      return reason == "SUPERSEDED" ? Failure::kSuperseded : Failure::kServerFault;
    default:
      return Failure::kServerFault;
  }
}

/// Length of the `REASON_CODE` that `message` starts with, 0 where there is none.
std::size_t length_of_code(std::string_view message) {
  const std::size_t colon = message.find(": ");
  if (colon == std::string_view::npos || colon < 3 || colon > 48 || std::isupper(message[0]) == 0) {
    return 0;
  }
  const bool is_code = std::all_of(message.begin(), message.begin() + colon, [](unsigned char c) {
    return (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
  });
  return is_code ? colon : 0;
}

std::optional<double> retry_hint(std::string_view detail) {
  constexpr std::string_view kHint = "retry_after_ms ";
  const std::size_t at = detail.find(kHint);
  if (at == std::string_view::npos) {
    return std::nullopt;
  }
  const std::string_view rest = detail.substr(at + kHint.size());
  const std::size_t digits = std::min(rest.find_first_not_of("0123456789"), rest.size());
  if (digits == 0 || digits > 9) {
    return std::nullopt;
  }
  return static_cast<double>(std::atoll(std::string(rest.substr(0, digits)).c_str())) * 1e-3;
}

}  // namespace

std::string_view name_of(Failure failure) {
  constexpr std::string_view kNames[] = {"invalid_request",   "not_permitted",      "policy_not_found", "contract_mismatch",
                                         "overloaded",        "superseded",         "deadline_exceeded",
                                         "server_unavailable", "server_fault",       "bad_reply",        "client_closed"};
  return kNames[static_cast<int>(failure)];
}

bool Error::is_retryable() const {
  return failure == Failure::kOverloaded || failure == Failure::kDeadlineExceeded ||
         failure == Failure::kServerUnavailable;
}

Error error_from_status(int code, const std::string& message) {
  // gRPC's own texts: they carry no reason code, and their status alone would name the wrong culprit.
  if (code == grpc::RESOURCE_EXHAUSTED && message.find("essage larger than max") != std::string::npos) {
    const bool is_theirs = message.rfind("Received", 0) == 0 || message.rfind("CLIENT: Received", 0) == 0;
    return {is_theirs ? Failure::kBadReply : Failure::kInvalidRequest, "MESSAGE_TOO_LARGE", printable(message), {}};
  }
  const std::size_t coded = length_of_code(message);
  const std::string reason = coded != 0 ? message.substr(0, coded) : std::string(name_of_status(code));
  const std::string detail = coded != 0 ? message.substr(coded + 2) : message;
  return {failure_of(code, reason), reason, printable(detail), retry_hint(detail)};
}

Error out_of_time() { return failed(Failure::kDeadlineExceeded, "DEADLINE_EXCEEDED", "no answer before the deadline"); }

Error client_closed() { return failed(Failure::kClientClosed, "CLIENT_CLOSED", "this client was closed"); }

Error malformed_reply() {
  return failed(Failure::kBadReply, "MALFORMED_MESSAGE", "the reply is not the message that the contract names");
}

std::string printable(std::string_view text) {
  std::string line(text.substr(0, kMostDetailChars));
  std::replace_if(
      line.begin(), line.end(), [](unsigned char c) { return c < 0x20 || c > 0x7e; }, ' ');
  return line;
}

}  // namespace lom_client
