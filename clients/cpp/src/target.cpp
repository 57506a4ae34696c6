#include "target.hpp"

#include <arpa/inet.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <fstream>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace lom_client {
namespace {

constexpr std::size_t kLongestSocketPath = 107;  // bytes of sun_path in Linux, without its final zero
constexpr std::size_t kShortestToken = 16;

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

bool starts_with(std::string_view text, std::string_view start) { return text.substr(0, start.size()) == start; }

bool is_ipv4_loopback(const std::string& host) {
  in_addr address;
  return inet_pton(AF_INET, host.c_str(), &address) == 1 && (ntohl(address.s_addr) >> 24) == 127;
}

bool is_ipv6(const std::string& host) {
  in6_addr address;
  return inet_pton(AF_INET6, host.c_str(), &address) == 1;
}

bool is_host_name(std::string_view host) {
  const auto is_alnum = [](unsigned char c) { return std::isalnum(c) != 0; };
  const auto is_inner = [&](unsigned char c) { return is_alnum(c) || c == '.' || c == '_' || c == '-'; };
  return !host.empty() && is_alnum(host.front()) && is_alnum(host.back()) &&
         std::all_of(host.begin(), host.end(), is_inner);
}

bool parse_tcp(std::string_view rest, Target& target) {
  const std::size_t colon = rest.rfind(':');
  if (colon == std::string_view::npos) {
    return false;
  }
  std::string host(rest.substr(0, colon));
  const std::string port(rest.substr(colon + 1));
  const bool is_number = !port.empty() && port.size() <= 5 && port[0] != '0' &&
                         std::all_of(port.begin(), port.end(), [](unsigned char c) { return std::isdigit(c) != 0; });
  if (!is_number || std::stoi(port) > 65535) {
    return false;
  }
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    const std::string address = host.substr(1, host.size() - 2);
    if (!is_ipv6(address)) {
      return false;
    }
    target.is_private = target.is_tls || address == "::1";
  } else if (is_host_name(host)) {
    std::transform(host.begin(), host.end(), host.begin(), [](unsigned char c) { return std::tolower(c); });
    target.is_private = target.is_tls || host == "localhost" || is_ipv4_loopback(host);
  } else {
    return false;
  }
  target.address = "dns:///" + host + ":" + port;
  return true;
}

bool parse_unix(std::string_view path, Target& target) {
  const bool is_sound = starts_with(path, "/") && !starts_with(path, "//") && path.back() != '/' &&
                        path.size() <= kLongestSocketPath &&
                        std::none_of(path.begin(), path.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; });
  if (!is_sound) {
    return false;
  }
  target.address = "unix:";
  for (const unsigned char c : path) {
    if (std::isalnum(c) != 0 || std::string_view("_.-~/").find(static_cast<char>(c)) != std::string_view::npos) {
      target.address += static_cast<char>(c);
    } else {
      char escaped[4];
      std::snprintf(escaped, sizeof escaped, "%%%02X", c);
      target.address += escaped;
    }
  }
  target.is_private = true;
  return true;
}

void require_within(const char* name, double value, double low, double high) {
  // Written so that NaN fails as well.
  if (!(low <= value && value <= high)) {
    refuse(name, " must be between ", low, " and ", high, ", got ", value);
  }
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  // Reading a folder opens well and then fails.
  if (!file || !(content << file.rdbuf()) || file.bad()) {
    throw std::runtime_error("unreadable");
  }
  return content.str();
}

int no_password(char*, int, int, void*) { return -1; }

using SslContext = std::unique_ptr<SSL_CTX, decltype(&SSL_CTX_free)>;

