#include "contract.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <utility>

#include "failures.hpp"
#include "lom_client/text.hpp"

static_assert(std::numeric_limits<float>::is_iec559 && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "arrays travel as little-endian IEEE 754 numbers");

namespace lom_client {
namespace {

constexpr std::string_view kGreedyMode = "greedy_mode";
constexpr std::size_t kLongestName = 64;
constexpr std::size_t kLongestHash = 128;  // of `Hash`
constexpr int kMostScores = 16;
constexpr int kMostDimensions = 8;
constexpr std::int64_t kMostElements = std::numeric_limits<std::int32_t>::max();
// The policy clips in its own arithmetic; what it may miss a float32 bound by is rounding, not intent.
constexpr float kBoundTolerance = 1e-5f;

Error bad_spec(std::string_view detail) { return failed(Failure::kBadReply, "BAD_SPEC", detail); }

template <typename... Parts>
Error bad_reply(std::string_view reason, const Parts&... parts) {
  return failed(Failure::kBadReply, reason, parts...);
}

template <typename... Parts>
Error invalid(std::string_view reason, const Parts&... parts) {
  return failed(Failure::kInvalidRequest, reason, parts...);
}

bool is_name(std::string_view text) {
  return !text.empty() && text.size() <= kLongestName &&
         std::none_of(text.begin(), text.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; });
}

bool is_hash(std::string_view text) { return !text.empty() && text.size() <= kLongestHash; }

Result<Space> read_space(const wire::Space& message, std::string_view role) {
  if (message.dtype() != wire::DATA_TYPE_FLOAT32) {
    return failed(Failure::kBadReply, "BAD_SPEC", role, ": expected float32 (1), got ", int{message.dtype()});
  }
  Space space;
  space.name = message.name();
  space.shape.assign(message.shape().begin(), message.shape().end());
  std::int64_t width = 1;
  for (const std::int64_t dimension : space.shape) {
    if (dimension < 1 || dimension > kMostElements || (width *= dimension) > kMostElements) {
      return failed(Failure::kBadReply, "BAD_SPEC", role, ": expected dimensions of 1 or more, got ", dimension);
    }
  }
  if (space.shape.empty()) {
    return failed(Failure::kBadReply, "BAD_SPEC", role, ": expected dimensions of 1 or more, got none");
  }
  if (message.low_size() != width || message.high_size() != width) {
    return failed(Failure::kBadReply, "BAD_SPEC", role, ": expected ", width, " bounds, got ", message.low_size(),
                  " low and ", message.high_size(), " high");
  }
  space.low.assign(message.low().begin(), message.low().end());
  space.high.assign(message.high().begin(), message.high().end());
  for (std::int64_t i = 0; i < width; ++i) {
    if (!(space.low[i] <= space.high[i])) {  // NaN fails this comparison too
      return failed(Failure::kBadReply, "BAD_SPEC", role, ": a lower bound is not below its upper bound");
    }
  }
  return space;
}

template <typename Number>
void write_tensor(wire::Tensor& tensor, std::string_view name, Span<const Number> values, std::int64_t rows,
                  const std::vector<std::int64_t>& shape) {
  tensor.set_name(std::string(name));
  tensor.set_dtype(std::is_same_v<Number, float> ? wire::DATA_TYPE_FLOAT32 : wire::DATA_TYPE_INT32);
  tensor.add_shape(rows);
  for (const std::int64_t dimension : shape) {
    tensor.add_shape(dimension);
  }
  tensor.set_data(values.data(), values.size() * sizeof(Number));
}

/// The numbers of a tensor that has `shape`. `values` is left alone where it has not.
template <typename Number>
std::optional<Error> read_tensor(const wire::Tensor& tensor, std::string_view role,
                                 const std::vector<std::int64_t>& shape, std::vector<Number>& values) {
  constexpr auto kDtype = std::is_same_v<Number, float> ? wire::DATA_TYPE_FLOAT32 : wire::DATA_TYPE_INT32;
  if (tensor.dtype() != wire::DATA_TYPE_FLOAT32 && tensor.dtype() != wire::DATA_TYPE_INT32) {
    return bad_reply("UNKNOWN_DTYPE", role, ": expected float32 (1) or int32 (2), got ", int{tensor.dtype()});
  }
  if (tensor.shape_size() < 1 || tensor.shape_size() > kMostDimensions) {
    return bad_reply("BAD_RANK", role, ": expected 1 to ", kMostDimensions, " dimensions, got ", tensor.shape_size());
  }
  const auto [smallest, largest] = std::minmax_element(tensor.shape().begin(), tensor.shape().end());
  if (*smallest < 0) {
    return bad_reply("BAD_DIM", role, ": expected dimensions of 0 or more, got ", *smallest);
  }
  std::int64_t elements = 1;
  for (const std::int64_t dimension : tensor.shape()) {
    if (dimension > kMostElements || (elements *= dimension) > kMostElements) {
      return bad_reply("SHAPE_OVERFLOW", role, ": expected at most ", kMostElements, " elements");
    }
  }
  if (tensor.data().size() != static_cast<std::size_t>(elements) * sizeof(Number)) {
    return bad_reply("SIZE_MISMATCH", role, ": expected ", elements * sizeof(Number), " bytes, got ",
                     tensor.data().size());
  }
  if (tensor.dtype() != kDtype) {
    return bad_reply("BAD_DTYPE", role, ": expected ", std::is_same_v<Number, float> ? "float32" : "int32",
                     ", got the other one");
  }
  if (!std::equal(shape.begin(), shape.end(), tensor.shape().begin(), tensor.shape().end())) {
    return bad_reply("BAD_SHAPE", role, ": expected ", shape.size(), " dimensions of ", shape[0], ", ... , got others");
  }
  values.resize(elements);
  std::memcpy(values.data(), tensor.data().data(), tensor.data().size());
  return std::nullopt;
}

std::optional<Error> cut_to(const Space& space, std::vector<float>& actions) {
  for (std::size_t i = 0; i < actions.size(); ++i) {
    if (!std::isfinite(actions[i])) {
      return bad_reply("NON_FINITE_ACTION", "an action is NaN or infinite");
    }
  }
  for (std::size_t i = 0; i < actions.size(); ++i) {
    const std::size_t column = i % space.width();
    const float low = space.low[column];
    const float high = space.high[column];
    if (actions[i] < low - kBoundTolerance * std::max(1.0f, std::abs(low)) ||
        actions[i] > high + kBoundTolerance * std::max(1.0f, std::abs(high))) {
      return bad_reply("ACTION_OUT_OF_BOUNDS", "action[", i / space.width(), ", ", column, "]: expected ", low, " to ",
                       high, ", got ", actions[i]);
    }
    actions[i] = std::min(std::max(actions[i], low), high);
  }
  return std::nullopt;
}

std::optional<Error> read_mode(const wire::ActReply& reply, const wire::ActRequest& request, const PolicySpec& spec,
                               Actions& actions) {
  // Whether an actor has modes is the bundle's, and a bundle of the same contract may take its place.
  const bool must_have_mode =
      reply.variant() == kGreedyMode || request.has_mode() || request.has_sampling_seed() || request.has_hysteresis();
  if (reply.has_margin() != reply.has_mode() || (must_have_mode && !reply.has_mode())) {
    return bad_reply("WRONG_FIELDS", "expected mode and margin together, and both where modes were asked about");
  }
  if (!reply.has_mode()) {
    return std::nullopt;
  }
  const std::vector<std::int64_t> shape = {static_cast<std::int64_t>(actions.rows)};
  if (auto error = read_tensor(reply.mode(), "mode", shape, actions.mode)) {
    return error;
  }
  if (auto error = read_tensor(reply.margin(), "margin", shape, actions.margin)) {
    return error;
  }
  // A bundle of the same contract may have another number of components.
  const std::int64_t components =
      reply.bundle_digest() == spec.bundle_digest ? std::int64_t{spec.num_components} : kMostElements;
  for (std::size_t row = 0; row < actions.rows; ++row) {
    if (actions.mode[row] < 0 || actions.mode[row] >= components) {
      return bad_reply("BAD_MODE", "expected components 0 to ", components - 1);
    }
    if (request.has_mode() && actions.mode[row] != request.mode()) {
      return bad_reply("BAD_MODE", "expected the component ", request.mode(), " that was asked for");
    }
    if (std::isinf(actions.margin[row]) || actions.margin[row] < 0) {
      return bad_reply("BAD_MARGIN", "expected margins of 0 or more, or NaN");
    }
  }
  return std::nullopt;
}

std::optional<Error> read_scores(const wire::ActReply& reply, Actions& actions) {
  std::set<std::string> names;
  for (const wire::Score& score : reply.scores()) {
    names.insert(score.name());
  }
  if (reply.scores_size() > kMostScores || names.size() != static_cast<std::size_t>(reply.scores_size())) {
    return bad_reply("BAD_SCORES", "expected at most ", kMostScores, " scores, each of them once");
  }
  for (const wire::Score& message : reply.scores()) {
    Score score;
    if (auto error = read_tensor(message.values(), "score", {static_cast<std::int64_t>(actions.rows)}, score.values)) {
      return error;
    }
    if (!std::isfinite(message.threshold())) {
      return bad_reply("BAD_SCORES", "expected a finite threshold");
    }
    score.name = message.name();
    score.threshold = message.threshold();
    bool agrees = message.warns_size() == 0 || static_cast<std::size_t>(message.warns_size()) == actions.rows;
    for (int row = 0; agrees && row < message.warns_size(); ++row) {
      agrees = message.warns(row) == score.warns(row);
    }
    if (!agrees) {
      return bad_reply("BAD_SCORES", "expected the rows that warn to be those above the threshold");
    }
    actions.scores.push_back(std::move(score));
  }
  return std::nullopt;
}

/// The rows of `given`, or what is wrong with them.
Result<std::int64_t> count_rows(const Input& given, const Space& space, const PolicySpec& spec) {
  const std::size_t width = space.width();
  if (given.values.empty()) {
    return invalid("EMPTY_BATCH", "expected at least one row, got 0");
  }
  if (given.values.size() % width != 0) {
    return invalid("BAD_SHAPE", space.name, ": expected rows of ", width, " numbers, got ", given.values.size());
  }
  const std::size_t rows = given.values.size() / width;
  if (rows > spec.max_batch_rows) {
    return invalid("BATCH_TOO_LARGE", "expected at most ", spec.max_batch_rows, " rows, got ", rows);
  }
  for (std::size_t i = 0; i < given.values.size(); ++i) {
    if (!std::isfinite(given.values[i])) {
      return invalid("NON_FINITE", space.name, "[", i, "]: expected a finite float32, got ", given.values[i]);
    }
  }
  return static_cast<std::int64_t>(rows);
}

std::optional<Error> write_options(const PolicySpec& spec, const ActOptions& options, std::int64_t rows,
                                   wire::ActRequest& request) {
  const std::string variant(options.variant.empty() ? std::string_view(spec.default_variant) : options.variant);
  if (std::find(spec.variants.begin(), spec.variants.end(), variant) == spec.variants.end()) {
    return invalid("UNKNOWN_VARIANT", "expected one of the policy's variants, got '", printable(variant), "'");
  }
  request.set_variant(variant);
  if (options.is_batch) {
    request.set_priority(wire::PRIORITY_BATCH);
  }
  if (options.mode) {
    if (*options.mode < 0) {
      return invalid("BAD_OPTION", "mode: expected 0 or more, got ", *options.mode);
    }
    request.set_mode(*options.mode);
  }
  if (options.sampling_seed) {
    request.set_sampling_seed(*options.sampling_seed);
  }
  if (options.previous_mode.empty()) {
    return options.hysteresis_width == 0.0f
               ? std::nullopt
               : std::optional(invalid("BAD_OPTION", "hysteresis_width: expected previous_mode beside it, got none"));
  }
  if (options.mode) {
    return invalid("BAD_OPTION", "previous_mode: expected no forced mode beside it, got one");
  }
  if (options.previous_mode.size() != static_cast<std::size_t>(rows) ||
      std::any_of(options.previous_mode.begin(), options.previous_mode.end(), [](int mode) { return mode < -1; })) {
    return invalid("BAD_OPTION", "previous_mode: expected ", rows, " modes, each -1 or more");
  }
  // Written so that NaN fails as well.
  if (!(options.hysteresis_width >= 0.0f && std::isfinite(options.hysteresis_width))) {
    return invalid("BAD_OPTION", "hysteresis_width: expected a finite number of 0 or more, got ",
                   options.hysteresis_width);
  }
  write_tensor(*request.mutable_hysteresis()->mutable_previous_mode(), "previous_mode", options.previous_mode, rows, {});
  request.mutable_hysteresis()->set_width(options.hysteresis_width);
  return std::nullopt;
}

}  // namespace

