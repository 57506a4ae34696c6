#include <gtest/gtest.h>

#include "failures.hpp"

namespace lom_client {
namespace {

struct Case {
  int code;
  const char* message;
  Failure failure;
  const char* reason;
};

class StatusCases : public testing::TestWithParam<Case> {};

TEST_P(StatusCases, BecomeTypedFailures) {
  const Case& given = GetParam();
  const Error error = error_from_status(given.code, given.message);
  EXPECT_EQ(name_of(error.failure), name_of(given.failure));
  EXPECT_EQ(error.reason, given.reason);
}

INSTANTIATE_TEST_SUITE_P(
    Errors, StatusCases,
    testing::Values(Case{grpc::INVALID_ARGUMENT, "BAD_SHAPE: o", Failure::kInvalidRequest, "BAD_SHAPE"},
                    Case{grpc::OUT_OF_RANGE, "OBS_OUT_OF_RANGE: o", Failure::kInvalidRequest, "OBS_OUT_OF_RANGE"},
                    Case{grpc::UNAUTHENTICATED, "AUTH_REQUIRED: t", Failure::kNotPermitted, "AUTH_REQUIRED"},
                    Case{grpc::NOT_FOUND, "MODEL_NOT_FOUND: m", Failure::kPolicyNotFound, "MODEL_NOT_FOUND"},
                    Case{grpc::RESOURCE_EXHAUSTED, "QUEUE_FULL: q", Failure::kOverloaded, "QUEUE_FULL"},
                    Case{grpc::FAILED_PRECONDITION, "CONTRACT_MISMATCH: c", Failure::kContractMismatch,
                         "CONTRACT_MISMATCH"},
                    Case{grpc::FAILED_PRECONDITION, "MODEL_FAILED: c", Failure::kServerFault, "MODEL_FAILED"},
                    Case{grpc::ABORTED, "SUPERSEDED: s", Failure::kSuperseded, "SUPERSEDED"},
                    Case{grpc::UNAVAILABLE, "failed to connect", Failure::kServerUnavailable, "UNAVAILABLE"},
                    Case{grpc::DEADLINE_EXCEEDED, "", Failure::kDeadlineExceeded, "DEADLINE_EXCEEDED"},
                    Case{grpc::UNKNOWN, "Exception: lower case is no code", Failure::kServerFault, "UNKNOWN"},
                    Case{grpc::INTERNAL, "AB: too short a code", Failure::kServerFault, "INTERNAL"},
                    Case{77, "", Failure::kServerFault, "UNKNOWN"},
                    Case{grpc::RESOURCE_EXHAUSTED, "Received message larger than max (9 vs. 4)", Failure::kBadReply,
                         "MESSAGE_TOO_LARGE"},
                    Case{grpc::RESOURCE_EXHAUSTED, "Sent message larger than max (9 vs. 4)", Failure::kInvalidRequest,
                         "MESSAGE_TOO_LARGE"},
                    Case{grpc::RESOURCE_EXHAUSTED, "SERVER: Received message larger than max (9 vs. 4)",
                         Failure::kInvalidRequest, "MESSAGE_TOO_LARGE"}));

TEST(Errors, CarryTheServersWish) {
  EXPECT_EQ(error_from_status(grpc::RESOURCE_EXHAUSTED, "QUEUE_FULL: full, retry_after_ms 12").retry_after_s, 0.012);
  EXPECT_EQ(error_from_status(grpc::RESOURCE_EXHAUSTED, "QUEUE_FULL: full, retry_after_ms x").retry_after_s,
            std::nullopt);
}

TEST(Errors, AreOnePrintableLineOfBoundedLength) {
  const Error error = error_from_status(grpc::INTERNAL, "INTERNAL_ERROR: a\nb\x1b[31m" + std::string(1000, 'x'));
  EXPECT_EQ(error.detail.substr(0, 8), "a b [31m");
  EXPECT_LE(error.detail.size(), 300u);
}

TEST(Errors, OnlySomeAreWorthAnotherTry) {
  EXPECT_TRUE(out_of_time().is_retryable());
  EXPECT_FALSE(malformed_reply().is_retryable());
  EXPECT_FALSE(client_closed().is_retryable());
}

}  // namespace
}  // namespace lom_client