std::string read_token(const std::string& path) {
  struct stat status {};
  std::string text;
  try {
    text = read_file(path);
  } catch (const std::exception&) {
    refuse("token_file: expected a readable file of ASCII text, got ", path);
  }
  if (stat(path.c_str(), &status) != 0 || (status.st_mode & 0077) != 0) {
    refuse("token_file: expected mode 0600 or 0400 of ", path);
  }
  std::vector<std::vector<std::string>> entries;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::vector<std::string> entry;
    for (std::string word; words >> word;) {
      entry.push_back(word);
    }
    if (!entry.empty() && entry[0][0] != '#') {
      entries.push_back(entry);
    }
  }
  // Quotes no word of the file: any of them may be a token in the wrong place.
  const bool is_one = entries.size() == 1 && (entries[0].size() == 1 || entries[0].size() == 3);
  const std::string token = is_one ? entries[0].back() : "";
  const bool is_token = token.size() >= kShortestToken &&
                        std::all_of(token.begin(), token.end(), [](unsigned char c) { return c > 0x20 && c < 0x7f; });
  if (!is_token) {
    refuse("token_file: expected one line, TOKEN or ROLE NAME TOKEN, with a token of 16 characters or more, in ", path);
  }
  return token;
}

}  // namespace

Target parse_target(std::string_view text) {
  Target target;
  bool is_sound = false;
  if (starts_with(text, "unix:")) {
    is_sound = parse_unix(text.substr(5), target);
  } else if (starts_with(text, "grpc://")) {
    is_sound = parse_tcp(text.substr(7), target);
  } else if (starts_with(text, "grpcs://")) {
    target.is_tls = true;
    is_sound = parse_tcp(text.substr(8), target);
  }
  if (!is_sound) {
    refuse("target must be grpc://HOST:PORT, grpcs://HOST:PORT or unix:/PATH, for example grpc://127.0.0.1:8001, got '",
           text.substr(0, 200), "'");
  }
  return target;
}

void check_config(const ClientConfig& config, const Target& target) {
  require_within("keepalive_time_s", config.keepalive_time_s, 0.1, 3600);
  require_within("keepalive_timeout_s", config.keepalive_timeout_s, 0.1, 3600);
  require_within("max_reconnect_backoff_s", config.max_reconnect_backoff_s, 0.01, 3600);
  require_within("initial_reconnect_backoff_s", config.initial_reconnect_backoff_s, 0.01,
                 config.max_reconnect_backoff_s);
  require_within("max_message_bytes", config.max_message_bytes, 1024, 64 * 1024 * 1024);
  if (config.tls_certificate.empty() != config.tls_key.empty()) {
    refuse("tls_certificate and tls_key must be given together, got one without the other");
  }
  if (!target.is_tls && !(config.tls_ca.empty() && config.tls_certificate.empty())) {
    refuse("tls_ca, tls_certificate and tls_key need a target grpcs://HOST:PORT");
  }
  if (!config.token_file.empty() && !target.is_private) {
    refuse("token_file needs grpcs://, unix: or this machine's own address: anybody on the way could read the token");
  }
}

Secrets read_secrets(const ClientConfig& config) {
  Secrets secrets;
  // gRPC takes any bytes, and then fails every handshake without a word about the file.
  const SslContext context(SSL_CTX_new(TLS_client_method()), SSL_CTX_free);
  SSL_CTX_set_default_passwd_cb(context.get(), no_password);
  try {
    if (!config.tls_ca.empty()) {
      secrets.tls_ca = read_file(config.tls_ca);
      if (SSL_CTX_load_verify_locations(context.get(), config.tls_ca.c_str(), nullptr) != 1) {
        throw std::runtime_error("not PEM");
      }
    }
  } catch (const std::runtime_error&) {
    ERR_clear_error();
    refuse("tls_ca: expected a readable file of PEM certificates, got ", config.tls_ca);
  }
  try {
    if (!config.tls_certificate.empty()) {
      secrets.tls_certificate = read_file(config.tls_certificate);
      secrets.tls_key = read_file(config.tls_key);
      if (SSL_CTX_use_certificate_chain_file(context.get(), config.tls_certificate.c_str()) != 1 ||
          SSL_CTX_use_PrivateKey_file(context.get(), config.tls_key.c_str(), SSL_FILETYPE_PEM) != 1 ||
          SSL_CTX_check_private_key(context.get()) != 1) {
        throw std::runtime_error("not a pair");
      }
    }
  } catch (const std::runtime_error&) {
    ERR_clear_error();
    refuse("tls_certificate and tls_key: expected readable PEM files that belong together, the key without a password, got ",
           config.tls_certificate, " and ", config.tls_key);
  }
  if (!config.token_file.empty()) {
    secrets.token = read_token(config.token_file);
  }
  return secrets;
}

}  // namespace lom_client
