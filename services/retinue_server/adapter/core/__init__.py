"""Rules of the adapter: no I/O, no grpc, no protobuf."""
