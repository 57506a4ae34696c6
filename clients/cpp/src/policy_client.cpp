#include "lom_client/policy_client.hpp"

#include <utility>

#include "clock.hpp"
#include "connection.hpp"

namespace lom_client {
namespace {

constexpr std::chrono::nanoseconds kLongestDeadline = std::chrono::hours(1);

Error bad_deadline(std::chrono::nanoseconds deadline) {
  return failed(Failure::kInvalidRequest, "BAD_OPTION", "deadline: expected above 0 and at most 3600 s, got ",
                std::chrono::duration<double>(deadline).count());
}

bool is_sound(std::chrono::nanoseconds deadline) { return deadline.count() > 0 && deadline <= kLongestDeadline; }

}  // namespace

PolicyClient::PolicyClient(std::string_view target, ClientConfig config, std::string policy, std::uint32_t version)
    : connection_(std::make_shared<Connection>(target, config, std::move(policy), version)) {}

PolicyClient::~PolicyClient() { close(); }

Result<PolicySpec> PolicyClient::get_spec(std::chrono::nanoseconds deadline) {
  return is_sound(deadline) ? connection_->get_spec(now_ns() + deadline.count())
                            : Result<PolicySpec>(bad_deadline(deadline));
}

Result<Actions> PolicyClient::act(Span<const float> observations, std::chrono::nanoseconds deadline,
                                  const ActOptions& options) {
  const Input input(observations);
  return act(Span<const Input>(&input, 1), deadline, options);
}

Result<Actions> PolicyClient::act(Span<const Input> inputs, std::chrono::nanoseconds deadline,
                                  const ActOptions& options) {
  return is_sound(deadline) ? connection_->act(inputs, now_ns() + deadline.count(), options)
                            : Result<Actions>(bad_deadline(deadline));
}

void PolicyClient::close() { connection_->close(); }

}  // namespace lom_client
