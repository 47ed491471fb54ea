"""The rules of the ambassador: no I/O, no grpc, no protobuf."""
