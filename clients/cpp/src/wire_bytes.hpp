#pragma once

#include <grpcpp/grpcpp.h>

#include <string>

namespace lom_client {

/// Messages travel as bytes: gRPC's own deserialiser hands over the half of a message that it could read.
template <typename Message>
grpc::ByteBuffer to_bytes(const Message& message) {
  const std::string bytes = message.SerializeAsString();
  const grpc::Slice slice(bytes);
  return grpc::ByteBuffer(&slice, 1);
}

/// False where the bytes are no such message.
template <typename Message>
bool from_bytes(const grpc::ByteBuffer& bytes, Message& message) {
  grpc::Slice slice;
  return bytes.DumpToSingleSlice(&slice).ok() && message.ParseFromArray(slice.begin(), static_cast<int>(slice.size()));
}

}  // namespace lom_client
