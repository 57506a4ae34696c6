// A PolicyClient that a test drives: one question per line of stdin, one answer per line of stdout, both JSON.
//
//   act_probe TARGET CONFIG
//
// A question is {"rows" or "inputs", "deadline_s", "variant", ...}, null a NaN; "close" closes the client.

#include <cmath>
#include <iostream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "lom_client/policy_client.hpp"

namespace {

using Json = nlohmann::json;

lom_client::ClientConfig config_of(const Json& said) {
  lom_client::ClientConfig config;
  config.use_stream = said.value("use_stream", false);
  config.tls_ca = said.value("tls_ca", "");
  config.tls_certificate = said.value("tls_certificate", "");
  config.tls_key = said.value("tls_key", "");
  config.token_file = said.value("token_file", "");
  config.keepalive_time_s = said.value("keepalive_time_s", config.keepalive_time_s);
  config.max_message_bytes = said.value("max_message_bytes", config.max_message_bytes);
  return config;
}

Json said(const lom_client::Error& error) {
  return {{"failure", lom_client::name_of(error.failure)},
          {"reason", error.reason},
          {"detail", error.detail},
          {"is_retryable", error.is_retryable()},
          {"retry_after_s", error.retry_after_s ? Json(*error.retry_after_s) : Json()}};
}

Json said(const lom_client::Actions& actions) {
  Json scores = Json::object();
  for (const lom_client::Score& score : actions.scores) {
    scores[score.name] = {{"values", score.values}, {"threshold", score.threshold}, {"warns", score.warns(0)}};
  }
  return {{"rows", actions.rows},       {"actions", actions.actions}, {"variant", actions.variant},
          {"mode", actions.mode},       {"margin", actions.margin},   {"version", actions.version},
          {"scores", scores},           {"bundle_digest", actions.bundle_digest}};
}

Json answer(lom_client::PolicyClient& client, const Json& question) {
  std::vector<float> values;
  for (const Json& row : question.at("rows")) {
    for (const Json& number : row) {
      values.push_back(number.is_null() ? NAN : number.get<float>());
    }
  }
  const std::string variant = question.value("variant", "");
  std::vector<std::int32_t> previous_mode;
  lom_client::ActOptions options;
  options.variant = variant;
  if (question.contains("mode")) {
    options.mode = question["mode"].get<std::int32_t>();
  }
  if (question.contains("previous_mode")) {
    previous_mode = question["previous_mode"].get<std::vector<std::int32_t>>();
    options.previous_mode = previous_mode;
    options.hysteresis_width = question.value("hysteresis_width", 0.0f);
  }
  const std::chrono::duration<double> deadline(question.value("deadline_s", 10.0));
  std::vector<std::pair<std::string, std::vector<float>>> named;
  const Json by_name = question.value("inputs", Json::object());
  for (const auto& [name, numbers] : by_name.items()) {
    named.emplace_back(name, numbers.get<std::vector<float>>());
  }
  std::vector<lom_client::Input> inputs;
  for (const auto& [name, numbers] : named) {
    inputs.emplace_back(name, numbers);
  }
  const auto budget = std::chrono::duration_cast<std::chrono::nanoseconds>(deadline);
  const auto actions = inputs.empty() ? client.act(values, budget, options)
                                      : client.act(lom_client::Span<const lom_client::Input>(inputs), budget, options);
  return actions ? said(*actions) : said(actions.error());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: act_probe TARGET CONFIG\n";
    return 2;
  }
  try {
    const Json config = Json::parse(argv[2]);
    lom_client::PolicyClient client(argv[1], config_of(config), config.value("policy", ""), config.value("version", 0u));
    for (std::string line; std::getline(std::cin, line);) {
      const Json question = Json::parse(line);
      if (question == "close") {
        client.close();
        std::cout << "null" << std::endl;
        continue;
      }
      const auto began = std::chrono::steady_clock::now();
      Json said = answer(client, question);
      said["took_s"] = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
      std::cout << said.dump() << std::endl;
    }
  } catch (const std::invalid_argument& error) {
    std::cout << Json{{"refused", error.what()}}.dump() << std::endl;
    return 1;
  }
}
