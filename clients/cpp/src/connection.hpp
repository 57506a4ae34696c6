#pragma once

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "action_stream.hpp"
#include "contract.hpp"
#include "in_flight.hpp"
#include "lom_client/text.hpp"
#include "outcome.hpp"
#include "target.hpp"

namespace lom_client {

/// One gRPC channel to one policy, and the contract that was agreed on over it. Threads: any.
class Connection {
 public:
  /// Throws std::invalid_argument as `PolicyClient`.
  Connection(std::string_view target, const ClientConfig& config, std::string policy, std::uint32_t version);
  ~Connection();

  /// As `PolicyClient::get_spec`, until an instant of the monotonic clock; ends with `group`, too.
  Result<PolicySpec> get_spec(std::int64_t over_ns, Group* group = nullptr);

  /// As `PolicyClient::act`, likewise.
  Result<Actions> act(Span<const Input> inputs, std::int64_t over_ns, const ActOptions& options,
                      Group* group = nullptr);

  /// Of the contract; empty before it was agreed on.
  Hash contract_hash();

  void close();

 private:
  template <typename Reply>
  Result<Reply> call(const std::string& method, const google::protobuf::Message& request, std::int64_t over_ns,
                     Group* group);
  template <typename Reply>
  Result<Reply> await(const std::shared_ptr<Outcome<Reply>>& outcome, std::int64_t over_ns, Group* group);
  Result<wire::ActReply> ask(wire::ActRequest& request, std::int64_t over_ns, Group* group);

  const std::string policy_;
  const std::uint32_t version_;
  std::string token_;
  const std::shared_ptr<InFlight> in_flight_ = std::make_shared<InFlight>();
  grpc::GenericStub stub_;
  std::optional<ActionStream> stream_;
  std::atomic<std::uint64_t> sequence_{0};
  std::mutex spec_mutex_;
  std::shared_ptr<const PolicySpec> spec_;
  Group calls_;

  std::shared_ptr<const PolicySpec> agreed_spec();
  Result<std::shared_ptr<const PolicySpec>> agree(std::int64_t over_ns, Group* group);
};

}  // namespace lom_client
