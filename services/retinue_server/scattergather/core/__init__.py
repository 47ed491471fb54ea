"""The rules of scatter/gather: no I/O, no grpc, no protobuf."""
