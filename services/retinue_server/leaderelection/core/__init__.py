"""The rules of leader election; no I/O, no gRPC, no SQL, no protobuf."""
