"""The wire contract: messages, stubs, reason codes and the array codec shared by server and clients."""