Result<PolicySpec> read_spec(const wire::PolicySpec& message) {
  PolicySpec spec;
  std::set<std::string> names;
  for (const wire::Space& input : message.inputs()) {
    if (!is_name(input.name())) {
      return bad_spec("expected printable names of 1 to 64 characters");
    }
    names.insert(input.name());
    Result<Space> space = read_space(input, "input");
    if (!space) {
      return space.error();
    }
    spec.inputs.push_back(std::move(space).value());
  }
  if (names.empty() || names.size() != spec.inputs.size()) {
    return bad_spec("expected one input or more, each name once");
  }
  if (!is_name(message.policy()) || !std::all_of(message.variants().begin(), message.variants().end(), is_name)) {
    return bad_spec("expected printable names of 1 to 64 characters");
  }
  if (!is_hash(message.bundle_digest()) || !is_hash(message.contract_hash())) {
    return bad_spec("expected bundle_digest and contract_hash of 1 to 128 characters");
  }
  if (message.max_batch_rows() < 1) {
    return bad_spec("max_batch_rows is 0");
  }
  spec.variants.assign(message.variants().begin(), message.variants().end());
  const auto offers = [&](std::string_view variant) {
    return std::find(spec.variants.begin(), spec.variants.end(), variant) != spec.variants.end();
  };
  if (!offers(message.default_variant())) {
    return bad_spec("default_variant is not among the variants");
  }
  if (offers(kGreedyMode) && message.num_components() < 1) {
    return bad_spec("greedy_mode without components");
  }
  Result<Space> action = read_space(message.action(), "action");
  if (!action) {
    return action.error();
  }
  spec.action = std::move(action).value();
  if (spec.action.shape.size() != 1) {
    return bad_spec("action: expected one dimension, got several");
  }
  spec.policy = message.policy();
  spec.version = message.version();
  spec.default_variant = message.default_variant();
  spec.bundle_digest = message.bundle_digest();
  spec.contract_hash = message.contract_hash();
  spec.num_components = message.num_components();
  spec.max_batch_rows = message.max_batch_rows();
  spec.execution_provider = message.execution_provider();
  return spec;
}

