#pragma once

#include <string>
#include <string_view>

#include "lom_client/policy_client.hpp"

namespace lom_client {

/// A server's address, in gRPC's own notation. `is_private`: nobody on the way can read along.
struct Target {
  std::string address;
  bool is_tls = false;
  bool is_private = false;
};

/// Throws std::invalid_argument for anything but `grpc://HOST:PORT`, `grpcs://HOST:PORT` and `unix:/PATH`.
Target parse_target(std::string_view text);

/// Throws std::invalid_argument where a value is out of range, two contradict each other, or one has no use, or does
/// harm, on the way to `target`.
void check_config(const ClientConfig& config, const Target& target);

/// Contents of the files that `config` names; empty where it names none.
struct Secrets {
  std::string tls_ca;
  std::string tls_certificate;
  std::string tls_key;
  std::string token;
};

/// Throws std::invalid_argument where a file is not usable. Quotes no secret.
Secrets read_secrets(const ClientConfig& config);

}  // namespace lom_client
