#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "lom_client/errors.hpp"
#include "lom_client/span.hpp"

namespace lom_client {

class Connection;

/// How a connection is watched, renewed, limited and secured. The defaults notice a frozen server in about a second and
/// renew a lost connection within half a second.
struct ClientConfig {
  /// Silence after which the connection is probed, 0.1 to 3600 s. Servers end a connection that probes more than twice a
  /// second. Less than in Python, as gRPC 1.51 waits for this and the next time before it gives a connection up.
  double keepalive_time_s = 0.6;
  /// Time a probe may stay unanswered before the connection counts as dead, 0.1 to 3600 s.
  double keepalive_timeout_s = 0.5;
  /// Pause before the second attempt to connect, 0.01 s to `max_reconnect_backoff_s`.
  double initial_reconnect_backoff_s = 0.05;
  /// Longest pause between two attempts to connect, up to 3600 s.
  double max_reconnect_backoff_s = 0.5;
  /// Largest message sent or received, 1 KiB to 64 MiB.
  int max_message_bytes = 4 * 1024 * 1024;
  /// PEM certificates of the authorities that a `grpcs://` server may be certified by; empty for gRPC's public ones.
  std::string tls_ca;
  /// PEM certificate chain that this client shows to a `grpcs://` server that asks for one; needs `tls_key`.
  std::string tls_certificate;
  /// PEM private key of `tls_certificate`, without a password.
  std::string tls_key;
  /// File with a bearer token alone, or with a server's line `ROLE NAME TOKEN`; mode 0600 or 0400. Refused on the way to
  /// another machine without TLS.
  std::string token_file;
  /// Send every `act` over one stream that is kept open, which saves each the cost of a call by itself. The stream is
  /// one robot's: an action takes the place of an earlier one that has not begun to be worked on.
  bool use_stream = false;
};

/// An array of numbers in environment units: the shape of one row, and its bounds, flattened.
struct Space {
  std::string name;
  std::vector<std::int64_t> shape;
  std::vector<float> low;
  std::vector<float> high;

  std::size_t width() const { return low.size(); }
};

/// The contract of one served policy; `contract_hash` stands for its spaces on every call.
struct PolicySpec {
  std::string policy;
  std::uint32_t version = 0;
  std::vector<Space> inputs;
  Space action;
  std::vector<std::string> variants;
  std::string default_variant;
  std::string bundle_digest;
  std::string contract_hash;
  std::uint32_t num_components = 0;
  std::uint32_t max_batch_rows = 0;
  std::string execution_provider;
};

/// Rows of one input, float32, row-major, in environment units. The name may be empty where the policy has one input.
struct Input {
  Input() = default;
  Input(Span<const float> rows) : values(rows) {}
  Input(std::string_view input, Span<const float> rows) : name(input), values(rows) {}

  std::string_view name;
  Span<const float> values;
};

/// What a caller may ask for beside an action. All but variant and priority belong to variants that choose a mode:
/// `greedy_mode`, and a residual `actor`. The server refuses them for others.
struct ActOptions {
  /// One of the spec's variants; empty for the spec's default.
  std::string_view variant;
  /// Act by this component, whether the data supports it here or not.
  std::optional<std::int32_t> mode;
  /// Sample from the chosen component (a residual actor: around its own action).
  std::optional<std::uint64_t> sampling_seed;
  /// One mode for each row, -1 for none, which is kept unless another one's hyper-Q is more than `hysteresis_width`
  /// higher. Empty for no hysteresis.
  Span<const std::int32_t> previous_mode;
  float hysteresis_width = 0.0f;
  /// Nobody waits for this answer: it comes after everyone else's, and is refused first.
  bool is_batch = false;
};

/// A number per row that is large where a robot should be warned.
struct Score {
  std::string name;
  std::vector<float> values;
  float threshold = 0.0f;

  /// Whether this row is worth a warning: not at or below the threshold, NaN included.
  bool warns(std::size_t row) const { return !(values[row] <= threshold); }
};

/// Checked actions: finite and inside the action space without exception.
struct Actions {
  std::size_t rows = 0;
  /// `rows` x action width, row-major, environment units.
  std::vector<float> actions;
  std::string variant;
  /// One for each row; empty for a variant that chooses no mode.
  std::vector<std::int32_t> mode;
  /// One for each row, NaN where the chosen mode had no runner-up; empty as `mode`.
  std::vector<float> margin;
  std::string policy;
  std::uint32_t version = 0;
  std::string bundle_digest;
  std::uint64_t sequence = 0;
  std::vector<Score> scores;
  bool is_clamped = false;
  double queue_s = 0.0;
  double inference_s = 0.0;
  std::uint32_t batch_rows = 0;
  double round_trip_s = 0.0;
};

/// Asks a policy server for actions: each call is answered, or fails with an `Error`, before its deadline.
///
/// The client agrees with the server on one contract (the policy's spaces), at its first call, and keeps to it for life:
/// a policy with other spaces is refused with `kContractMismatch`, also after a restart of the server. It never repeats a
/// call by itself. A lost connection is renewed in the background; until then calls fail at once.
///
/// Threads: every method may be called from any thread, concurrently. Constructing connects to nothing. `act` and
/// `get_spec` block up to their deadline and allocate, as gRPC does; `close` does not block. A client must not cross a
/// fork.
class PolicyClient {
 public:
  /// `target` is `grpc://HOST:PORT`, `grpcs://HOST:PORT` for TLS, or `unix:/PATH` of a socket. `policy` empty is the only
  /// one that the server has; `version` 0 is whichever the server prefers at the time of each call.
  ///
  /// Throws std::invalid_argument where `target` is not of that form or does not go with `config`, a value of `config` is
  /// out of range, or a file of it is not usable.
  explicit PolicyClient(std::string_view target, ClientConfig config = {}, std::string policy = "",
                        std::uint32_t version = 0);
  ~PolicyClient();
  PolicyClient(const PolicyClient&) = delete;
  PolicyClient& operator=(const PolicyClient&) = delete;

  /// The contract; asks the server only if no call did so before. `deadline` is above 0 and at most an hour, for
  /// everything.
  Result<PolicySpec> get_spec(std::chrono::nanoseconds deadline);

  /// One action for each row of the policy's only input, before `deadline`.
  Result<Actions> act(Span<const float> observations, std::chrono::nanoseconds deadline,
                      const ActOptions& options = {});

  /// As above, of a policy with inputs by name.
  Result<Actions> act(Span<const Input> inputs, std::chrono::nanoseconds deadline, const ActOptions& options = {});

  /// Ends the connection and every call in flight, each with `kClientClosed`. May be called twice.
  void close();

 private:
  friend class ControlLoop;
  std::shared_ptr<Connection> connection_;
};

}  // namespace lom_client
