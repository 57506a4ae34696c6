#pragma once

#include <cstddef>

#include "lom_api/v1/policy.pb.h"
#include "lom_client/policy_client.hpp"

/// What may be sent and what may be believed, by the contract of a policy. No connection, no clock.
namespace lom_client {

namespace wire = lom_api::v1;

/// Message to checked spec; BAD_SPEC where it contradicts itself or describes spaces that this client cannot speak.
Result<PolicySpec> read_spec(const wire::PolicySpec& message);

/// What is to be sent; its sequence number is the transport's to give. `version` 0 leaves the choice to the server.
Result<wire::ActRequest> make_request(const PolicySpec& spec, std::uint32_t version, Span<const Input> inputs,
                                      const ActOptions& options);

/// Message to checked actions; `kBadReply` where it answers another request than `request`, or carries anything that must
/// not reach a robot.
Result<Actions> read_reply(const wire::ActReply& reply, const wire::ActRequest& request, const PolicySpec& spec);

}  // namespace lom_client
