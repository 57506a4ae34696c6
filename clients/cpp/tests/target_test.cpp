#include "target.hpp"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cmath>
#include <cstdio>
#include <fstream>
#include <stdexcept>

namespace lom_client {
namespace {

TEST(Target, OfEachForm) {
  EXPECT_EQ(parse_target("grpc://127.0.0.1:8001").address, "dns:///127.0.0.1:8001");
  EXPECT_TRUE(parse_target("grpc://127.0.0.1:8001").is_private);
  EXPECT_FALSE(parse_target("grpc://robot-7.cell:8001").is_private);
  EXPECT_TRUE(parse_target("grpcs://robot-7.cell:8001").is_tls);
  EXPECT_EQ(parse_target("grpc://[::1]:1").address, "dns:///[::1]:1");
  EXPECT_TRUE(parse_target("grpc://[::1]:1").is_private);
  EXPECT_EQ(parse_target("unix:/run/lom serve.sock").address, "unix:/run/lom%20serve.sock");
}

class WrongTarget : public testing::TestWithParam<const char*> {};

TEST_P(WrongTarget, IsRefused) { EXPECT_THROW(parse_target(GetParam()), std::invalid_argument); }

INSTANTIATE_TEST_SUITE_P(Target, WrongTarget,
                         testing::Values("", "127.0.0.1:8001", "http://h:1", "grpc://", "grpc://h", "grpc://h:", "grpc://h:0",
                                         "grpc://h:65536", "grpc://h:1/path", "grpc://user@h:1", "grpc://h:1?x",
                                         "grpc://-h:1", "grpc://h h:1", "grpc://[::g]:1", "grpc://::1:1", "unix:", "unix:/",
                                         "unix:relative", "unix://host/x", "unix:/a\nb", "inproc:/bundle"));

TEST(Config, IsCheckedByName) {
  const Target plain = parse_target("grpc://127.0.0.1:1");
  ClientConfig config;
  EXPECT_NO_THROW(check_config(config, plain));
  config.keepalive_time_s = NAN;
  EXPECT_THROW(check_config(config, plain), std::invalid_argument);
  config = {};
  config.initial_reconnect_backoff_s = 1.0;
  EXPECT_THROW(check_config(config, plain), std::invalid_argument);
  config = {};
  config.tls_ca = "ca.pem";
  EXPECT_THROW(check_config(config, plain), std::invalid_argument);
  EXPECT_NO_THROW(check_config(config, parse_target("grpcs://h:1")));
  config = {};
  config.tls_key = "key.pem";
  EXPECT_THROW(check_config(config, parse_target("grpcs://h:1")), std::invalid_argument);
  config = {};
  config.token_file = "token";
  EXPECT_NO_THROW(check_config(config, plain));
  EXPECT_THROW(check_config(config, parse_target("grpc://robot-7:1")), std::invalid_argument);
}

class TokenFile : public testing::Test {
 protected:
  std::string token_of(const std::string& text, mode_t mode = 0600) {
    std::ofstream(path_) << text;
    chmod(path_.c_str(), mode);
    ClientConfig config;
    config.token_file = path_;
    return read_secrets(config).token;
  }
  void TearDown() override { std::remove(path_.c_str()); }

  const std::string path_ = testing::TempDir() + "lom_client_token";
};

TEST_F(TokenFile, HoldsOneToken) {
  EXPECT_EQ(token_of("0123456789abcdef\n"), "0123456789abcdef");
  EXPECT_EQ(token_of("# mine\nrobot arm-7 0123456789abcdef\n"), "0123456789abcdef");
}

TEST_F(TokenFile, IsRefusedWhereItDoesNotOrOthersMayRead) {
  EXPECT_THROW(token_of(""), std::invalid_argument);
  EXPECT_THROW(token_of("short"), std::invalid_argument);
  EXPECT_THROW(token_of("0123456789abcdef\n0123456789abcdef"), std::invalid_argument);
  EXPECT_THROW(token_of("two 0123456789abcdef"), std::invalid_argument);
  EXPECT_THROW(token_of("0123456789abcdef", 0644), std::invalid_argument);
}

TEST(Secrets, AreChecked) {
  ClientConfig config;
  config.tls_ca = "/nowhere/ca.pem";
  EXPECT_THROW(read_secrets(config), std::invalid_argument);
  config.tls_ca = "/proc/self/cmdline";  // readable, and no PEM
  EXPECT_THROW(read_secrets(config), std::invalid_argument);
}

}  // namespace
}  // namespace lom_client
