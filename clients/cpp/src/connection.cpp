#include "connection.hpp"

#include <cmath>
#include <utility>

#include "clock.hpp"
#include "failures.hpp"
#include "wire_bytes.hpp"

namespace lom_client {
namespace {

int milliseconds(double seconds) { return static_cast<int>(std::lround(seconds * 1000)); }

grpc::ChannelArguments arguments_of(const ClientConfig& config) {
  const int timeout_ms = milliseconds(config.keepalive_timeout_s);
  const int max_backoff_ms = milliseconds(config.max_reconnect_backoff_s);
  grpc::ChannelArguments arguments;
  // A wrong name is ignored in silence, so a test proves each one's effect.
  for (const auto& [name, value] : std::initializer_list<std::pair<const char*, int>>{
           {"grpc.keepalive_time_ms", milliseconds(config.keepalive_time_s)},
           {"grpc.keepalive_timeout_ms", timeout_ms},
           // Without this one, newer cores do not notice a server that was stopped but keeps its sockets.
           {"grpc.http2.ping_timeout_ms", timeout_ms},
           {"grpc.http2.max_pings_without_data", 0},
           {"grpc.keepalive_permit_without_calls", 1},
           {"grpc.initial_reconnect_backoff_ms", milliseconds(config.initial_reconnect_backoff_s)},
           {"grpc.min_reconnect_backoff_ms", std::min(200, max_backoff_ms)},
           {"grpc.max_reconnect_backoff_ms", max_backoff_ms},
           // Channels otherwise share connections, and with them the backoff that another client ran into.
           {"grpc.use_local_subchannel_pool", 1},
           // A retried action is a stale action.
           {"grpc.enable_retries", 0},
           // The environment must not be able to route a robot's commands through a proxy.
           {"grpc.enable_http_proxy", 0},
           {"grpc.max_receive_message_length", config.max_message_bytes},
           {"grpc.max_send_message_length", config.max_message_bytes},
       }) {
    arguments.SetInt(name, value);
  }
  return arguments;
}

std::shared_ptr<grpc::Channel> make_channel(const Target& target, const ClientConfig& config, const Secrets& secrets) {
  if (!target.is_tls) {
    return grpc::CreateCustomChannel(target.address, grpc::InsecureChannelCredentials(), arguments_of(config));
  }
  grpc::SslCredentialsOptions tls;
  tls.pem_root_certs = secrets.tls_ca;
  tls.pem_private_key = secrets.tls_key;
  tls.pem_cert_chain = secrets.tls_certificate;
  return grpc::CreateCustomChannel(target.address, grpc::SslCredentials(tls), arguments_of(config));
}

/// A call by itself, kept alive by gRPC until it has ended.
template <typename Reply>
struct UnaryCall : Outcome<Reply> {
  explicit UnaryCall(std::shared_ptr<InFlight> calls) : token(std::move(calls)) {}

