#pragma once

#include <grpcpp/support/status.h>

#include <sstream>
#include <string>
#include <string_view>

#include "lom_client/errors.hpp"

namespace lom_client {

/// The one mapping from a gRPC status to a failure.
Error error_from_status(int code, const std::string& message);

Error out_of_time();
Error client_closed();
Error malformed_reply();

/// A stranger's text as one line of bounded length that cannot steer a terminal or forge a log line.
std::string printable(std::string_view text);

/// An error whose detail is made of `parts`.
template <typename... Parts>
Error failed(Failure failure, std::string_view reason, const Parts&... parts) {
  std::ostringstream detail;
  (detail << ... << parts);
  return {failure, std::string(reason), detail.str(), std::nullopt};
}

}  // namespace lom_client
