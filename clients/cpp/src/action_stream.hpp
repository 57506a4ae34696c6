#pragma once

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "contract.hpp"
#include "in_flight.hpp"
#include "outcome.hpp"

namespace lom_client {

class OpenStream;

/// All requests of a client over one `ActStream`, which spares each of them the cost of a call of its own. Opened by its
/// first request; opened anew by the next one after it ended or became old. Threads: any; nothing blocks.
class ActionStream {
 public:
  ActionStream(grpc::GenericStub& stub, const std::string& token, std::shared_ptr<InFlight> in_flight);
  ~ActionStream();

  /// Numbers and sends `request`, useless after `over_ns`; `outcome` ends with its reply. Returns the stream that it is
  /// on, null where there is none any more.
  std::shared_ptr<OpenStream> act(wire::ActRequest& request, std::int64_t over_ns,
                                  const std::shared_ptr<Outcome<wire::ActReply>>& outcome);

  /// Nobody waits for the answer to request `sequence` of `stream` any more.
  static void forget(const std::shared_ptr<OpenStream>& stream, std::uint64_t sequence);

  void close();

 private:
  grpc::GenericStub& stub_;
  const std::string& token_;
  const std::shared_ptr<InFlight> in_flight_;
  std::mutex mutex_;
  std::uint64_t sequence_ = 0;
  bool is_closed_ = false;
  std::shared_ptr<OpenStream> open_;
};

}  // namespace lom_client