  const InFlight::Token token;  // outlives the context
  grpc::ClientContext context;
  grpc::ByteBuffer request;
  grpc::ByteBuffer reply;
};

Target checked_target(std::string_view text, const ClientConfig& config) {
  const Target target = parse_target(text);
  check_config(config, target);
  return target;
}

}  // namespace

Connection::Connection(std::string_view target, const ClientConfig& config, std::string policy, std::uint32_t version)
    : policy_(std::move(policy)), version_(version), stub_(nullptr) {
  if (version > 0x7fffffffu) {
    throw std::invalid_argument("version must be between 1 and 2147483647, or 0 for the server's choice");
  }
  const Target parsed = checked_target(target, config);
  const Secrets secrets = read_secrets(config);
  token_ = secrets.token;
  stub_ = grpc::GenericStub(make_channel(parsed, config, secrets));
  if (config.use_stream) {
    stream_.emplace(stub_, token_, in_flight_);
  }
}

Connection::~Connection() {
  close();
  in_flight_->wait_until_none();
}

Result<PolicySpec> Connection::get_spec(std::int64_t over_ns, Group* group) {
  const auto spec = agree(over_ns, group);
  if (!spec) {
    return spec.error();
  }
  return **spec;
}

Result<Actions> Connection::act(Span<const Input> inputs, std::int64_t over_ns, const ActOptions& options,
                                Group* group) {
  const auto agreed = agree(over_ns, group);
  if (!agreed) {
    return agreed.error();
  }
  const PolicySpec& spec = **agreed;
  Result<wire::ActRequest> made = make_request(spec, version_, inputs, options);
  if (!made) {
    return made.error();
  }
  wire::ActRequest request = std::move(made).value();
  const std::int64_t sent_ns = now_ns();
  const Result<wire::ActReply> reply = ask(request, over_ns, group);
  if (!reply) {
    return reply.error();
  }
  Result<Actions> read = read_reply(*reply, request, spec);
  if (!read) {
    return read;
  }
  Actions actions = std::move(read).value();
  actions.round_trip_s = static_cast<double>(now_ns() - sent_ns) * 1e-9;
  return actions;
}

Hash Connection::contract_hash() {
  const auto spec = agreed_spec();
  return spec == nullptr ? Hash() : Hash(spec->contract_hash);
}

void Connection::close() {
  calls_.end();  // and whoever waits for a call cancels it
  if (stream_) {
    stream_->close();
  }
}

std::shared_ptr<const PolicySpec> Connection::agreed_spec() {
  const std::lock_guard lock(spec_mutex_);
  return spec_;
}

Result<std::shared_ptr<const PolicySpec>> Connection::agree(std::int64_t over_ns, Group* group) {
  if (auto spec = agreed_spec()) {
    return spec;
  }
  wire::GetPolicySpecRequest request;
  request.set_policy(policy_);
  request.set_version(version_);
  const Result<wire::PolicySpec> answered = call<wire::PolicySpec>("GetPolicySpec", request, over_ns, group);
  if (!answered) {
    return answered.error();
  }
  Result<PolicySpec> spec = read_spec(*answered);
  if (!spec) {
    return spec.error();
  }
  if (!policy_.empty() && spec->policy != policy_) {
    return failed(Failure::kBadReply, "WRONG_POLICY", "the spec is of another policy than the one asked for");
  }
  if (version_ != 0 && spec->version != version_) {
    return failed(Failure::kBadReply, "WRONG_VERSION", "expected ", version_, ", got ", spec->version);
  }
  // Two first calls may have asked at once; the contract is whichever came first, for both.
  const std::lock_guard lock(spec_mutex_);
  if (spec_ == nullptr) {
    spec_ = std::make_shared<const PolicySpec>(std::move(spec).value());
  }
  return spec_;
}

Result<wire::ActReply> Connection::ask(wire::ActRequest& request, std::int64_t over_ns, Group* group) {
  if (!stream_) {
    request.set_sequence(++sequence_);
    return call<wire::ActReply>("Act", request, over_ns, group);
  }
  const auto outcome = std::make_shared<Outcome<wire::ActReply>>();
  const auto stream = stream_->act(request, over_ns, outcome);
  Result<wire::ActReply> reply = await(outcome, over_ns, group);
  if (!reply) {
    ActionStream::forget(stream, request.sequence());
  }
  return reply;
}

template <typename Reply>
Result<Reply> Connection::call(const std::string& method, const google::protobuf::Message& request,
                               std::int64_t over_ns, Group* group) {
  const std::int64_t remaining_ns = over_ns - now_ns();
  if (remaining_ns <= 0) {
    return out_of_time();
  }
  const auto call = std::make_shared<UnaryCall<Reply>>(in_flight_);
  if (!token_.empty()) {
    call->context.AddMetadata("authorization", "Bearer " + token_);
  }
  call->context.set_deadline(
      gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_nanos(remaining_ns, GPR_TIMESPAN)));
  call->request = to_bytes(request);
  stub_.UnaryCall(&call->context, "/lom_api.v1.PolicyService/" + method, grpc::StubOptions(), &call->request,
                  &call->reply, [call](const grpc::Status& status) {
                    Reply reply;
                    if (!status.ok()) {
                      call->fail(error_from_status(status.error_code(), status.error_message()));
                    } else if (!from_bytes(call->reply, reply)) {
                      call->fail(malformed_reply());
                    } else {
                      call->settle(std::move(reply));
                    }
                  });
  Result<Reply> result = await(std::static_pointer_cast<Outcome<Reply>>(call), over_ns, group);
  if (!result) {
    call->context.TryCancel();
  }
  return result;
}

template <typename Reply>
Result<Reply> Connection::await(const std::shared_ptr<Outcome<Reply>>& outcome, std::int64_t over_ns, Group* group) {
  // By our own clock: gRPC's deadlines count in milliseconds.
  std::optional<Result<Reply>> result;
  if (!calls_.add(outcome)) {
    return client_closed();
  }
  if (group != nullptr && !group->add(outcome)) {
    calls_.remove(outcome);
    return client_closed();
  }
  result = outcome->wait_until(over_ns);
  calls_.remove(outcome);
  if (group != nullptr) {
    group->remove(outcome);
  }
  if (!result || now_ns() > over_ns) {
    return out_of_time();
  }
  return *std::move(result);
}

}  // namespace lom_client
