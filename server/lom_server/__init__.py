"""The LOM policy inference server: answers observations with actions, from a bundle that proves itself first.

`lom-serve BUNDLE` on the command line; `lom_server.server.serve` inside an asyncio program. Importing this package
is light: onnxruntime and gRPC are loaded by the modules that need them.
"""
