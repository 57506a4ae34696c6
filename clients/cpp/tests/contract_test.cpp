#include "contract.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>

namespace lom_client {
namespace {

void set_floats(wire::Tensor& tensor, std::vector<float> values, std::vector<std::int64_t> shape) {
  tensor.set_dtype(wire::DATA_TYPE_FLOAT32);
  tensor.mutable_shape()->Assign(shape.begin(), shape.end());
  tensor.set_data(values.data(), values.size() * sizeof(float));
}

void set_integers(wire::Tensor& tensor, std::vector<std::int32_t> values, std::vector<std::int64_t> shape) {
  tensor.set_dtype(wire::DATA_TYPE_INT32);
  tensor.mutable_shape()->Assign(shape.begin(), shape.end());
  tensor.set_data(values.data(), values.size() * sizeof(std::int32_t));
}

wire::PolicySpec honest_spec() {
  wire::PolicySpec spec;
  spec.set_policy("toy");
  spec.set_version(1);
  wire::Space& input = *spec.add_inputs();
  input.set_name("observation");
  input.set_dtype(wire::DATA_TYPE_FLOAT32);
  input.add_shape(3);
  for (int i = 0; i < 3; ++i) {
    input.add_low(-INFINITY);
    input.add_high(INFINITY);
  }
  wire::Space& action = *spec.mutable_action();
  action.set_name("action");
  action.set_dtype(wire::DATA_TYPE_FLOAT32);
  action.add_shape(2);
  for (int i = 0; i < 2; ++i) {
    action.add_low(-1);
    action.add_high(1);
  }
  spec.add_variants("greedy_mode");
  spec.add_variants("actor");
  spec.set_default_variant("greedy_mode");
  spec.set_bundle_digest(std::string(64, 'd'));
  spec.set_contract_hash(std::string(64, 'c'));
  spec.set_num_components(3);
  spec.set_max_batch_rows(64);
  return spec;
}

struct WrongSpec {
  const char* what;
  void (*change)(wire::PolicySpec&);
};

class WrongSpecs : public testing::TestWithParam<WrongSpec> {};

TEST_P(WrongSpecs, AreRefused) {
  wire::PolicySpec spec = honest_spec();
  ASSERT_TRUE(read_spec(spec));
  GetParam().change(spec);
  const auto read = read_spec(spec);
  ASSERT_FALSE(read) << GetParam().what;
  EXPECT_EQ(read.error().reason, "BAD_SPEC");
}

INSTANTIATE_TEST_SUITE_P(
    Contract, WrongSpecs,
    testing::Values(
        WrongSpec{"no input", [](wire::PolicySpec& spec) { spec.clear_inputs(); }},
        WrongSpec{"an input twice", [](wire::PolicySpec& spec) { *spec.add_inputs() = spec.inputs(0); }},
        WrongSpec{"no name", [](wire::PolicySpec& spec) { spec.clear_policy(); }},
        WrongSpec{"a name with a line", [](wire::PolicySpec& spec) { spec.set_variants(1, "a\nb"); }},
        WrongSpec{"no hash", [](wire::PolicySpec& spec) { spec.clear_contract_hash(); }},
        WrongSpec{"a hash too long", [](wire::PolicySpec& spec) { spec.set_bundle_digest(std::string(129, 'd')); }},
        WrongSpec{"no batch", [](wire::PolicySpec& spec) { spec.clear_max_batch_rows(); }},
        WrongSpec{"an unknown default", [](wire::PolicySpec& spec) { spec.set_default_variant("bc"); }},
        WrongSpec{"no components", [](wire::PolicySpec& spec) { spec.clear_num_components(); }},
        WrongSpec{"integers", [](wire::PolicySpec& spec) { spec.mutable_action()->set_dtype(wire::DATA_TYPE_INT32); }},
        WrongSpec{"a matrix", [](wire::PolicySpec& spec) { spec.mutable_action()->add_shape(1); }},
        WrongSpec{"a huge space",
                  [](wire::PolicySpec& spec) {
                    spec.mutable_inputs(0)->set_shape(0, INT64_MAX);
                    spec.mutable_inputs(0)->add_shape(INT64_MAX);
                  }},
        WrongSpec{"too few bounds", [](wire::PolicySpec& spec) { spec.mutable_action()->mutable_low()->RemoveLast(); }},
        WrongSpec{"NaN", [](wire::PolicySpec& spec) { spec.mutable_action()->set_low(0, NAN); }},
        WrongSpec{"low above high", [](wire::PolicySpec& spec) { spec.mutable_action()->set_low(0, 2); }}));

class Request : public testing::Test {
 protected:
  std::string reason_of(std::vector<float> values, const ActOptions& options = {}) {
    const Input input{Span<const float>(values)};
    const auto made = make_request(spec_, 0, Span<const Input>(&input, 1), options);
    return made ? "" : made.error().reason;
  }
  const PolicySpec spec_ = std::move(read_spec(honest_spec())).value();
};

TEST_F(Request, CarriesRowsAndTheContract) {
  const std::vector<float> rows = {1, 2, 3, 4, 5, 6};
  const Input input{"observation", rows};
  const auto made = make_request(spec_, 7, Span<const Input>(&input, 1), {});
  ASSERT_TRUE(made);
  EXPECT_EQ(made->contract_hash(), std::string(64, 'c'));
  EXPECT_EQ(made->version(), 7u);
  EXPECT_EQ(made->variant(), "greedy_mode");
  EXPECT_EQ(made->inputs(0).shape(0), 2);
  EXPECT_EQ(made->inputs(0).shape(1), 3);
  ASSERT_EQ(made->inputs(0).data().size(), 24u);
  EXPECT_EQ(std::memcmp(made->inputs(0).data().data(), rows.data(), 24), 0);
}

TEST_F(Request, IsRefusedWithAReason) {
  EXPECT_EQ(reason_of({1, 2, 3}), "");
  EXPECT_EQ(reason_of({}), "EMPTY_BATCH");
  EXPECT_EQ(reason_of({1, 2}), "BAD_SHAPE");
  EXPECT_EQ(reason_of(std::vector<float>(3 * 65)), "BATCH_TOO_LARGE");
  for (const float wrong : {NAN, INFINITY, -INFINITY}) {
    for (int at = 0; at < 3; ++at) {
      std::vector<float> row = {1, 2, 3};
      row[at] = wrong;
      EXPECT_EQ(reason_of(row), "NON_FINITE");
    }
  }
  ActOptions options;
  options.variant = "bc";
  EXPECT_EQ(reason_of({1, 2, 3}, options), "UNKNOWN_VARIANT");
  options = {};
  options.variant = "actor";
  options.mode = 1;  // whether its actor has modes is the server's to say
  EXPECT_EQ(reason_of({1, 2, 3}, options), "");
  options = {};
  options.mode = -1;
  EXPECT_EQ(reason_of({1, 2, 3}, options), "BAD_OPTION");
  options = {};
  options.hysteresis_width = 1.0f;
  EXPECT_EQ(reason_of({1, 2, 3}, options), "BAD_OPTION");
  const std::vector<std::int32_t> modes = {0};
  options.previous_mode = modes;
  EXPECT_EQ(reason_of({1, 2, 3}, options), "");
  EXPECT_EQ(reason_of({1, 2, 3, 4, 5, 6}, options), "BAD_OPTION");
  options.hysteresis_width = NAN;
  EXPECT_EQ(reason_of({1, 2, 3}, options), "BAD_OPTION");
  const Input wrong{"goal", {}};
  EXPECT_EQ(make_request(spec_, 0, Span<const Input>(&wrong, 1), {}).error().reason, "UNKNOWN_INPUT");
  EXPECT_EQ(make_request(spec_, 0, Span<const Input>(), {}).error().reason, "MISSING_INPUT");
}

struct Hostile {
  const char* what;
  const char* reason;
  void (*change)(wire::ActReply&);
};

class HostileReplies : public testing::TestWithParam<Hostile> {};

TEST_P(HostileReplies, NeverBecomeActions) {
  const PolicySpec spec = std::move(read_spec(honest_spec())).value();
  const std::vector<float> row = {1, 2, 3};
  const Input input{Span<const float>(row)};
  wire::ActRequest request = std::move(make_request(spec, 0, Span<const Input>(&input, 1), {})).value();
  request.set_sequence(5);
  wire::ActReply reply;
  reply.set_sequence(5);
  reply.set_policy("toy");
  reply.set_version(1);
  reply.set_variant("greedy_mode");
  reply.set_bundle_digest(std::string(64, 'd'));
  set_floats(*reply.mutable_action(), {0.5, -0.5}, {1, 2});
  set_integers(*reply.mutable_mode(), {2}, {1});
  set_floats(*reply.mutable_margin(), {NAN}, {1});
  ASSERT_TRUE(read_reply(reply, request, spec));
  GetParam().change(reply);
  const auto read = read_reply(reply, request, spec);
  ASSERT_FALSE(read) << GetParam().what;
  EXPECT_EQ(read.error().reason, GetParam().reason) << GetParam().what;
  EXPECT_EQ(read.error().failure, Failure::kBadReply);
}

#define REPLY [](wire::ActReply & reply)
INSTANTIATE_TEST_SUITE_P(
    Contract, HostileReplies,
    testing::Values(
        Hostile{"sequence", "WRONG_SEQUENCE", REPLY { reply.set_sequence(4); }},
        Hostile{"policy", "WRONG_POLICY", REPLY { reply.set_policy("other"); }},
        Hostile{"variant", "WRONG_VARIANT", REPLY { reply.set_variant("actor"); }},
        Hostile{"no digest", "MISSING_DIGEST", REPLY { reply.clear_bundle_digest(); }},
        Hostile{"digest too long", "MISSING_DIGEST", REPLY { reply.set_bundle_digest(std::string(129, 'd')); }},
        Hostile{"explanation", "WRONG_FIELDS", REPLY { reply.mutable_explanation(); }},
        Hostile{"no action", "UNKNOWN_DTYPE", REPLY { reply.clear_action(); }},
        Hostile{"integers", "BAD_DTYPE", REPLY { set_integers(*reply.mutable_action(), {0, 0}, {1, 2}); }},
        Hostile{"too wide", "BAD_SHAPE", REPLY { set_floats(*reply.mutable_action(), {0, 0, 0}, {1, 3}); }},
        Hostile{"too narrow", "BAD_SHAPE", REPLY { set_floats(*reply.mutable_action(), {0}, {1, 1}); }},
        Hostile{"two rows", "BAD_SHAPE", REPLY { set_floats(*reply.mutable_action(), {0, 0, 0, 0}, {2, 2}); }},
        Hostile{"transposed", "BAD_SHAPE", REPLY { set_floats(*reply.mutable_action(), {0, 0}, {2, 1}); }},
        Hostile{"rank 1", "BAD_SHAPE", REPLY { set_floats(*reply.mutable_action(), {0, 0}, {2}); }},
        Hostile{"no shape", "BAD_RANK", REPLY { set_floats(*reply.mutable_action(), {0, 0}, {}); }},
        Hostile{"rank 9", "BAD_RANK",
                REPLY { set_floats(*reply.mutable_action(), {0, 0}, {1, 1, 1, 1, 1, 1, 1, 1, 2}); }},
        Hostile{"negative", "BAD_DIM", REPLY { set_floats(*reply.mutable_action(), {0, 0}, {-1, -2}); }},
        Hostile{"overflow", "SHAPE_OVERFLOW",
                REPLY { set_floats(*reply.mutable_action(), {0, 0}, {INT64_MAX, INT64_MAX}); }},
        Hostile{"fewer bytes", "SIZE_MISMATCH", REPLY { set_floats(*reply.mutable_action(), {0}, {1, 2}); }},
        Hostile{"NaN", "NON_FINITE_ACTION", REPLY { set_floats(*reply.mutable_action(), {0, NAN}, {1, 2}); }},
        Hostile{"infinity", "NON_FINITE_ACTION", REPLY { set_floats(*reply.mutable_action(), {INFINITY, 0}, {1, 2}); }},
        Hostile{"-infinity", "NON_FINITE_ACTION",
                REPLY { set_floats(*reply.mutable_action(), {0, -INFINITY}, {1, 2}); }},
        Hostile{"out of bounds", "ACTION_OUT_OF_BOUNDS",
                REPLY { set_floats(*reply.mutable_action(), {0, 1.001f}, {1, 2}); }},
        Hostile{"no mode", "WRONG_FIELDS", REPLY { reply.clear_mode(); }},
        Hostile{"no margin", "WRONG_FIELDS", REPLY { reply.clear_margin(); }},
        Hostile{"mode too large", "BAD_MODE", REPLY { set_integers(*reply.mutable_mode(), {3}, {1}); }},
        Hostile{"mode negative", "BAD_MODE", REPLY { set_integers(*reply.mutable_mode(), {-1}, {1}); }},
        Hostile{"margin negative", "BAD_MARGIN", REPLY { set_floats(*reply.mutable_margin(), {-1}, {1}); }},
        Hostile{"margin infinite", "BAD_MARGIN", REPLY { set_floats(*reply.mutable_margin(), {INFINITY}, {1}); }},
        Hostile{"score threshold", "BAD_SCORES", REPLY {
                  set_floats(*reply.add_scores()->mutable_values(), {1}, {1});
                  reply.mutable_scores(0)->set_threshold(NAN);
                }},
        Hostile{"score twice", "BAD_SCORES", REPLY {
                  set_floats(*reply.add_scores()->mutable_values(), {1}, {1});
                  *reply.add_scores() = reply.scores(0);
                }},
        Hostile{"score that hides a warning", "BAD_SCORES", REPLY {
                  set_floats(*reply.add_scores()->mutable_values(), {1}, {1});
                  reply.mutable_scores(0)->add_warns(false);
                }}));
#undef REPLY

TEST(Reply, RoundingAtTheBoundsIsRemoved) {
  const PolicySpec spec = std::move(read_spec(honest_spec())).value();
  const std::vector<float> row = {1, 2, 3};
  const Input input{Span<const float>(row)};
  ActOptions options;
  options.variant = "actor";
  wire::ActRequest request = std::move(make_request(spec, 0, Span<const Input>(&input, 1), options)).value();
  wire::ActReply reply;
  reply.set_policy("toy");
  reply.set_variant("actor");
  reply.set_bundle_digest("d");
  set_floats(*reply.mutable_action(), {1.000001f, -1.000001f}, {1, 2});
  const auto read = read_reply(reply, request, spec);
  ASSERT_TRUE(read);
  EXPECT_EQ(read->actions, (std::vector<float>{1, -1}));
  EXPECT_TRUE(read->mode.empty());
}

TEST(Reply, AnActorMayActByAMode) {
  const PolicySpec spec = std::move(read_spec(honest_spec())).value();
  const std::vector<float> row = {1, 2, 3};
  const Input input{Span<const float>(row)};
  ActOptions options;
  options.variant = "actor";
  options.sampling_seed = 7;
  wire::ActRequest request = std::move(make_request(spec, 0, Span<const Input>(&input, 1), options)).value();
  wire::ActReply reply;
  reply.set_policy("toy");
  reply.set_variant("actor");
  reply.set_bundle_digest("d");
  set_floats(*reply.mutable_action(), {0, 0}, {1, 2});
  EXPECT_EQ(read_reply(reply, request, spec).error().reason, "WRONG_FIELDS");  // it was asked about modes
  set_integers(*reply.mutable_mode(), {2}, {1});
  EXPECT_EQ(read_reply(reply, request, spec).error().reason, "WRONG_FIELDS");  // no margin
  set_floats(*reply.mutable_margin(), {0.5f}, {1});
  const auto read = read_reply(reply, request, spec);
  ASSERT_TRUE(read);
  EXPECT_EQ(read->mode, std::vector<std::int32_t>{2});
}

}  // namespace
}  // namespace lom_client