Result<wire::ActRequest> make_request(const PolicySpec& spec, std::uint32_t version, Span<const Input> inputs,
                                      const ActOptions& options) {
  wire::ActRequest request;
  request.set_policy(spec.policy);
  request.set_version(version);
  request.set_contract_hash(spec.contract_hash);
  for (const Input& given : inputs) {
    const bool is_known = (given.name.empty() && spec.inputs.size() == 1) ||
                          std::any_of(spec.inputs.begin(), spec.inputs.end(),
                                      [&](const Space& space) { return space.name == given.name; });
    if (!is_known) {
      return invalid("UNKNOWN_INPUT", "expected the policy's inputs by name, got '", printable(given.name), "'");
    }
  }
  std::int64_t rows = 0;
  for (const Space& space : spec.inputs) {
    const Input* found = nullptr;
    for (const Input& given : inputs) {
      if (given.name == space.name || (given.name.empty() && spec.inputs.size() == 1)) {
        if (found != nullptr) {
          return invalid("DUPLICATE_INPUT", "expected the input ", space.name, " once");
        }
        found = &given;
      }
    }
    if (found == nullptr) {
      return invalid("MISSING_INPUT", "expected the input ", space.name, ", got none");
    }
    const Result<std::int64_t> counted = count_rows(*found, space, spec);
    if (!counted) {
      return counted.error();
    }
    if (rows != 0 && *counted != rows) {
      return invalid("BATCH_MISMATCH", space.name, ": expected ", rows, " rows as in ", spec.inputs[0].name, ", got ",
                     *counted);
    }
    rows = *counted;
    write_tensor(*request.add_inputs(), space.name, found->values, rows, space.shape);
  }
  if (auto error = write_options(spec, options, rows, request)) {
    return *error;
  }
  return request;
}

Result<Actions> read_reply(const wire::ActReply& reply, const wire::ActRequest& request, const PolicySpec& spec) {
  if (reply.sequence() != request.sequence()) {
    return bad_reply("WRONG_SEQUENCE", "expected ", request.sequence(), ", got ", reply.sequence());
  }
  if (reply.policy() != request.policy()) {
    return bad_reply("WRONG_POLICY", "the reply comes from another policy than the one asked for");
  }
  if (reply.variant() != request.variant()) {
    return bad_reply("WRONG_VARIANT", "expected ", printable(request.variant()), ", got another one");
  }
  if (request.version() != 0 && reply.version() != request.version()) {
    return bad_reply("WRONG_VERSION", "expected ", request.version(), ", got ", reply.version());
  }
  if (!is_hash(reply.bundle_digest())) {
    return bad_reply("MISSING_DIGEST", "the reply does not name the bundle that answered");
  }
  if (reply.has_explanation()) {
    return bad_reply("WRONG_FIELDS", "an explanation belongs to a request that asks for it and to nothing else");
  }
  Actions actions;
  actions.rows = static_cast<std::size_t>(request.inputs(0).shape(0));
  const std::vector<std::int64_t> shape = {request.inputs(0).shape(0), static_cast<std::int64_t>(spec.action.width())};
  if (auto error = read_tensor(reply.action(), "action", shape, actions.actions)) {
    return *error;
  }
  if (auto error = cut_to(spec.action, actions.actions)) {
    return *error;
  }
  if (auto error = read_mode(reply, request, spec, actions)) {
    return *error;
  }
  if (auto error = read_scores(reply, actions)) {
    return *error;
  }
  actions.variant = reply.variant();
  actions.policy = reply.policy();
  actions.version = reply.version();
  actions.bundle_digest = reply.bundle_digest();
  actions.sequence = reply.sequence();
  actions.is_clamped = reply.is_clamped();
  actions.queue_s = static_cast<double>(reply.timings().queue_ns()) * 1e-9;
  actions.inference_s = static_cast<double>(reply.timings().inference_ns()) * 1e-9;
  actions.batch_rows = reply.timings().batch_rows();
  return actions;
}

}  // namespace lom_client
